"""Inference of preference weights from choices, and selection of the next question."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mavis.errors import PreferenceError
from mavis.math.bradley_terry import information_gain, posterior_draws

LEVEL = 0.95
"""Credibility of the intervals."""


@dataclass(frozen=True)
class InferredWeights:
    """The posterior of a user's preference weights given some choices.

    The user is modelled by P(chosen ≻ rejected) = σ(w · d), with d the difference of the normalised rewards. So
    `weights`, in logits per standard deviation of reward, includes how decisive the user is, and belongs with
    `beta=1`: between two responses that are equally likely under the reference policy, the optimal policy is then
    exactly as undecided as the user. To choose the strength separately, by `beta` or `target_kl`, use `normalised()`.

    Attributes:
        weights: posterior mean by objective.
        low: lower end of the 95 % credible interval by objective.
        high: upper end.
        covariance: (M, M) float64, of the posterior.
        pairs: N, the number of choices.
        undetermined: objectives on which no pair differs; their intervals are those of the prior.

    Examples:
        >>> import torch
        >>> from mavis.preference import infer_weights
        >>> inferred = infer_weights(torch.tensor([[1.5, 0.0], [1.0, 0.0]]), ["helpful", "harmless"])
        >>> inferred.normalised(), inferred.undetermined
        ({'helpful': 1.0, 'harmless': 0.0}, ('harmless',))
    """

    weights: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    covariance: Tensor
    pairs: int
    undetermined: tuple[str, ...]

    def normalised(self) -> dict[str, float]:
        """Scale the weights to Σ_m |w_m| = 1, leaving the strength to `beta` or `target_kl`."""
        total = sum(abs(weight) for weight in self.weights.values()) or 1.0
        return {name: weight / total for name, weight in self.weights.items()}

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "weights": self.weights,
            "low": self.low,
            "high": self.high,
            "level": LEVEL,
            "normalised": self.normalised(),
            "covariance": self.covariance.tolist(),
            "pairs": self.pairs,
            "undetermined": list(self.undetermined),
        }


def infer_weights(differences: Tensor, objectives: Sequence[str]) -> InferredWeights:
    """Infer a user's preference weights from choices between two responses.

        P(chosen ≻ rejected) = σ(w · d),   w ~ N(0, s² I),   s one of ½, 1, 2, 4

    A priori a weight may have either sign and is of moderate size; see `mavis.math.bradley_terry`. Leave out pairs
    that the user found equal.

    Args:
        differences: (N, M) finite, R(chosen) − R(rejected) in normalised rewards, from `reward_differences`; N ≥ 1.
        objectives: M names, in the order of the columns.

    Returns:
        Weights with 95 % intervals, deterministic for given choices.

    Raises:
        PreferenceError: if there is no pair, none differs on any objective, a number is not finite, or there are not M
            distinct names.

    Source: Bradley & Terry 1952, "Rank Analysis of Incomplete Block Designs".

    Examples:
        >>> import torch
        >>> from mavis.preference import infer_weights
        >>> differences = torch.tensor([[1.5, -0.5], [1.0, 0.5], [2.0, -1.0], [0.5, 1.5]])
        >>> inferred = infer_weights(differences, ["helpful", "harmless"])
        >>> {name: weight > 0 for name, weight in inferred.weights.items()}
        {'helpful': True, 'harmless': True}
        >>> inferred.low["helpful"] < inferred.weights["helpful"] < inferred.high["helpful"]
        True
    """
    names = [objectives] if isinstance(objectives, str) else list(objectives)
    if differences.dim() != 2 or differences.shape[1] != len(names) or len(set(names)) != len(names):
        raise PreferenceError(
            f"differences has shape {tuple(differences.shape)}, but objectives is {names}.",
            "give one row per pair and one column per objective, and every objective once.",
        )
    if not len(differences):
        raise PreferenceError("differences has no rows, expected ≥ 1 pair.", "about ten choices are a good start.")
    draws = posterior_draws(differences)
    is_determined = (differences != 0).any(dim=0).cpu()
    if not bool(is_determined.any()):
        raise PreferenceError(
            f"none of the {len(differences)} pairs differs on any objective ({', '.join(names)}).",
            "ask about responses with different rewards.",
        )
    # By symmetry the posterior mean of an undetermined weight is 0; the mean of the draws would be noise.
    weights = torch.where(is_determined, draws.mean(0), 0.0)
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(draws, tails, dim=0).tolist()
    return InferredWeights(
        weights=dict(zip(names, weights.tolist(), strict=True)),
        low=dict(zip(names, low, strict=True)),
        high=dict(zip(names, high, strict=True)),
        covariance=torch.cov(draws.T).reshape(len(names), len(names)),
        pairs=len(differences),
        undetermined=tuple(
            name for name, determined in zip(names, is_determined.tolist(), strict=True) if not determined
        ),
    )


def next_pair(candidates: Tensor, answered: Tensor, asked: Collection[int] = ()) -> int:
    """Choose the pair whose answer is expected to be most informative about the weights.

        argmax_i I(answer to i; w | choices)

    Args:
        candidates: (P, M) finite, reward differences of the pairs to choose from; the sign does not matter.
        answered: (N, M) finite, R(chosen) − R(rejected) of the choices so far; N may be 0.
        asked: indices of candidates to skip, as they were asked before.

    Returns:
        The index of a candidate that is not in `asked`; the first in a tie.

    Raises:
        PreferenceError: if no candidate is left, or a table is not finite or not of M columns.

    Source: Houlsby et al. 2011, "Bayesian Active Learning for Classification and Preference Learning".

    Examples:
        The choices so far say much about the first weight and nothing about the second:

        >>> import torch
        >>> from mavis.preference import next_pair
        >>> next_pair(torch.tensor([[1.5, 0.0], [0.0, 1.5]]), answered=torch.tensor([[1.5, 0.0]] * 8))
        1
    """
    if len(set(asked)) >= len(candidates):
        raise PreferenceError(
            f"all {len(candidates)} candidate pairs have been asked about.", "sample candidates for more prompts."
        )
    gains = information_gain(candidates, posterior_draws(answered))
    gains[list(asked)] = -torch.inf
    return int(gains.argmax())
