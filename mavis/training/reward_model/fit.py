"""Fitting a sequence classifier to preference pairs, resumable step by step; nothing is pickled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mavis.errors import DataError, TrainingError, first_sentence
from mavis.math import bradley_terry_loss
from mavis.rewards.classifier_inputs import pad_texts
from mavis.training.optimizer_state import optimizer_tensors, restore_optimizers
from mavis.training.reward_model.encoded_pairs import EncodedPair
from mavis.training.reward_model.settings import RewardModelSettings
from mavis.utils.files import atomic_folder, read_json, restore_folder, write_json
from mavis.utils.tensors import load_tensors, save_tensors

_SORTED_BATCHES = 8  # how many batches are sorted by length together, so that there is little padding


def fit_pairs(
    model: Any,
    classifier: Any,
    padding_id: int | None,
    pairs: Sequence[EncodedPair],
    folder: Path,
    settings: RewardModelSettings,
    on_step: Callable[[int, int], None],
) -> float:
    """Fit a model to pairs, resuming an interrupted run.

    The order of the pairs and the learning rate are functions of the step and the state of the optimiser is saved, so a
    resumed run ends with the weights of an uninterrupted one.

    Args:
        model: whose parameters that require gradients are trained, in place.
        classifier: the sequence classifier in it.
        padding_id: of `padding_of`.
        pairs: to learn from.
        folder: of the run; `folder/checkpoint` is replaced every `save_every` steps and at the end.
        settings: of the run.
        on_step: called with the number of steps done and in all.

    Returns:
        The duration in seconds, including interrupted runs.

    Raises:
        TrainingError: if the loss is not finite.
        DataError: if the checkpoint is damaged.
    """
    checkpoint = folder / "checkpoint"
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=0.0)
    done, seconds = _restore(checkpoint, parameters, optimizer)
    began = time.perf_counter() - seconds
    batches = list(_batches(pairs, settings))
    on_step(done, len(batches))
    for step in range(done, len(batches)):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - step / len(batches))
        loss = _backward(classifier, padding_id, [pairs[index] for index in batches[step]], settings)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0))
        if not (torch.isfinite(torch.tensor([loss, norm]))).all():
            raise TrainingError(
                f"the loss of step {step + 1} of {len(batches)} is {loss}, its gradient {norm}.",
                f"lower learning_rate, which is {settings.learning_rate}.",
            )
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % settings.save_every == 0 or step + 1 == len(batches):
            seconds = time.perf_counter() - began
            with atomic_folder(checkpoint) as temporary:
                save_tensors(parameters, temporary / "weights.safetensors")
                save_tensors(optimizer_tensors([optimizer]), temporary / "optimizer.safetensors")
                write_json(temporary / "state.json", {"step": step + 1, "seconds": seconds})
        on_step(step + 1, len(batches))
    return seconds


def _backward(
    classifier: Any, padding_id: int | None, pairs: Sequence[EncodedPair], settings: RewardModelSettings
) -> float:
    """Add the gradient of a step's mean loss; returns the loss."""
    total = 0.0
    size = settings.micro_pairs or len(pairs)
    for start in range(0, len(pairs), size):
        some = pairs[start : start + size]
        texts = [pair.chosen for pair in some] + [pair.rejected for pair in some]
        input_ids, is_token = pad_texts(classifier, texts, padding_id)
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            scores = classifier(input_ids=input_ids, attention_mask=is_token).logits[:, 0].float()
        losses = bradley_terry_loss(scores[: len(some)] - scores[len(some) :], settings.label_smoothing)
        loss = losses.sum() / len(pairs)
        loss.backward()
        total += float(loss.detach())
    return total


def _batches(pairs: Sequence[EncodedPair], settings: RewardModelSettings) -> Iterator[list[int]]:
    """Yield the indices of each step's pairs, of similar lengths, over all epochs."""
    size = settings.batch_size
    for epoch in range(settings.epochs):
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        order = torch.randperm(len(pairs), generator=generator).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(order), size * _SORTED_BATCHES):
            near = order[start : start + size * _SORTED_BATCHES]
            near.sort(key=lambda index: max(len(pairs[index].chosen), len(pairs[index].rejected)))
            batches += [near[first : first + size] for first in range(0, len(near), size)]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


@torch.no_grad()
def _restore(checkpoint: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Load a checkpoint, if there is one; returns the steps done and the seconds they took."""
    restore_folder(checkpoint)
    if not checkpoint.is_dir():
        return 0, 0.0
    try:
        weights = load_tensors(checkpoint / "weights.safetensors")
        states = load_tensors(checkpoint / "optimizer.safetensors")
        state = read_json(checkpoint / "state.json")
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
        restore_optimizers([optimizer], states)
        return int(state["step"]), float(state["seconds"])
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise DataError(
            f"checkpoint {str(checkpoint)!r} cannot be read: {first_sentence(error)}.",
            "delete that folder and rerun: the training starts again.",
        ) from error
