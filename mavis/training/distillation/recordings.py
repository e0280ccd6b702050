"""Recording a critic's values of the candidates at every step of sampled responses, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import LogitsProcessor

from mavis.critics import Critic
from mavis.distributed import SINGLE_PROCESS, ProcessGroup
from mavis.errors import DataError
from mavis.math.tilt import top_candidates
from mavis.rollouts.collect import RolloutPlan
from mavis.rollouts.replay import Sequences
from mavis.rollouts.sampling import RolloutSettings, sample, shard_seed
from mavis.rollouts.shards import store_missing
from mavis.training.rollout_tensors import RolloutTensors, ShardedRollouts
from mavis.utils.files import atomic_file
from mavis.utils.tensors import load_tensors, save_tensors


@dataclass(frozen=True)
class Recordings(RolloutTensors):
    """N rollouts of the reference policy with a critic's values at every step; see `RolloutTensors`.

    Args:
        candidate_ids: (N, T, K) int32, the candidates.
        logprobs: (N, T, K) float32, log π_ref of the candidates, normalised over them.
        values: (N, T, K, M) float32, the critic's values of them.
    """

    candidate_ids: Tensor
    logprobs: Tensor
    values: Tensor


def scale(recordings: ShardedRollouts[Recordings]) -> Tensor:
    """Compute the standard deviation of the values of each objective, (M,) float32; 1 where they do not vary."""
    local = recordings.local_rollouts
    values = local.values[local.is_response].flatten(0, 1).double()
    moments = torch.stack([torch.ones_like(values), values, values.square()]).sum(1)
    count, first, second = recordings.processes.all_reduce_sum(moments)
    spread = ((second - first.square() / count) / (count - 1).clamp_min(1)).clamp_min(0).sqrt().float()
    return torch.where(spread > 1e-6, spread, 1.0)


def record(
    policy: Any,
    tokenizer: Any,
    critic: Critic,
    plan: RolloutPlan,
    folder: Path,
    settings: RolloutSettings,
    top_k: int,
    *,
    processes: ProcessGroup = SINGLE_PROCESS,
    on_stored: Callable[[int], None] | None = None,
) -> Iterator[Recordings]:
    """Sample a plan's prompts from the reference policy, record a critic's values at every step, and yield each shard.

    Shards already on disk are read instead of sampled again; each has its own seed. Several processes share the work as
    in `collect`.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        critic: of any kind; attached while it is evaluated, unless it is attached already.
        plan: gives the prompts.
        folder: where the shards go, one safetensors file each; the caller makes sure that they are of this plan.
        settings: how to sample.
        top_k: K, number of candidates that are recorded, 1 ≤ K ≤ V, independent of what responses are sampled from.
        processes: the group that shares the work.
        on_stored: called with the number of shards on disk.

    Yields:
        The rollouts of a shard, without states, as stored.

    Raises:
        CriticError: if the critic is attached to another policy, or does not fit this one.
        DataError: if a shard cannot be read.
        ProcessError: if another process has stopped.
    """
    shards = plan.shards(settings.shard_size)
    paths = [folder / f"shard-{index:05d}.safetensors" for index in range(len(shards))]

    def store(index: int) -> None:
        shard, recorder = shards[index], _Recorder(critic, top_k, settings.temperature)
        seed = shard_seed(settings.seed, shard.digest(), index)
        with critic.attached_to(policy):
            prompt_ids, response_ids = sample(
                policy, tokenizer, shard.prompts, settings, seed, top_k=settings.top_k, processors=[recorder]
            )
        recordings = recorder.recordings(Sequences.pack(prompt_ids, response_ids))
        with atomic_file(paths[index]) as temporary:
            save_tensors(vars(recordings), temporary)

    for index in store_missing(paths, store, processes, on_stored):
        yield _read(paths[index], len(shards[index].prompts))


class _Recorder(LogitsProcessor):
    """Records a critic's values of the candidates at every step; the scores pass through unchanged."""

    def __init__(self, critic: Critic, top_k: int, temperature: float) -> None:
        self._critic, self._top_k, self._temperature = critic, top_k, temperature
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits, ids = top_candidates(scores.float(), self._top_k)
        logprobs = torch.log_softmax(logits / self._temperature, dim=-1)
        self._steps.append((ids, logprobs, self._critic.values(input_ids, ids)))
        return scores

    def recordings(self, sequences: Sequences) -> Recordings:
        """Pair the recorded values with the responses; what follows a response's end is 0."""
        is_response = sequences.is_response
        rows, steps = is_response.shape
        ids, logprobs, values = (torch.stack(column[:steps], dim=1).cpu() for column in zip(*self._steps, strict=True))
        is_padding = ~is_response[:, :, None]
        return Recordings(
            prompt_ids=sequences.ids[:, :-steps],
            is_prompt=sequences.is_token[:, :-steps],
            states=torch.zeros(rows, steps, 0),
            action_ids=sequences.ids[:, -steps:],
            is_response=is_response,
            candidate_ids=ids.int().masked_fill(is_padding, 0),
            logprobs=logprobs.masked_fill(is_padding, 0.0),
            values=values.masked_fill(is_padding[..., None], 0.0),
        )


def _read(path: Path, rows: int) -> Recordings:
    try:
        recordings = Recordings(**load_tensors(path))
        if len(recordings) != rows:
            raise ValueError(f"it has {len(recordings)} rows instead of {rows}.")
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"shard {str(path)!r} cannot be read: {reason}", "delete it and rerun: it is sampled again."
        ) from error
    return recordings
