"""Returns: what the rest of a response earns, seen from each of its tokens."""

from __future__ import annotations

from torch import Tensor


def reverse_cumsum_exclusive(steps: Tensor) -> Tensor:
    """Sum the entries strictly after each time step.

        y_t = Σ_{t' = t + 1}^{T − 1} x_{t'},   t = 0, ..., T − 1

    that is y_{T−1} = 0 and y_t = y_{t+1} + x_{t+1}.

    Args:
        steps: x, (B, T) or (B, T, M), zero after a response's end.

    Returns:
        y, the same shape.

    Examples:
        >>> import torch
        >>> from mavis.math import reverse_cumsum_exclusive
        >>> reverse_cumsum_exclusive(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[5., 3., 0.]])
    """
    return steps.flip(1).cumsum(1).flip(1) - steps


def whole_response_returns(rewards: Tensor, log_ratio: Tensor, zeta: float) -> Tensor:
    """Compute the return of the paper's code, the same for all actions of a response.

        G_m = R_m − ζ · Σ_t [log π(a_t | s_t) − log π_ref(a_t | s_t)],   t = 0, ..., T − 1

    It differs from `soft_returns` in three ways. The log-ratio of the action itself is part of its value, which divides
    the tilt at the fixed point by 1 + ζβ, and the iteration gets there only for ζ < 1/β; the log-ratio of earlier
    actions only adds noise; and it is sampled instead of exact.

    Args:
        rewards: (B, M), normalised reward of each response.
        log_ratio: (B,), that of each response in nats.
        zeta: ζ ≥ 0 in reward per nat. For rewards of standard deviation σ it is ζ / σ of the one for raw rewards.

    Returns:
        (B, M).

    Source: the code of MAVIS (arXiv 2508.13415), with ζ of 0 to 0.03 and raw rewards.

    Examples:
        >>> import torch
        >>> from mavis.math import whole_response_returns
        >>> whole_response_returns(torch.tensor([[2.0]]), torch.tensor([1.75]), zeta=2.0)
        tensor([[-1.5000]])
    """
    return rewards - zeta * log_ratio.to(rewards.dtype)[:, None]


def soft_returns(rewards: Tensor, kl: Tensor, zeta: Tensor | float) -> Tensor:
    """Compute each action's return: the reward less the price of the KL still to come.

        G_{t,m} = R_m − ζ · Σ_{t' = t + 1}^{T − 1} KL_{t'},   t = 0, ..., T − 1

    Only later steps count: a value is asked for at a step whose own KL is already known.

    Args:
        rewards: (B, M), normalised reward of each response.
        kl: (B, T), per-step KL to the reference in nats, zero after a response's end.
        zeta: ζ ≥ 0 in reward per nat; a number or (B,). 1/β makes the regularised goal E[R] − KL/β.

    Returns:
        (B, T, M).

    Source: MAVIS, arXiv 2508.13415 (KL-regularised policy improvement).

    Examples:
        >>> import torch
        >>> from mavis.math import soft_returns
        >>> soft_returns(torch.tensor([[2.0]]), torch.tensor([[0.5, 1.0, 0.25]]), zeta=2.0)[..., 0]
        tensor([[-0.5000,  1.5000,  2.0000]])
    """
    if isinstance(zeta, Tensor):
        zeta = zeta[:, None, None]
    return rewards[:, None, :] - zeta * reverse_cumsum_exclusive(kl)[:, :, None]
