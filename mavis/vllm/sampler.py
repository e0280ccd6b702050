"""`VllmSampler`: rollouts drawn by an engine of vLLM instead of the policy's own `generate`."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

from mavis.critics import Critic
from mavis.distributed import join_processes
from mavis.errors import ConfigError, MavisError, MissingPackageError, first_sentence
from mavis.policies.devices import states_device
from mavis.policies.fingerprint import Fingerprint
from mavis.policies.generation_config import end_token_ids
from mavis.rollouts.sampler import SampledResponses
from mavis.rollouts.sampling import RolloutSettings
from mavis.vllm import guard
from mavis.vllm.request_arguments import BETA, TOP_K, WEIGHTS
from mavis.vllm.served_critic import SETTING, check_servable, follows_tokens, weights_of

_PROCESSOR = "mavis.vllm.logits_processor:MavisLogitsProcessor"
# What decides how responses are drawn; a sampler sets these itself, or leaves them out.
_OURS = (
    *("model", "dtype", "tokenizer", "logits_processors", "additional_config", "generation_config"),
    *("quantization", "kv_cache_dtype", "hf_overrides"),
)
_MOST_TOGETHER = 256


class VllmSampler:
    """Draws rollouts with vLLM, in a process of its own that is started anew for every critic.

    Every request has a seed of its own, so that a run which was broken off draws the same again. The policy in this
    process reads the responses once more for their KL. The engine ends when `collect` has all that it wanted, when the
    sampler is closed or its `with` block left, and when this process ends, be it killed.

    Args:
        options: of `vllm.LLM`, such as `gpu_memory_utilization`, of which the policy itself needs a share too.

    Raises:
        ConfigError: if an option is one that the sampler sets itself.
        MissingPackageError: if vLLM is not installed.
    """

    name = "vllm"

    def __init__(self, **options: Any) -> None:
        for option in _OURS:
            if option in options:
                raise ConfigError(
                    f"{option} is {options[option]!r}, but the sampler sets it to what the policy needs.",
                    "leave it out.",
                )
        if find_spec("vllm") is None:
            raise MissingPackageError(
                "sampling rollouts with vLLM needs vLLM, which is not installed.",
                "pip install vllm, in an environment of its own, or use the sampler `generate`.",
            )
        self._options = options
        self._engine: Any = None
        self._serves: tuple[Any, ...] = ()
        self._folder: Path | None = None
        self._guard: subprocess.Popen[str] | None = None
        self._model: tuple[tuple[Any, ...], str] = (), ""

    def check(self, policy: Any, critic: Critic | None) -> None:
        """Refuse what an engine cannot serve; see `Sampler.check`.

        Raises:
            CriticError: for critics that no engine serves.
            ConfigError: for several processes, and for policies that cannot be read from a folder of their own.
        """
        if critic is not None:
            check_servable(critic, "critic")
        if (count := join_processes(states_device(policy)).world_size) > 1:
            raise ConfigError(
                f"{count} processes would each start an engine on devices that the others use.",
                "start one process, or use the sampler `generate`, which all of them share.",
            )
        if hasattr(policy, "peft_config"):
            raise ConfigError(
                "the policy has adapters, which the engine would not read.",
                "merge them into it first: policy = policy.merge_and_unload().",
            )

    def draw(
        self,
        policy: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        settings: RolloutSettings,
        seed: int,
        *,
        top_k: int | None = None,
        critic: Critic | None = None,
        lam: Tensor | None = None,
    ) -> SampledResponses:
        """Draw one response to each prompt; see `Sampler.draw`. The KL is left to the policy."""
        from vllm import SamplingParams

        prompt_ids: list[list[int]] = tokenizer(list(prompts))["input_ids"]
        ends = sorted(end_token_ids(policy))
        longest = max(map(len, prompt_ids)) + settings.max_new_tokens
        engine = self._engine_of(policy, tokenizer, critic, longest, settings.shard_size)
        fits = int(engine.model_config.max_model_len)
        if longest > fits:  # the engine would end such a response early without a word
            raise ConfigError(
                f"max_new_tokens is {settings.max_new_tokens}, with which the longest prompt comes to {longest} "
                f"tokens; the engine has room for {fits}.",
                "ask for shorter responses.",
            )
        rows: list[list[float] | None] = lam.tolist() if lam is not None else [None] * len(prompt_ids)
        each = [
            SamplingParams(
                max_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_k=top_k or 0,
                seed=seed + row,
                stop_token_ids=ends,
                ignore_eos=True,  # those above are all
                detokenize=False,
                extra_args={WEIGHTS: own, BETA: 1.0, TOP_K: settings.top_k or 0} if own is not None else None,
            )
            for row, own in enumerate(rows)
        ]
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompt_ids], each, use_tqdm=False)
        return SampledResponses(prompt_ids, [list(output.outputs[0].token_ids) for output in outputs])

    def release(self) -> None:
        """End the engine and give its memory back; the next draw starts another."""
        if self._engine is not None:
            self._engine.llm_engine.engine_core.shutdown()
            self._engine = None
            gc.collect()

    def close(self) -> None:
        """End the engine, and remove what was written for it."""
        self.release()
        if self._guard is not None and self._guard.stdin is not None:
            with suppress(OSError):  # something has killed it
                self._guard.stdin.close()  # it ends what is left, and the folder
            self._guard.wait()
        self._guard = self._folder = None
        self._model = (), ""

    def __enter__(self) -> VllmSampler:
        """Return the sampler."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def _engine_of(self, policy: Any, tokenizer: Any, critic: Critic | None, longest: int, rows: int) -> Any:
        """Return an engine that serves the policy under the critic as it is now, with room for the longest response."""
        serves = _version(policy), _version(critic)
        engine = self._engine
        if engine is not None and self._serves == serves and longest <= engine.model_config.max_model_len:
            return engine
        self.release()
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="mavis-vllm-"))
            self._guard = subprocess.Popen(
                [sys.executable, guard.__file__, str(self._folder)],
                stdin=subprocess.PIPE,
                text=True,
                start_new_session=True,  # a Ctrl-C is not for it
            )
        self._engine = self._start(policy, tokenizer, critic, longest, rows, self._folder)
        self._serves = serves
        return self._engine

    def _start(self, policy: Any, tokenizer: Any, critic: Critic | None, longest: int, rows: int, folder: Path) -> Any:
        # Without this, the engine's process is a copy of this one, with the locks of threads that it does not have.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # the other one takes no logits processors
        from vllm import LLM

        # Little more than is asked for: a value model's room is set aside for as many requests of this length.
        most = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
        length = 1 << (longest - 1).bit_length()
        options: dict[str, Any] = {
            "max_model_len": min(length, most) if most else length,
            "max_num_seqs": min(rows, _MOST_TOGETHER),
            "seed": 0,
            "disable_log_stats": True,
        }
        if critic is not None:
            shutil.rmtree(folder / "critic", ignore_errors=True)
            critic.save_pretrained(folder / "critic")
            options |= {"logits_processors": [_PROCESSOR], "additional_config": {SETTING: str(folder / "critic")}}
            if follows_tokens(critic):
                options["async_scheduling"] = False
        options |= self._options
        before = set(psutil.Process().children(recursive=True))
        try:
            engine = LLM(
                model=self._model_of(policy, tokenizer, folder),
                tokenizer=str(folder / "tokenizer"),
                dtype=str(policy.dtype).removeprefix("torch."),
                generation_config="vllm",
                **options,
            )
        except MavisError:
            raise
        except Exception as error:  # whatever the engine dislikes, it says so itself, here or in its log
            raise ConfigError(
                f"vLLM does not start with {options}: {first_sentence(error)}",
                "its own messages above say more; use the sampler `generate` where it cannot serve the policy.",
            ) from error
        assert self._guard is not None
        assert self._guard.stdin is not None
        started = set(psutil.Process().children(recursive=True)) - before
        with suppress(OSError):
            self._guard.stdin.write("".join(f"{guard.name(one)}\n" for one in started))
            self._guard.stdin.flush()
        return engine

    def _model_of(self, policy: Any, tokenizer: Any, folder: Path) -> str:
        """Find the folder that the policy was loaded from; if it is from a hub or was changed since, write another."""
        version, model = _version(policy), str(getattr(policy.config, "_name_or_path", ""))
        if self._model[0] != version:
            tokenizer.save_pretrained(folder / "tokenizer")
            policy.config.save_pretrained(folder / "tokenizer")  # which says what kind of tokenizer to expect
            if weights_of(model) != Fingerprint.of(policy).weights:
                model = str(folder / "policy")
                policy.save_pretrained(model)
            self._model = version, model
        return self._model[1]


def _version(module: Any) -> tuple[Any, ...]:
    """Tell a module from another, and from what it is after a change of its weights in place."""
    if module is None:
        return ()
    weights = [*module.parameters(), *module.buffers()]
    return id(module), *((one.data_ptr(), None if one.is_inference() else one._version) for one in weights)
