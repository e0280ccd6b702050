"""The sampler protocol, and the sampler that draws with the policy's own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mavis.critics import Critic
from mavis.decoding import MavisTilt
from mavis.policies.chat import Prompt
from mavis.rollouts.log_ratio import LogRatioRecorder
from mavis.rollouts.sampling import RolloutSettings, sample


@dataclass(frozen=True)
class SampledResponses:
    """Responses to B prompts.

    Args:
        prompt_ids: token ids of the prompts, without padding.
        response_ids: token ids of the responses, up to the first end token and with it.
        kl: (B, T) float32, KL(π ‖ π_ref) of each step in nats, T that of the longest response; None if the sampler does
            not know it, so that the responses have to be replayed.
        log_ratio: (B,) float64, log π − log π_ref of each response in nats; None if it was not recorded.

    Examples:
        >>> from mavis.rollouts import SampledResponses
        >>> SampledResponses(prompt_ids=[[1, 5]], response_ids=[[7, 2]])
        SampledResponses(prompt_ids=[[1, 5]], response_ids=[[7, 2]], kl=None, log_ratio=None)
    """

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    kl: Tensor | None = None
    log_ratio: Tensor | None = None


class Sampler(Protocol):
    """Draws responses from a policy, plain or tilted; equal calls with equal seeds draw the same responses.

    Examples:
        The default sampler draws with the policy's own `generate`:

        >>> import mavis
        >>> from mavis.rollouts import RolloutSettings
        >>> from mavis.rollouts.sampler import GENERATE_SAMPLER
        >>> policy, tokenizer = mavis.embedded.load()
        >>> settings = RolloutSettings(max_new_tokens=4)
        >>> drawn = GENERATE_SAMPLER.draw(policy, tokenizer, ["Once upon a time"], settings, seed=0)
        >>> len(drawn.response_ids[0])
        4
    """

    @property
    def name(self) -> str:
        """Identifies the sampler in the manifest of a folder of rollouts."""
        ...

    def check(self, policy: Any, critic: Critic | None) -> None:
        """Refuse a policy or critic that cannot be sampled from, before anything is sampled.

        Args:
            policy: the reference policy.
            critic: will tilt it, now or once it is trained; None if none will.

        Raises:
            MavisError: naming the obstacle.
        """
        ...

    def release(self) -> None:
        """Free resources held for drawing; the next draw acquires them again."""
        ...

    def draw(
        self,
        policy: Any,
        tokenizer: Any,
        prompts: Sequence[Prompt],
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
            prompts: B texts or conversations.
            settings: the lengths, the temperature, and the candidates of tilted rows.
            seed: of this batch; the random state of the process is left alone.
            top_k: without a critic, the number of candidates that the reference is truncated to; None keeps every
                token.
            critic: tilts the rows whose λ is not 0.
            lam: (B, M) float64, λ = β·w; with a critic only.
        """
        ...


def sampler_identity(sampler: Sampler) -> dict[str, str]:
    """Return what identifies a sampler in a manifest; nothing for `generate`, as manifests without an entry mean it."""
    return {} if isinstance(sampler, GenerateSampler) else {"sampler": sampler.name}


class GenerateSampler:
    """Draws with the policy's own `generate`, and records the KL of a tilt meanwhile.

    Args:
        log_ratios: whether to record the log-ratio of each tilted response as well.
    """

    name = "generate"

    def __init__(self, *, log_ratios: bool = False) -> None:
        self.log_ratios = log_ratios

    def release(self) -> None:
        """Do nothing: no resources are held."""

    def check(self, policy: Any, critic: Critic | None) -> None:
        """Accept everything: the tilt itself refuses what it cannot steer."""

    def draw(
        self,
        policy: Any,
        tokenizer: Any,
        prompts: Sequence[Prompt],
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
        recorder = LogRatioRecorder(settings.temperature) if self.log_ratios else None
        processors = recorder.around(tilt) if recorder is not None else [tilt]
        with critic.attached_to(policy):
            ids = sample(policy, tokenizer, prompts, settings, seed, processors=processors)
        log_ratio = recorder.totals(ids[1]) if recorder is not None else None
        return SampledResponses(*ids, kl=tilt.kl, log_ratio=log_ratio)


GENERATE_SAMPLER = GenerateSampler()
"""The default sampler."""
