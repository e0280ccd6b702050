"""The inputs of the fit: all rollouts, replayed, as tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mavis.critics.head_critic import HeadCritic
from mavis.distributed import SINGLE_PROCESS, ProcessGroup
from mavis.rollouts.replay import ROWS_PER_PASS, Sequences, forward_sequences, replay
from mavis.rollouts.sampling import RolloutSettings
from mavis.training.rollout_tensors import RolloutTensors, ShardedRollouts, concatenate_rollouts, shard_indices


@dataclass(frozen=True)
class Features(RolloutTensors):
    """N replayed rollouts with their rewards; see `RolloutTensors`.

    Args:
        expected: (N, T, E) float32, E_{a∼π}[e_a] under the evaluated policy; E is 0 for plain Monte Carlo returns,
            which do not need it.
        kl: (N, T) float32, KL of that policy to the reference in nats, 0 after the end.
        rewards: (N, M) float32, normalised.
        lam: (N, M) float32, the λ of the evaluated policy, which a conditioned critic reads.
        is_evaluated: (N, M) bool, True where the rollout teaches the value of objective m: under `independent`, only
            rollouts of that objective's own policy do.
    """

    expected: Tensor
    kl: Tensor
    rewards: Tensor
    lam: Tensor
    is_evaluated: Tensor

    per_sequence = ("rewards", "lam", "is_evaluated")


def extract(
    policy: Any,
    shards: Iterable[Any],
    embeddings: Tensor,
    critic: HeadCritic,
    settings: RolloutSettings,
    *,
    tilted: bool,
    expectations: bool = True,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> ShardedRollouts[Features]:
    """Replay this process's share of rollouts under the policies of their λ.

    Args:
        policy: the reference policy.
        shards: from `collect`.
        embeddings: (V, E) float32, the e_a of `token_embeddings`.
        critic: gives the normalisation and, where `tilted`, the tilt.
        settings: that the rollouts were sampled with.
        tilted: whether the evaluated policy is tilted by the critic as it is now; else it is the reference policy. It
            may differ from the policy that sampled the rollouts.
        expectations: whether to compute the expected embeddings that return decomposition needs. Without them the KL
            is the recorded one, of the policy that sampled.
        processes: the group that shares the work; all processes pass the same shards.

    Returns:
        The features of all rollouts that have at least one response token.

    Raises:
        ConfigError: if there are fewer rollouts than processes.
    """
    parts: list[Features] = []
    total = 0
    for shard in shards:
        nonempty = [i for i, ids in enumerate(shard["response_ids"]) if ids]
        shard = shard.select(processes.shard(nonempty, before=total))
        total += len(nonempty)
        for start in range(0, len(shard), ROWS_PER_PASS):
            rows = shard[start : start + ROWS_PER_PASS]
            weights = torch.tensor(rows["weights"], dtype=torch.float64)
            lam = torch.tensor(rows["beta"], dtype=torch.float64)[:, None] * weights
            sequences = Sequences.pack(rows["prompt_ids"], rows["response_ids"])
            prompt_length = sequences.ids.shape[1] - sequences.is_response.shape[1]
            if expectations:
                steps = replay(
                    policy,
                    sequences,
                    embeddings,
                    critic=critic if tilted else None,
                    lam=lam.float(),
                    top_k=settings.top_k,
                    temperature=settings.temperature,
                    min_new_tokens=settings.min_new_tokens,
                )
                states, expected, kl = steps.states.cpu(), steps.expected.cpu(), steps.kl.cpu()
            else:
                kl = _per_step(rows["kl"], sequences.is_response.shape[1])
                states = expected = kl.new_zeros(*kl.shape, 0)
                if critic.reads_states:
                    states = forward_sequences(policy, sequences)[0].cpu()
            parts.append(
                Features(
                    prompt_ids=sequences.ids[:, :prompt_length],
                    is_prompt=sequences.is_token[:, :prompt_length],
                    states=states if critic.reads_states else states[..., :0],
                    action_ids=sequences.ids[:, prompt_length:],
                    expected=expected,
                    kl=kl,
                    is_response=sequences.is_response,
                    rewards=critic.normalise(torch.tensor(rows["rewards"], dtype=torch.float64)).float(),
                    lam=lam.float(),
                    is_evaluated=weights != 0
                    if tilted and not critic.conditioned
                    else torch.ones_like(weights, dtype=torch.bool),
                )
            )
    local_indices = shard_indices(total, processes)
    return ShardedRollouts(concatenate_rollouts(parts), local_indices, total, processes)


def _per_step(rows: list[list[float]], length: int) -> Tensor:
    return torch.stack([F.pad(torch.tensor(row, dtype=torch.float32), (0, length - len(row))) for row in rows])
