"""From reward differences to preference weights with intervals, and to the pair that would tell most."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mavis.errors import PreferenceError
from mavis.math.bradley_terry import information_gain, posterior_draws

LEVEL = 0.95
"""The share of users whose weight lies in its interval."""


@dataclass(frozen=True)
class InferredWeights:
    """What is known of a user's preference weights after some choices.

    The model of the user is P(chosen ≻ rejected) = σ(w · d), d the difference of the normalised rewards, so `weights`
    holds the user's decisiveness too: it comes in logits per standard deviation of reward. As it is, it belongs with
    `beta=1`: between two responses that the reference policy finds equally likely, the optimal policy is then exactly
    as undecided as the user. Mostly the strength is to be chosen by itself, by `beta` or `target_kl`: then take
    `normalised()`.

    Args:
        weights: by objective, the mean over all weights that fit the choices.
        low: by objective, the lower end of the 95 % interval.
        high: by objective, the upper end.
        covariance: (M, M) float64, of the weights that fit.
        pairs: N, the number of choices.
        untold: objectives on which no pair differs: of their weights nothing is known beyond what is assumed of every
            user, so their intervals stay as wide as they were.
    """

    weights: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    covariance: Tensor
    pairs: int
    untold: tuple[str, ...]

    def normalised(self) -> dict[str, float]:
        """Scale the weights to Σ_m |w_m| = 1, which leaves the strength to `beta` or `target_kl`."""
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
            "untold": list(self.untold),
        }


def infer_weights(differences: Tensor, objectives: Sequence[str]) -> InferredWeights:
    """Infer a user's preference weights from choices between two responses.

        P(chosen ≻ rejected) = σ(w · d),   w ~ N(0, s² I),   s one of ½, 1, 2, 4

    Beforehand a weight may have either sign and nothing is known of its size but that it is moderate; see
    `mavis.math.bradley_terry`. A choice of "equal" is left out.

    Args:
        differences: (N, M) finite, R(chosen) − R(rejected) in normalised rewards, from `reward_differences`; N ≥ 1.
        objectives: M names, in the order of the columns.

    Returns:
        Weights with 95 % intervals; the same for the same choices.

    Raises:
        PreferenceError: if there is no pair, none differs on any objective, a number is not finite, or there are not M
            distinct names.

    Source: Bradley & Terry 1952, "Rank Analysis of Incomplete Block Designs".
    """
    names = [objectives] if isinstance(objectives, str) else list(objectives)
    if differences.dim() != 2 or differences.shape[1] != len(names) or len(set(names)) != len(names):
        raise PreferenceError(
            f"differences has shape {tuple(differences.shape)}, but objectives is {names}.",
            "give one row per pair and one column per objective, and every objective once.",
        )
    if not len(differences):
        raise PreferenceError("differences holds no pair.", "weights take at least one choice; ten are a good start.")
    draws = posterior_draws(differences)
    is_told = (differences != 0).any(dim=0).cpu()
    if not bool(is_told.any()):
        raise PreferenceError(
            f"none of the {len(differences)} pairs differs on any objective ({', '.join(names)}).",
            "ask about responses that earn different rewards.",
        )
    # Either sign of an untold weight fits equally well, so its mean is 0; what the draws make of that is noise.
    weights = torch.where(is_told, draws.mean(0), 0.0)
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(draws, tails, dim=0).tolist()
    return InferredWeights(
        weights=dict(zip(names, weights.tolist(), strict=True)),
        low=dict(zip(names, low, strict=True)),
        high=dict(zip(names, high, strict=True)),
        covariance=torch.cov(draws.T).reshape(len(names), len(names)),
        pairs=len(differences),
        untold=tuple(name for name, told in zip(names, is_told.tolist(), strict=True) if not told),
    )


def next_pair(candidates: Tensor, answered: Tensor, asked: Collection[int] = ()) -> int:
    """Choose the pair whose answer is expected to tell most of the weights.

        argmax_i I(answer to i; w | choices)

    Args:
        candidates: (P, M) finite, reward differences of the pairs that can be asked about; the sign does not matter.
        answered: (N, M) finite, R(chosen) − R(rejected) of the choices so far; N may be 0.
        asked: indices of candidates that are not to be asked about again.

    Returns:
        The index of a candidate that is not in `asked`; the first of equals.

    Raises:
        PreferenceError: if no candidate is left, or a table is not finite or not of M columns.

    Source: Houlsby et al. 2011, "Bayesian Active Learning for Classification and Preference Learning".
    """
    if len(set(asked)) >= len(candidates):
        raise PreferenceError(
            f"all {len(candidates)} candidate pairs have been asked about.", "draw candidates for more prompts."
        )
    gains = information_gain(candidates, posterior_draws(answered))
    gains[list(asked)] = -torch.inf
    return int(gains.argmax())
