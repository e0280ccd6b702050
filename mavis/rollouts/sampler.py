"""Who draws the responses of a shard: the policy's own `generate`, unless another sampler is passed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mavis.critics import Critic
from mavis.decoding import MavisTilt
from mavis.rollouts.sampling import RolloutSettings, sample


@dataclass(frozen=True)
class SampledResponses:
    """Responses to B prompts.

    Args:
        prompt_ids: token ids of the prompts, without padding.
        response_ids: token ids of the responses, up to the first end token and with it.
        kl: (B, T) float32, KL(π ‖ π_ref) of each step in nats, T that of the longest response; None if the sampler does
            not know, and the policy is to read the responses again for it.
    """

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    kl: Tensor | None = None


class Sampler(Protocol):
    """Draws responses from a policy, plain or tilted; the same call with the same seed draws the same."""

    @property
    def name(self) -> str:
        """What a folder of rollouts calls it."""
        ...

    def check(self, policy: Any, critic: Critic | None) -> None:
        """Refuse what cannot be sampled from, before anything is.

        Args:
            policy: the reference policy.
            critic: that is to tilt it, now or once it is trained; None if none is.

        Raises:
            MavisError: naming what stands in the way.
        """
        ...

    def release(self) -> None:
        """Give back what is held for drawing, until the next draw: all that were wanted have been drawn."""
        ...

    def draw(
        self,
        policy: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        settings: RolloutSettings,
        seed: int,
        *,
        top_k: int | None = None,
        critic: Critic | None = None,
        lam: Tensor | None = None,
    ) -> SampledResponses:
        """Draw one response to each prompt.

        Args:
            policy: the reference policy.
            tokenizer: its tokenizer.
            prompts: B texts.
            settings: the length, the temperature, and the candidates of tilted rows.
            seed: of this batch; the random numbers of the process stay as they are.
            top_k: without a critic, candidates that the reference is cut to; None leaves every token.
            critic: tilts the rows whose λ is not 0.
            lam: (B, M) float64 λ = β·w; with a critic only.
        """
        ...


def sampler_identity(sampler: Sampler) -> dict[str, str]:
    """Say who draws, for the claim of a folder; nothing of `generate`, which is what a claim without a word means."""
    return {} if isinstance(sampler, GenerateSampler) else {"sampler": sampler.name}


class GenerateSampler:
    """Draws with the policy's own `generate`, and notes the KL of a tilt as it goes."""

    name = "generate"

    def release(self) -> None:
        """Hold nothing anyway."""

    def check(self, policy: Any, critic: Critic | None) -> None:
        """Refuse nothing: whatever the tilt cannot work with refuses by itself."""

    def draw(
        self,
        policy: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        settings: RolloutSettings,
        seed: int,
        *,
        top_k: int | None = None,
        critic: Critic | None = None,
        lam: Tensor | None = None,
    ) -> SampledResponses:
        """Draw one response to each prompt, all in one batch; see `Sampler.draw`."""
        if critic is None:
            return SampledResponses(*sample(policy, tokenizer, prompts, settings, seed, top_k=top_k))
        assert lam is not None
        tilt = MavisTilt(lam, critic, beta=1.0, top_k=settings.top_k, temperature=settings.temperature, record_kl=True)
        with critic.attached_to(policy):
            ids = sample(policy, tokenizer, prompts, settings, seed, processor=tilt)
        return SampledResponses(*ids, kl=tilt.kl)


GENERATE_SAMPLER = GenerateSampler()
"""The sampler of who names no other."""
