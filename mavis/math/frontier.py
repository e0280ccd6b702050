"""The most reward that any policy can have at a given KL to the reference policy, and how near we are to it.

For one prompt, among all policies with KL(π ‖ π_ref) ≤ κ the best expected reward is that of
π_β(y) ∝ π_ref(y) exp(β r(y)) for the β at which the KL is κ. N rollouts of the reference policy stand for
π_ref, each with probability 1/N, so no training is needed to know the limit: it only takes rewards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mavis.errors import EvaluationError

# Below this many nats the KL of a tilt drowns in the rounding of log N, and β = 0 is the answer.
_KL_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class OptimalFrontier:
    """The optimal frontier at G tilt strengths; every tensor is float64 and (G,).

    Attributes:
        beta: tilt strength, in 1 / reward units.
        reward: best reachable expected reward at `kl`, mean over prompts.
        kl: KL to the reference policy in nats per response, mean over prompts.
        effective_sample_size: 1 / Σ_i p_i² of the prompt where it is smallest, from 1 to N.
    """

    beta: Tensor
    reward: Tensor
    kl: Tensor
    effective_sample_size: Tensor


def optimal_frontier(rewards: Tensor, betas: Tensor) -> OptimalFrontier:
    """Compute reward and KL of the optimal policy for each tilt strength, from reference rollouts alone.

        p_i ∝ exp(β r_i),   reward = mean_prompts Σ_i p_i r_i,   KL = mean_prompts Σ_i p_i log(N p_i)

    One β serves all prompts, and each prompt is normalised on its own: normalising over all rollouts together
    would let the limit pick easy prompts, which no policy can. Reward and KL grow with β, the effective
    sample size shrinks.

    Args:
        rewards: (P, N) rewards w·R of N reference rollouts for each of P prompts; finite, any real dtype.
        betas: (G,) tilt strengths ≥ 0, in 1 / reward units (the inverse of the β of DPO and RLHF papers).

    Returns:
        An `OptimalFrontier` of (G,) float64 tensors on the device of `rewards`.

    Raises:
        EvaluationError: `rewards` is not a finite, non-empty (P, N), or `betas` is not a (G,) of finite
            numbers ≥ 0.

    Source: the Gibbs variational principle (Donsker and Varadhan 1975) on the empirical distribution of the
    rollouts, self-normalised importance weights for p.
    """
    rewards = _checked_rewards(rewards)
    if betas.ndim != 1 or not bool(torch.isfinite(betas).all()) or bool((betas < 0).any()):
        raise EvaluationError(
            f"betas must be a (G,) tensor of finite numbers ≥ 0, got shape {tuple(betas.shape)}: {betas.tolist()}.",
            "Pass for example torch.tensor([0.0, 0.5, 1.0, 2.0]).",
        )
    betas = betas.to(rewards)
    points = [_tilted(rewards, beta) for beta in betas.tolist()]
    columns = rewards.new_tensor(points).reshape(-1, 3).unbind(1)
    return OptimalFrontier(beta=betas, reward=columns[0], kl=columns[1], effective_sample_size=columns[2])


def optimal_reward_at(rewards: Tensor, kl: float, min_effective_sample_size: float = 50.0) -> float:
    """Compute the best reachable reward within one KL: the `optimal_frontier` at the β whose mean KL is `kl`.

    Where many rollouts share the highest reward, as with rewards that saturate, even β → ∞ may cost less than `kl`; the
    highest reward is then the limit.

    Args:
        rewards: (P, N) rewards w·R of N reference rollouts for each of P prompts; finite, any real dtype.
        kl: KL to the reference policy in nats per response, mean over prompts, ≥ 0.
        min_effective_sample_size: the smallest 1 / Σ_i p_i² that is trusted for any single prompt.

    Returns:
        The reward, mean over prompts, in the units of `rewards`.

    Raises:
        EvaluationError: `kl` is negative or not finite; or some prompt's effective sample size there, which is the
            number of rollouts that share its highest reward where no β reaches `kl`, is below
            `min_effective_sample_size`, so that a few lucky rollouts would decide the figure.

    Source: as `optimal_frontier`; β by bisection on log β, for d KL / d β = β Var_p(r) ≥ 0.
    """
    rewards = _checked_rewards(rewards)
    if not math.isfinite(kl) or kl < 0:
        raise EvaluationError(f"kl must be a finite number ≥ 0, got {kl}.", "Pass nats per response.")
    rollouts = rewards.shape[1]
    best = (rewards == rewards.amax(1, keepdim=True)).sum(1).double()
    ceiling = float((math.log(rollouts) - best.log()).mean())
    if kl > _KL_ROUNDING and kl >= ceiling - _KL_ROUNDING:
        # Every prompt's best reward costs less than the budget. Where enough rollouts share that best, it is one that
        # the policy can give, and more KL buys nothing; where few do, it is only the luckiest of N.
        if float(best.min()) >= min_effective_sample_size:
            return float(rewards.amax(1).mean())
        raise EvaluationError(
            f"kl {kl:.4g} cannot be reached: {rollouts} reference rollouts per prompt with these rewards "
            f"reach less than {ceiling:.4g} nats.",
            "Draw more reference rollouts or stop at a smaller KL.",
        )
    reward, _, effective = _tilted(rewards, _beta_at(rewards, kl))
    if effective < min_effective_sample_size:
        raise EvaluationError(
            f"the optimal reward at kl {kl:.4g} rests on an effective sample size of {effective:.1f} of "
            f"{rollouts} reference rollouts for one prompt, and {min_effective_sample_size:g} are needed.",
            "Draw more reference rollouts or stop at a smaller KL.",
        )
    return reward


def reward_at(kl: Tensor, rewards: Tensor, target: float) -> float | None:
    """Read our own reward at a KL off a sweep over β, by linear interpolation between neighbouring points.

    Where the sweep is concave, as an optimal one is, the chord lies below it: interpolation does not flatter.

    Args:
        kl: (G,) measured KL to the reference policy in nats per response, in any order. The caller includes
            the reference policy itself, at KL 0, if the sweep leads there. Points of equal KL count as one, with their
            mean reward.
        rewards: (G,) measured rewards w·R of the same points.
        target: the KL at which the reward is asked.

    Returns:
        The reward, or None where `target` lies outside the measured KLs: nothing is extrapolated.

    Raises:
        EvaluationError: the shapes differ or are not (G,), or a number is not finite.

    Source: linear interpolation.
    """
    if kl.ndim != 1 or kl.shape != rewards.shape:
        raise EvaluationError(
            f"kl and rewards must both be (G,), got {tuple(kl.shape)} and {tuple(rewards.shape)}.",
            "Pass one KL and one reward for each point of the sweep.",
        )
    if not (bool(torch.isfinite(kl).all()) and bool(torch.isfinite(rewards).all()) and math.isfinite(target)):
        raise EvaluationError("kl, rewards and target must be finite.", "Drop the points that could not be measured.")
    points, group = kl.double().unique(return_inverse=True)  # sorted
    if len(points) == 0 or not float(points[0]) <= target <= float(points[-1]):
        return None
    heights = torch.zeros_like(points).index_add_(0, group, rewards.double()) / group.bincount()
    right = int((points < target).sum())
    if float(points[right]) == target:
        return float(heights[right])
    share = (target - points[right - 1]) / (points[right] - points[right - 1])
    return float(torch.lerp(heights[right - 1], heights[right], share))


def frontier_efficiency(ours: float, reference: float, optimal: float) -> float:
    """Compute how much of the reachable gain in reward is reached at one KL.

        efficiency = (ours − reference) / (optimal − reference)

    Args:
        ours: our reward w·R at that KL (`reward_at`).
        reference: reward of the reference policy on the same prompts.
        optimal: best reachable reward at that KL (`optimal_reward_at`).

    Returns:
        1 on the optimal frontier, 0 for no gain, negative for a loss; noise alone can lift it above 1.

    Raises:
        EvaluationError: a number is not finite, or `optimal` is not above `reference`.

    Source: definition above.
    """
    if not all(math.isfinite(number) for number in (ours, reference, optimal)):
        raise EvaluationError(
            f"frontier efficiency needs finite rewards, got ours {ours}, reference {reference} and optimal {optimal}.",
            "Check the rewards, and that our sweep over beta spans this KL.",
        )
    if optimal <= reference:
        raise EvaluationError(
            f"frontier efficiency has no scale: the optimal reward {optimal:.4g} is not above the "
            f"reference's {reference:.4g}.",
            "Choose a KL above 0, weights above 0, and an objective that tells responses apart.",
        )
    return (ours - reference) / (optimal - reference)


def _checked_rewards(rewards: Tensor) -> Tensor:
    if rewards.ndim != 2 or rewards.numel() == 0 or not bool(torch.isfinite(rewards).all()):
        raise EvaluationError(
            f"rewards must be a finite, non-empty (prompts, rollouts) tensor, got shape {tuple(rewards.shape)}.",
            "Weigh the objectives first, and draw the same number of reference rollouts for every prompt.",
        )
    return rewards.double()


def _tilted(rewards: Tensor, beta: float) -> tuple[float, float, float]:
    """Mean reward, mean KL and smallest effective sample size of (P, N) rollouts tilted by `beta`."""
    # Measured from each prompt's best, β·r keeps its digits however far the rewards lie from zero.
    logprobs = torch.log_softmax(beta * (rewards - rewards.amax(1, keepdim=True)), dim=1)
    probs = logprobs.exp()
    reward = (probs * rewards).sum(1).mean()
    kl = (probs * (logprobs + math.log(rewards.shape[1]))).sum(1).mean().clamp(min=0.0)
    effective = 1.0 / probs.square().sum(1).amax()
    return float(reward), float(kl), float(effective)


def _beta_at(rewards: Tensor, kl: float) -> float:
    """The β whose mean KL is `kl`, which must lie below the largest KL that the rollouts reach."""
    if kl <= _KL_ROUNDING:
        return 0.0
    # Gaussian rewards would need β = √(2 KL) / std; the bracket grows from there by factors of two.
    low = high = math.sqrt(2.0 * kl) / float(rewards.std(1, correction=0).square().mean().sqrt())
    while _tilted(rewards, low)[1] > kl:
        low /= 2.0
    while _tilted(rewards, high)[1] < kl:
        high *= 2.0
    while high > low * (1.0 + 1e-12):
        middle = math.sqrt(low * high)
        if _tilted(rewards, middle)[1] < kl:
            low = middle
        else:
            high = middle
    return high
