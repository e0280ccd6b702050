"""One row of a report: what a group of responses earned, what it cost, and what it reads like."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mavis.critics import Critic
from mavis.evaluation.statistics import distinct_2, mean_and_stderr
from mavis.rewards import Objective, score
from mavis.rollouts.replay import Sequences, replay


class RowMaker:
    """Turns a group of responses, equally many for each prompt and those of one prompt together, into a row.

    Args:
        policy: the reference policy.
        critic: gives the objectives' names and their normalisation.
        held_out: objectives that nobody optimised, by name.
        prompts: P, how many prompts each group answers.
        samples: responses per prompt that a point of the sweep has.
        temperature: T of the policy whose perplexity is told.
    """

    def __init__(
        self,
        policy: Any,
        critic: Critic,
        held_out: dict[str, Objective],
        *,
        prompts: int,
        samples: int,
        temperature: float,
    ) -> None:
        self.policy, self.critic, self.held_out, self.prompts = policy, critic, held_out, prompts
        self.temperature, self.samples = temperature, samples

    def row(
        self,
        columns: dict[str, list[Any]],
        where: slice,
        weights: Tensor | None,
        beta: float,
        speed: dict[str, Any],
    ) -> dict[str, Any]:
        """Summarise a group.

        Args:
            columns: of all rollouts, as `collect` stores them.
            where: which of them are the group.
            weights: (M,), or None for the reference policy.
            beta: of the group, 0 for the reference policy.
            speed: of tilted and plain decoding, from `compare_speed`.

        Returns:
            The row.
        """
        group = {name: values[where] for name, values in columns.items()}
        names = self.critic.objectives
        rewards = self.critic.normalise(torch.tensor(group["rewards"], dtype=torch.float64)).numpy()
        summary = [self._summary(column) for column in rewards.T]
        kl, kl_stderr = self._summary([sum(row) for row in group["kl"]])
        lengths = [len(row) for row in group["response_ids"]]
        row: dict[str, Any] = {
            "weights": dict(zip(names, weights.tolist() if weights is not None else [0.0] * len(names), strict=True)),
            "beta": float(beta),
            "rewards": dict(zip(names, (mean for mean, _ in summary), strict=True)),
            "rewards_stderr": dict(zip(names, (stderr for _, stderr in summary), strict=True)),
            "kl": kl,
            "kl_stderr": kl_stderr,
            "efficiency": None,
            "responses": len(lengths),
            "length": float(np.mean(lengths)),
            "distinct_2": distinct_2(self._first_of_each_prompt(group["response"])),
            "perplexity": self._perplexity(group),
            "tokens_per_second": speed.get("tilted" if beta else "plain", {}).get("tokens_per_second"),
        }
        if self.held_out:
            raw = score(self.held_out, group["prompt"], group["response"])
            figures = [self._summary(column) for column in raw.T]
            row["held_out"] = dict(zip(self.held_out, (mean for mean, _ in figures), strict=True))
            row["held_out_stderr"] = dict(zip(self.held_out, (stderr for _, stderr in figures), strict=True))
        return row

    def _first_of_each_prompt(self, texts: list[str]) -> list[str]:
        """As many responses per prompt as a point of the sweep has: more text has a smaller share of new bigrams."""
        each = len(texts) // self.prompts
        return [text for start in range(0, len(texts), each) for text in texts[start : start + self.samples]]

    def _summary(self, values: ArrayLike) -> tuple[float, float | None]:
        """Mean over the given prompts and its standard error, which is that of the sampling: the prompts are no sample.

        stderr² = Σ_p var_p / n / P²,   n responses to each of P prompts
        """
        by_prompt = np.asarray(values, dtype=np.float64).reshape(self.prompts, -1)
        summaries = [mean_and_stderr(row) for row in by_prompt]
        errors = [error for _, error in summaries if error is not None]
        stderr = math.sqrt(sum(error**2 for error in errors)) / self.prompts if len(errors) == self.prompts else None
        return float(by_prompt.mean()), stderr

    def _perplexity(self, group: dict[str, list[Any]], most: int = 192) -> float | None:
        """exp of the mean −log π_ref per response token, on at most so many responses, evenly spaced."""
        step = math.ceil(len(group["prompt_ids"]) / most)
        pairs = [(p, r) for p, r in zip(group["prompt_ids"][::step], group["response_ids"][::step], strict=True) if r]
        total, count = 0.0, 0
        table = torch.zeros(self.critic.fingerprint.vocab_size, 1)
        for at in range(0, len(pairs), 64):
            prompts, responses = zip(*pairs[at : at + 64], strict=True)
            steps = replay(
                self.policy,
                Sequences.pack(prompts, responses),
                table,
                top_k=None,
                temperature=self.temperature,
            )
            total += float(steps.reference_logprobs.double().sum())
            count += int(steps.is_response.sum())
        return float(np.exp(-total / count)) if count else None
