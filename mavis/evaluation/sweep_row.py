"""One row of an evaluation: what a group of responses earned, what it cost, and how it reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mavis.critics import Critic
from mavis.evaluation.statistics import distinct_2, mean_and_stderr
from mavis.rewards import Objective, score
from mavis.rollouts.replay import Sequences, replay

_REPLAY_ROWS = 64
_PERPLEXITY_RESPONSES = 192


@dataclass(frozen=True)
class SweepRow:
    """Metrics of the responses at one choice of weights and β.

    Standard errors are those of the sampling, with the prompts held fixed; None for one response per prompt.

    Attributes:
        weights: preference weights by objective; all 0 for the reference policy.
        beta: tilt strength in 1 / reward; 0 for the reference policy.
        rewards: mean normalised reward by objective.
        rewards_stderr: its standard error.
        kl: KL to the reference policy, in nats per response.
        kl_stderr: its standard error.
        efficiency: frontier efficiency at `kl`; None where it cannot be measured.
        responses: number of responses.
        length: mean length in tokens.
        distinct_2: share of distinct bigrams, over equally many responses per prompt in every row.
        perplexity: of the responses under the reference policy; None if they are all empty.
        tokens_per_second: decoding speed; None if it was not measured.
        held_out: mean raw reward by held-out objective; None without any.
        held_out_stderr: its standard error.

    Examples:
        >>> from mavis.evaluation import SweepRow
        >>> row = SweepRow(
        ...     weights={"helpful": 0.5, "harmless": 0.5}, beta=2.0, rewards={"helpful": 0.4, "harmless": 0.8},
        ...     rewards_stderr={"helpful": 0.1, "harmless": 0.1}, kl=1.2, kl_stderr=0.1, efficiency=0.7, responses=64,
        ...     length=31.5, distinct_2=0.9, perplexity=12.0, tokens_per_second=None,
        ... )
        >>> round(row.weighted_reward([0.5, 0.5]), 3)
        0.6
    """

    weights: dict[str, float]
    beta: float
    rewards: dict[str, float]
    rewards_stderr: dict[str, float | None]
    kl: float
    kl_stderr: float | None
    efficiency: float | None
    responses: int
    length: float
    distinct_2: float
    perplexity: float | None
    tokens_per_second: float | None
    held_out: dict[str, float] | None = None
    held_out_stderr: dict[str, float | None] | None = None

    def weighted_reward(self, weights: Iterable[float]) -> float:
        """Compute w·R for M weights in the order of the objectives."""
        return float(sum(w * reward for w, reward in zip(weights, self.rewards.values(), strict=True)))

    def to_json(self) -> dict[str, Any]:
        """Return plain data, without held-out objectives if there are none."""
        data = asdict(self)
        if self.held_out is None:
            del data["held_out"], data["held_out_stderr"]
        return data


class RowBuilder:
    """Summarises groups of responses, each with equally many consecutive responses per prompt.

    Args:
        policy: the reference policy.
        critic: names the objectives and normalises their rewards.
        held_out: objectives that were not optimised, by name.
        prompts: P, the number of prompts in each group.
        samples: responses per prompt at a point of the sweep.
        temperature: T of the policy whose perplexity is computed.
        min_new_tokens: how many of a response's first tokens this policy cannot end.
    """

    def __init__(
        self,
        policy: Any,
        critic: Critic,
        held_out: Mapping[str, Objective],
        *,
        prompts: int,
        samples: int,
        temperature: float,
        min_new_tokens: int = 0,
    ) -> None:
        self.policy, self.critic, self.held_out, self.prompts = policy, critic, held_out, prompts
        self.temperature, self.samples, self.min_new_tokens = temperature, samples, min_new_tokens

    def build(
        self,
        columns: Mapping[str, list[Any]],
        rows: slice = slice(None),
        weights: Tensor | None = None,
        beta: float = 0.0,
        speed: Mapping[str, Any] | None = None,
    ) -> SweepRow:
        """Summarise a group.

        Args:
            columns: of all rollouts, as `collect` stores them.
            rows: the rollouts that make up the group.
            weights: (M,), or None for the reference policy.
            beta: of the group, 0 for the reference policy.
            speed: of tilted and plain decoding, from `measure_speed`.

        Returns:
            The row, without its efficiency.
        """
        group = {name: values[rows] for name, values in columns.items()}
        names = self.critic.objectives
        rewards = self.critic.normalise(torch.tensor(group["rewards"], dtype=torch.float64)).numpy()
        means, stderrs = self._summaries(names, rewards.T)
        kl, kl_stderr = self._summary([sum(steps) for steps in group["kl"]])
        lengths = [len(ids) for ids in group["response_ids"]]
        held_out, held_out_stderr = None, None
        if self.held_out:
            raw = score(self.held_out, group["prompt"], group["response"])
            held_out, held_out_stderr = self._summaries(self.held_out, raw.T)
        return SweepRow(
            weights=dict(zip(names, weights.tolist() if weights is not None else [0.0] * len(names), strict=True)),
            beta=float(beta),
            rewards=means,
            rewards_stderr=stderrs,
            kl=kl,
            kl_stderr=kl_stderr,
            efficiency=None,
            responses=len(lengths),
            length=float(np.mean(lengths)),
            distinct_2=distinct_2(self._first_of_each_prompt(group["response"])),
            perplexity=self._perplexity(group["prompt_ids"], group["response_ids"]),
            tokens_per_second=(speed or {}).get("tilted" if beta else "plain", {}).get("tokens_per_second"),
            held_out=held_out,
            held_out_stderr=held_out_stderr,
        )

    def _first_of_each_prompt(self, texts: list[str]) -> list[str]:
        """Take `samples` responses per prompt: the share of distinct bigrams falls as text grows."""
        each = len(texts) // self.prompts
        return [text for start in range(0, len(texts), each) for text in texts[start : start + self.samples]]

    def _summaries(
        self, names: Iterable[str], columns: Iterable[ArrayLike]
    ) -> tuple[dict[str, float], dict[str, float | None]]:
        summaries = {name: self._summary(column) for name, column in zip(names, columns, strict=True)}
        return {name: mean for name, (mean, _) in summaries.items()}, {
            name: stderr for name, (_, stderr) in summaries.items()
        }

    def _summary(self, values: ArrayLike) -> tuple[float, float | None]:
        """Compute the mean over the given prompts and its standard error, which is that of the sampling alone.

        stderr² = Σ_p var_p / n / P²,   n responses to each of P prompts
        """
        by_prompt = np.asarray(values, dtype=np.float64).reshape(self.prompts, -1)
        summaries = [mean_and_stderr(row) for row in by_prompt]
        errors = [error for _, error in summaries if error is not None]
        stderr = math.sqrt(sum(error**2 for error in errors)) / self.prompts if len(errors) == self.prompts else None
        return float(by_prompt.mean()), stderr

    def _perplexity(self, prompt_ids: list[list[int]], response_ids: list[list[int]]) -> float | None:
        """Compute exp of the mean −log π_ref per response token, on an evenly spaced subset of the responses."""
        step = math.ceil(len(prompt_ids) / _PERPLEXITY_RESPONSES)
        pairs = [(p, r) for p, r in zip(prompt_ids[::step], response_ids[::step], strict=True) if r]
        total, count = 0.0, 0
        # `replay` averages a table over tokens; nothing is read from this one.
        table = torch.zeros(self.critic.fingerprint.vocab_size, 1)
        for start in range(0, len(pairs), _REPLAY_ROWS):
            prompts, responses = zip(*pairs[start : start + _REPLAY_ROWS], strict=True)
            sequences = Sequences.pack(prompts, responses)
            steps = replay(
                self.policy,
                sequences,
                table,
                top_k=None,
                temperature=self.temperature,
                min_new_tokens=self.min_new_tokens,
            )
            total += float(steps.reference_logprobs.double().sum())
            count += int(steps.is_response.sum())
        return float(np.exp(-total / count)) if count else None
