"""Worlds: a Markov chain over a few tokens, with rewards that depend on token counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mavis.errors import ConfigError, check_whole, closest


@dataclass(frozen=True)
class World:
    """A Markov chain over tokens, with rewards, that dynamic programming can solve.

    The prompt is one token, drawn uniformly; a response is `steps` more, each drawn from a distribution that depends on
    the token before it. Counters count the response tokens in their sets, up to their caps. The *state* is the step,
    the counts and the last token. Rewards depend on the final counts.

    Args:
        logprobs: (V, V) float64, log π_ref(token | last token), finite, rows normalised.
        counted: (C, V) bool, True where a counter counts a token.
        caps: C numbers ≥ 1, where the counters stop.
        rewards: (S, M) float64, normalised, of each of the S = Π (cap + 1) counts, the last counter running fastest.
        steps: T ≥ 1.

    Examples:
        >>> from mavis.exact import World
        >>> world = World.random("conflicting", seed=0)
        >>> world.tokens, world.objectives, world.steps, world.caps
        (12, 2, 12, (5, 5))
    """

    logprobs: Tensor
    counted: Tensor
    caps: tuple[int, ...]
    rewards: Tensor
    steps: int

    @classmethod
    def random(cls, kind: str, seed: int, *, tokens: int = 12, steps: int = 12) -> World:
        """Draw a world.

        Args:
            kind: one of `WORLD_KINDS`.
            seed: of the chain and of the tokens that are counted.
            tokens: V ≥ 10.
            steps: T ≥ 4.

        Returns:
            A world with two objectives, whose rewards have mean 0 and standard deviation 1 under π_ref.

        Raises:
            ConfigError: if the kind is unknown or a size is too small.
        """
        if kind not in WORLD_KINDS:
            raise ConfigError(f"kind is {kind!r}, which does not exist.", closest(kind, WORLD_KINDS))
        check_whole(ConfigError, "12 is usual.", 10, tokens=tokens)
        check_whole(ConfigError, "12 is usual.", 4, steps=steps)
        generator = torch.Generator().manual_seed(seed)
        logprobs = torch.log_softmax(torch.randn(tokens, tokens, generator=generator, dtype=torch.float64), dim=-1)
        order = torch.randperm(tokens, generator=generator)
        counted, caps, raw = WORLD_KINDS[kind](order, steps)
        grid = torch.cartesian_prod(*(torch.arange(cap + 1, dtype=torch.float64) for cap in caps))
        world = cls(logprobs, counted, caps, raw(grid.reshape(-1, len(caps))), steps)
        return world.normalised()

    @property
    def tokens(self) -> int:
        """V, the number of tokens."""
        return len(self.logprobs)

    @property
    def objectives(self) -> int:
        """M, the number of objectives."""
        return self.rewards.shape[1]

    @property
    def next_counts(self) -> Tensor:
        """The index of the counts after each token: (S, V) integer."""
        grid = torch.cartesian_prod(*(torch.arange(cap + 1) for cap in self.caps)).reshape(-1, len(self.caps))
        after = (grid[:, None, :] + self.counted.T.long()).minimum(torch.tensor(self.caps))
        return (after * self.strides).sum(-1)

    @property
    def strides(self) -> Tensor:
        """The distance between the indices of counts that differ by one in a counter: (C,) integer."""
        sizes = torch.tensor([*self.caps[1:], 0]) + 1
        return sizes.flip(0).cumprod(0).flip(0)

    def occupancy(self) -> Tensor:
        """Compute the distribution of the final counts under π_ref: (S,) float64, by forward induction."""
        mass = torch.zeros(len(self.rewards), self.tokens, dtype=torch.float64)  # by counts and last token
        mass[0] = 1 / self.tokens
        following = self.next_counts
        for _ in range(self.steps):
            drawn = mass @ self.logprobs.exp()  # by counts so far and token drawn
            mass = torch.zeros_like(mass).scatter_add_(0, following, drawn)
        return mass.sum(1)

    def normalised(self) -> World:
        """Shift and scale the rewards to mean 0 and standard deviation 1 under π_ref.

        Raises:
            ConfigError: if π_ref gives every response the same reward.
        """
        probs = self.occupancy()[:, None]
        mean = (probs * self.rewards).sum(0)
        std = (probs * (self.rewards - mean).square()).sum(0).sqrt()
        if not bool((std > 1e-12).all()):
            raise ConfigError(
                f"rewards have standard deviations {std.tolist()}, expected > 0.", "make the rewards vary."
            )
        return World(self.logprobs, self.counted, self.caps, (self.rewards - mean) / std, self.steps)


_Recipe = Callable[[Tensor, int], tuple[Tensor, tuple[int, ...], Callable[[Tensor], Tensor]]]


def _members(order: Tensor, *ranges: tuple[int, int]) -> Tensor:
    """Mark the tokens that each counter counts: positions first to last − 1 of a random order."""
    counted = torch.zeros(len(ranges), len(order), dtype=torch.bool)
    for counter, (first, last) in enumerate(ranges):
        counted[counter, order[first:last]] = True
    return counted


def _agreeing(order: Tensor, steps: int) -> tuple[Tensor, tuple[int, ...], Callable[[Tensor], Tensor]]:
    target = math.ceil(steps / 2)
    return _members(order, (0, 4), (1, 5)), (target, target), lambda counts: (counts >= target).double()


def _conflicting(order: Tensor, steps: int) -> tuple[Tensor, tuple[int, ...], Callable[[Tensor], Tensor]]:
    target = math.ceil(5 * steps / 12)
    return _members(order, (0, 5), (5, 10)), (target, target), lambda counts: (counts >= target).double()


def _linear(order: Tensor, steps: int) -> tuple[Tensor, tuple[int, ...], Callable[[Tensor], Tensor]]:
    return _members(order, (0, 4), (4, 8)), (steps, steps), lambda counts: counts / steps


def _product(order: Tensor, steps: int) -> tuple[Tensor, tuple[int, ...], Callable[[Tensor], Tensor]]:
    cap = steps // 3
    return (
        _members(order, (0, 3), (3, 6), (6, 8)),
        (cap, cap, cap),
        lambda counts: torch.stack([counts[:, 0] * counts[:, 1], counts[:, 1] * counts[:, 2]], dim=1) / cap**2,
    )


WORLD_KINDS: dict[str, _Recipe] = {
    "agreeing": _agreeing,  # sets that share three of four tokens; each must make up half of the steps
    "conflicting": _conflicting,  # disjoint sets; each must make up 5/12 of the steps: there is little room for both
    "linear": _linear,  # disjoint sets; every token counts the same
    "product": _product,  # three sets; each objective rewards two of them jointly, and one set belongs to both
}
"""Recipes of worlds with two objectives."""
