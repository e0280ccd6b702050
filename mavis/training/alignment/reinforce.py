"""Policy-gradient training through TRL, resumable step by step; nothing is pickled.

Importing this module needs TRL and PEFT, the extra `align`.
"""

from __future__ import annotations

import copy
import hashlib
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from mavis.errors import DataError, first_sentence
from mavis.policies import Prompt
from mavis.policies.devices import states_device
from mavis.policies.encoding import prompt_ids, response_texts
from mavis.policies.generation_config import special_tokens_config
from mavis.policies.save import save_policy
from mavis.training.alignment.settings import AlignSettings
from mavis.training.optimizer_state import optimizer_tensors, restore_optimizers
from mavis.utils.files import atomic_folder, read_json, restore_folder, write_json
from mavis.utils.tensors import load_tensors, save_tensors

Reward = Callable[[Sequence[str], Sequence[str]], list[float]]
"""Scores responses to prompts, as one number each on the normalised scale."""


def reinforce(
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Reward,
    folder: Path,
    settings: AlignSettings,
    on_step: Callable[[int], None],
) -> float:
    """Train a copy of a policy, resuming an interrupted run.

    Every step has a seed of its own and the optimiser's state is saved, so a resumed run ends with the weights of an
    uninterrupted one.

    Args:
        policy: the reference policy; it is not changed.
        tokenizer: its tokenizer.
        prompts: steps × batch_size texts, in their order.
        reward: of its responses.
        folder: of the run; `folder/checkpoint` is replaced every `save_every` steps and at the end.
        settings: of the run.
        on_step: called with the number of steps done.

    Returns:
        The duration of the training in seconds, including interrupted runs.
    """
    checkpoint = folder / "checkpoint"
    restore_folder(checkpoint)
    state = read_json(checkpoint / "state.json") if checkpoint.is_dir() else {"step": 0, "seconds": 0.0}
    if state["step"] == settings.steps:
        return float(state["seconds"])
    trained = copy.deepcopy(policy)
    # What TRL leaves open, `generate` would fill from the policy's own config.
    trained.generation_config = special_tokens_config(policy)
    own_tokenizer = copy.deepcopy(tokenizer)  # TRL adds a padding token to tokenizers without one

    def scored(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return reward(prompts, response_texts(own_tokenizer, prompt_ids(own_tokenizer, prompts), completion_ids))

    trainer: Any = RLOOTrainer
    config: Any = RLOOConfig
    nat = 1 / settings.beta  # price of a nat in reward, TRL's beta
    if settings.method == "grpo":
        # Advantages and KL are summed over a response; dividing by its length or by the spread of its group would
        # change what β means.
        trainer, config = GRPOTrainer, partial(GRPOConfig, loss_type="dr_grpo", scale_rewards="none")
        # The baseline includes the response itself, which scales all rewards by this factor, but not the KL.
        nat *= 1 - 1 / settings.samples
    rows, micro = settings.batch_size * settings.samples, settings.micro_rows
    steps = _Steps(int(state["step"]), float(state["seconds"]), checkpoint, settings, on_step)
    with _restored_process_state():
        if not settings.lora_rank:
            with atomic_folder(folder / "reference") as temporary:
                trained.save_pretrained(temporary)
            # TRL loads its reference policy from there; with adapters it switches these off instead.
            trained.config._name_or_path = str(folder / "reference")
            # In half precision most updates would be rounded away.
            trained.float().requires_grad_(True)
        run = _with_our_prompts(
            trainer
        )(
            trained,
            scored,
            config(
                output_dir=str(folder),
                max_steps=settings.steps - steps.start,
                per_device_train_batch_size=micro or rows,
                gradient_accumulation_steps=rows // (micro or rows),
                num_generations=settings.samples,
                max_completion_length=settings.max_new_tokens,
                temperature=settings.temperature,
                beta=nat,
                learning_rate=settings.learning_rate,
                lr_scheduler_type="constant",  # `_Steps` decays it, since it knows the steps before an interruption
                shuffle_dataset=False,
                disable_dropout=True,
                gradient_checkpointing=False,
                bf16=policy.dtype == torch.bfloat16,
                use_cpu=states_device(policy).type == "cpu",
                seed=settings.seed,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": list(prompts[steps.start * settings.batch_size :])}),
            processing_class=own_tokenizer,
            callbacks=[steps],
            peft_config=_lora(settings) if settings.lora_rank else None,
        )
        run.remove_callback(PrinterCallback)
        run.train()
    return steps.seconds


def aligned_copy(policy: Any, folder: Path, settings: AlignSettings) -> Any:
    """Build the policy that `reinforce` trained, in the precision of the reference policy and without gradients.

    Args:
        policy: the reference policy; it is not changed.
        folder: of the run.
        settings: of the run.
    """
    aligned = copy.deepcopy(policy)
    if settings.lora_rank:
        with _restored_process_state():
            aligned = get_peft_model(aligned, _lora(settings))
    if settings.steps:
        restore_weights(aligned, _load(folder / "checkpoint" / "weights.safetensors"))
    return aligned.eval().requires_grad_(False)


def save_aligned(aligned: Any, tokenizer: Any, folder: Path) -> Path:
    """Write an aligned policy with its tokenizer, or its adapter alone, atomically.

    Args:
        aligned: of `aligned_copy`.
        tokenizer: its tokenizer.
        folder: of the run.

    Returns:
        The folder of the policy or of the adapter.
    """
    with _restored_process_state():
        if not isinstance(aligned, PeftModel):
            save_policy(folder / "policy", aligned, tokenizer)
            return folder / "policy"
        with atomic_folder(folder / "adapter") as temporary:
            # To find out whether embeddings were trained, PEFT would look the policy up on the hub.
            aligned.save_pretrained(temporary, save_embedding_layers=False)
        return folder / "adapter"


def _load(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint."""
    try:
        return load_tensors(path)
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{str(path)!r} cannot be read: {first_sentence(error)}.",
            f"delete the folder {str(path.parent)!r} and rerun: the training starts again.",
        ) from error


@torch.no_grad()
def restore_weights(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy trained weights into a model's parameters of the same names."""
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight)


def _with_our_prompts(trainer: Any) -> Any:
    """Let a trainer of TRL encode prompts as rollouts do, with one BOS token."""

    class Trainer(trainer):
        def _tokenize_prompts(self, prompts: list[Prompt]) -> tuple[list[list[int]], None, dict[str, Any]]:
            return prompt_ids(self.processing_class, prompts), None, {}

    return Trainer


def _lora(settings: AlignSettings) -> LoraConfig:
    return LoraConfig(
        r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


class _Steps(TrainerCallback):
    """Sets each step's seed and learning rate, reports progress, and saves checkpoints without pickle."""

    def __init__(
        self, start: int, seconds: float, checkpoint: Path, settings: AlignSettings, on_step: Callable[[int], None]
    ) -> None:
        self.start, self.seconds = start, seconds
        self._checkpoint, self._settings, self._on_step = checkpoint, settings, on_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.start:
            restore_weights(kwargs["model"], _load(self._checkpoint / "weights.safetensors"))
            restore_optimizers([kwargs["optimizer"]], _load(self._checkpoint / "optimizers.safetensors"))
        self._on_step(self.start)
        self._began = time.perf_counter() - self.seconds

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = self.start + state.global_step
        torch.manual_seed(int(hashlib.sha256(f"{self._settings.seed}/{step}".encode()).hexdigest()[:15], 16))
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = self._settings.learning_rate * (1 - step / self._settings.steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = self.start + state.global_step
        if done % self._settings.save_every == 0 or done == self._settings.steps:
            self.seconds = time.perf_counter() - self._began
            trained = {name: p.detach() for name, p in kwargs["model"].named_parameters() if p.requires_grad}
            with atomic_folder(self._checkpoint) as temporary:
                save_tensors(trained, temporary / "weights.safetensors")
                save_tensors(optimizer_tensors([kwargs["optimizer"]]), temporary / "optimizers.safetensors")
                write_json(temporary / "state.json", {"step": done, "seconds": self.seconds})
        self._on_step(done)


@contextmanager
def _restored_process_state() -> Iterator[None]:
    """Undo what TRL does to the process: it seeds all random sources, shows progress bars and sends telemetry."""
    telemetry, bars = constants.HF_HUB_DISABLE_TELEMETRY, logging.is_progress_bar_enabled()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    constants.HF_HUB_DISABLE_TELEMETRY = True
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # from how TRL and PEFT call transformers
            warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # PEFT corrects it and warns for each layer
            yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = telemetry
        if bars:
            logging.enable_progress_bar()
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
