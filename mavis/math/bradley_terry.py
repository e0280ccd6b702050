"""What a user's choices between two responses tell of the user's preference weights, and which choice would tell most.

A user with weights w is taken to choose at random, the more surely the further apart the weighted rewards are:

    P(chosen ≻ rejected) = σ(w · d),   d = R(chosen) − R(rejected)

so w comes in logits per unit of reward and holds two things: what the user cares for, its direction, and how decisive
the user is, its length. Nobody knows the second beforehand, so the prior is a mixture over `SPREADS`:

    p(w) = mean over s in SPREADS of N(w; 0, s² I)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mavis.errors import PreferenceError

SPREADS = (0.5, 1.0, 2.0, 4.0)
"""How far a user's weights may spread about 0, in logits per unit of reward, all equally likely beforehand.

At a weight of ½ a response that is one unit better is chosen in six cases of ten, at 4 in 98 of a hundred.
"""

_DRAWS = 4096
_ENOUGH = 2048  # effective draws; the mean is then off by a fiftieth of the posterior's own spread
_LEAST = 400  # below which means and intervals would rest on a few draws
_MOST = 64  # times as many draws at most; a dozen objectives and ten pairs take that many
_LARGEST = 1e6  # of numbers in standard deviations, far beyond any that is meant
_FREEDOM = 4  # of the proposal's Student tails: heavier than any posterior's, which are those of a normal distribution


def map_weights(differences: Tensor, spread: float) -> tuple[Tensor, Tensor]:
    """Find the likeliest weights under a normal prior of one spread, and Laplace's covariance about them.

        ŵ = argmin_w  Σ_n log(1 + exp(−w · d_n)) + |w|² / (2 s²),   Σ = (Σ_n p_n (1 − p_n) d_n d_nᵀ + I / s²)⁻¹

    The sum is strictly convex, so there is one minimum, and Newton's method with halved steps reaches it.

    Args:
        differences: (N, M) finite, R(chosen) − R(rejected), one row per choice; N may be 0.
        spread: s > 0, in logits per unit of reward.

    Returns:
        ŵ (M,) and Σ (M, M), float64.

    Raises:
        PreferenceError: if `differences` is not (N, M) and finite.

    Source: Bradley & Terry 1952; MacKay 1992, "The Evidence Framework Applied to Classification Networks".
    """
    rows = _checked("differences", differences)
    precision = torch.eye(rows.shape[1], dtype=torch.float64) / spread**2

    def loss(weights: Tensor) -> Tensor:
        return F.softplus(-rows @ weights).sum() + weights @ precision @ weights / 2

    def hessian(weights: Tensor) -> Tensor:
        chance = torch.sigmoid(rows @ weights)
        return rows.T @ (rows * (chance * (1 - chance))[:, None]) + precision

    weights = torch.zeros(rows.shape[1], dtype=torch.float64)
    for _ in range(100):
        gradient = precision @ weights - rows.T @ torch.sigmoid(-rows @ weights)
        step = torch.linalg.solve(hessian(weights), gradient)
        slope = gradient @ step
        if slope > 1e-14:  # else the full step is the last, and what is left after it is rounding
            while loss(weights - step) > loss(weights) - slope / 4:
                step, slope = step / 2, slope / 2
            weights = weights - step
            continue
        weights = weights - step
        break
    return weights, torch.linalg.inv(hessian(weights))


def posterior_draws(differences: Tensor) -> Tensor:
    """Draw weights from what is known of them after some choices.

        p(w | choices) ∝ p(w) · Π_n σ(w · d_n)

    by importance sampling from Student distributions about `map_weights` of every spread, and resampling. Laplace's
    normal approximation alone has intervals that are too narrow after a handful of choices: such posteriors are skew.

    Args:
        differences: (N, M) finite, R(chosen) − R(rejected), one row per choice; N = 0 draws from the prior.

    Returns:
        (4096, M) float64, equally likely; the same for the same choices.

    Raises:
        PreferenceError: if `differences` is not (N, M) and finite, or there are too many objectives to draw for: with
            ten choices that can be so from about 16 on.

    Source: Rubin 1988, "Using the SIR Algorithm to Simulate Posterior Distributions".
    """
    rows = _checked("differences", differences)
    modes = [map_weights(rows, spread) for spread in SPREADS]
    draws, times = _DRAWS, 1
    while True:
        weights, log_density = _proposed(modes, draws * times)
        surprise = torch.cat([F.softplus(-rows @ part.T).sum(0) for part in weights.split(_DRAWS)])
        shares = torch.softmax(_log_prior(weights) - surprise - log_density, dim=0)
        effective = float(1 / shares.square().sum())
        if times >= _MOST or effective >= _ENOUGH:
            break
        times *= 2
    if effective < _LEAST:
        raise PreferenceError(
            f"differences has {rows.shape[1]} objectives, of whose weights only {effective:.0f} effective draws were "
            f"found, expected at least {_LEAST}.",
            "give fewer objectives.",
        )
    ladder = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    return weights[torch.searchsorted(shares.cumsum(0), ladder).clamp_max(len(weights) - 1)]


def information_gain(candidates: Tensor, draws: Tensor) -> Tensor:
    """Compute how much the answer to each candidate pair is expected to tell of the weights.

        I(answer; w) = H(E_w[p]) − E_w[H(p)],   p = σ(w · d),   H(p) = −p log p − (1 − p) log(1 − p)

    It is small where the answer is known beforehand, and where it is a coin toss whatever the weights.

    Args:
        candidates: (P, M) finite, reward differences of the pairs; which of the two comes first does not matter.
        draws: (S, M) finite, weights from `posterior_draws`.

    Returns:
        (P,) float64 in nats, from 0 to log 2 up to rounding.

    Raises:
        PreferenceError: if one of them is not a finite matrix, or they disagree about M.

    Source: Houlsby et al. 2011, "Bayesian Active Learning for Classification and Preference Learning".
    """
    rows, weights = _checked("candidates", candidates), _checked("draws", draws)
    if rows.shape[1] != weights.shape[1]:
        raise PreferenceError(
            f"candidates has {rows.shape[1]} columns, but the weights are of {weights.shape[1]} objectives.",
            "give a reward difference for every objective, in the order of the weights.",
        )
    gains = []
    for part in rows.split(32):  # of which a table by all draws fits the processor's cache: three times as fast
        logits = part @ weights.T
        chance = torch.sigmoid(logits)
        mean = chance.mean(1)
        entropy_of_mean = -torch.xlogy(mean, mean) - torch.xlogy(1 - mean, 1 - mean)
        gains.append(entropy_of_mean - (F.softplus(logits) - logits * chance).mean(1))
    return torch.cat(gains)


def _log_prior(weights: Tensor) -> Tensor:
    """log p(w) of rows (S, M), up to a constant."""
    spreads = torch.tensor(SPREADS, dtype=torch.float64)
    squares = weights.square().sum(1, keepdim=True)
    return torch.logsumexp(-squares / (2 * spreads**2) - weights.shape[1] * spreads.log(), dim=1)


def _proposed(modes: list[tuple[Tensor, Tensor]], draws: int) -> tuple[Tensor, Tensor]:
    """Draw equally often from a Student distribution about each mode; returns (S, M) and the log density (S,)."""
    size = len(modes[0][0])
    each = draws // len(modes)
    generator = torch.Generator().manual_seed(0)
    roots = [torch.linalg.cholesky(covariance) for _, covariance in modes]
    drawn = []
    for (mode, _), root in zip(modes, roots, strict=True):
        normal = torch.randn(each, size, generator=generator, dtype=torch.float64)
        # χ² with 2k degrees of freedom is twice the sum of k exponentials.
        chi = 2 * torch.empty(each, _FREEDOM // 2, dtype=torch.float64).exponential_(generator=generator).sum(1)
        drawn.append(mode + (normal * (_FREEDOM / chi).sqrt()[:, None]) @ root.T)
    weights = torch.cat(drawn)
    densities = []
    for (mode, _), root in zip(modes, roots, strict=True):
        squares = torch.linalg.solve_triangular(root, (weights - mode).T, upper=False).square().sum(0)
        densities.append(-(_FREEDOM + size) / 2 * torch.log1p(squares / _FREEDOM) - root.diagonal().log().sum())
    return weights, torch.logsumexp(torch.stack(densities), dim=0)


def _checked(name: str, rows: Tensor) -> Tensor:
    if rows.dim() != 2 or not rows.shape[1]:
        raise PreferenceError(
            f"{name} has shape {tuple(rows.shape)}, expected one row per pair and one column per objective.",
            "one pair of two objectives has shape (1, 2).",
        )
    table = rows.detach().to("cpu", torch.float64)
    bad = (~table.isfinite()).nonzero().tolist()
    if bad:
        row, column = bad[0]
        raise PreferenceError(
            f"{name} is {table[row, column].item()} in row {row}, column {column}, expected finite numbers.",
            "leave out pairs whose rewards cannot be measured.",
        )
    large = (table.abs() >= _LARGEST).nonzero().tolist()
    if large:
        row, column = large[0]
        raise PreferenceError(
            f"{name} is {table[row, column].item()} in row {row}, column {column}, expected less than {_LARGEST:.0f}: "
            "its unit is a standard deviation.",
            "look for mistakes in the rewards and in what they are normalised by.",
        )
    return table
