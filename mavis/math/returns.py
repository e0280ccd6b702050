"""What the rest of a response earns, seen from each of its tokens."""

from __future__ import annotations

from torch import Tensor


def reverse_cumsum_exclusive(steps: Tensor) -> Tensor:
    """Sum what comes strictly after each step.

        later_t = Σ_{t' > t} x_{t'}

    Args:
        steps: (B, T) or (B, T, M), zero after a response's end.

    Returns:
        The same shape; the last step's entry is 0.
    """
    return steps.flip(1).cumsum(1).flip(1) - steps


def soft_returns(rewards: Tensor, kl: Tensor, zeta: Tensor | float) -> Tensor:
    """Compute what an action is worth once the KL still to come is paid for.

        G_{t,m} = R_m − ζ · Σ_{t' > t} KL_{t'}

    Args:
        rewards: (B, M), normalised reward of each response.
        kl: (B, T), per-step KL to the reference in nats, zero after a response's end.
        zeta: ζ ≥ 0 in reward per nat; a number or (B,). 1/β makes the regularised goal E[R] − KL/β.

    Returns:
        (B, T, M).

    Source: MAVIS, arXiv 2508.13415 (KL-regularised policy improvement). Only later steps count, because the value
    of an action is asked for when the price of the present step is known.
    """
    if isinstance(zeta, Tensor):
        zeta = zeta[:, None, None]
    return rewards[:, None, :] - zeta * reverse_cumsum_exclusive(kl)[:, :, None]
