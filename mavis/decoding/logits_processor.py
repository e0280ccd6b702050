"""`MavisTilt`: the logits processor that steers a policy by its critic."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mavis.critics import Critic
from mavis.critics.attachment import generating_critic
from mavis.critics.group import as_critic
from mavis.decoding.settings import (
    AS_TRAINED,
    AsTrained,
    check_calibration,
    check_settings,
    trained_temperature,
    trained_top_k,
)
from mavis.decoding.weights import Weights, lambda_rows
from mavis.errors import CriticError, DecodingError, WeightsError
from mavis.math.kl import step_kl
from mavis.math.tilt import tilted_logprobs, top_candidates
from mavis.policies.call_stack import assistance


class _Strength(NamedTuple):
    """What was asked of a tilt, resolved for one critic."""

    critic: Critic
    lam: Tensor
    """(R, M) float64, λ = β·w."""
    top_k: int | None
    temperature: float


class _Lambda(NamedTuple):
    """λ spread over the rows of a batch, kept from step to step."""

    critic: Critic
    rows: int
    device: torch.device
    lam: Tensor | None
    """(B, M) float32, or None when no row is tilted."""
    passed: Tensor | None
    """(B, 1) bool, True where λ = 0; None when every row is tilted."""


@dataclass
class _Generation:
    """What one run of `generate` in one thread has shown so far."""

    prompt_ids: Tensor
    length: int
    kl: list[Tensor] = field(default_factory=list)
    steered: list[Tensor] = field(default_factory=list)
    has_ended: Tensor | None = None

    def ended(self, input_ids: Tensor, end_token_ids: list[int]) -> Tensor | None:
        """Mark the rows (B,) that have drawn an end token, or None while nothing has been drawn."""
        if input_ids.shape[1] == self.prompt_ids.shape[1] or not end_token_ids:
            return None
        last = input_ids[:, -1:]
        now = (last == torch.tensor(end_token_ids, device=last.device)).any(dim=1)
        self.has_ended = now if self.has_ended is None else self.has_ended | now
        return self.has_ended


class MavisTilt(LogitsProcessor):
    """Tilt the policy's distribution over its top-k candidates towards the weighted objectives.

        π(a|s) ∝ π_ref(a|s) · exp(Σ_m λ_m Q_m(s, a)),   λ = β·w,   a ∈ top-k of π_ref(·|s)

    Rows whose λ is 0 pass through untouched. Other rows come back as T · log π over the candidates and −inf elsewhere,
    so that `generate`'s own division by T gives π, and a beam's score is log π. Pass it to `generate` alone, in a list
    or in a `LogitsProcessorList`, together with `top_k=0` and the same `temperature`; `mavis.generate` sets both sides.

    Args:
        weights: a mapping from objective to weight, M numbers, a tensor (M,) or (R, M), or one mapping per prompt.
            With R rows each serves B/R consecutive rows of the batch. Finite; need not sum to one.
        critic: an attached critic, or several, whose tilts are added and whose objectives are weighed together; None
            takes the one attached to the policy that is generating in this thread.
        beta: tilt strength in 1 / reward, ≥ 0, one number or one per prompt; the *inverse* of the β of DPO and RLHF
            papers. None takes the critic's calibrated default.
        target_kl: distance to the reference in nats per sequence, instead of beta; > 0.
        top_k: number of candidates K, 1 ≤ K ≤ V; None makes every token a candidate, `as_trained` takes the number that
            the critic was trained with, or every token if it does not say.
        temperature: T > 0 that `generate` will divide by afterwards; `as_trained` takes the critic's, or 1.
        record_kl: keep every step's exact KL for `kl`.
        entropy_gate: leave a row as it is at steps where the policy's own distribution at T has less than so many nats
            of entropy, ≥ 0: there it is sure already. None tilts every step. See `steered`.

    Raises:
        DecodingError: for a bad beta, target_kl, top_k or temperature.
        WeightsError: for weights that do not fit the critic or the batch.
        CriticError: if no critic is found.

    Source: MAVIS, arXiv 2508.13415.
    """

    def __init__(
        self,
        weights: Weights,
        critic: Critic | Sequence[Critic] | None = None,
        *,
        beta: float | Sequence[float] | Tensor | None = None,
        target_kl: float | None = None,
        top_k: int | AsTrained | None = AS_TRAINED,
        temperature: float | AsTrained = AS_TRAINED,
        record_kl: bool = False,
        entropy_gate: float | None = None,
    ) -> None:
        critic = as_critic(critic) if critic is not None else None
        check_settings(beta, target_kl, top_k, temperature)
        _check_gate(entropy_gate)
        self._weights = weights
        self.critic: Critic | None = critic
        self._beta, self._target_kl = beta, target_kl
        self._top_k, self._temperature, self.record_kl = top_k, temperature, record_kl
        self.entropy_gate = entropy_gate
        self._strength: _Strength | None = None
        self._lambda: _Lambda | None = None
        self._thread = threading.local()
        self._generation: _Generation | None = None
        if critic is not None:  # a mistake shows where it is made, not in the first step
            self._strength_for(critic)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Tilt one step.

        Args:
            input_ids: (B, L) integer, the tokens so far.
            scores: (B, V) floating, the policy's scores as earlier processors left them.

        Returns:
            (B, V) in the dtype of `scores`, which is not changed.
        """
        assisting = assistance()
        if assisting is not None and self.record_kl:
            raise DecodingError(
                "record_kl is True, but generate is assisted: it also asks about drafts, and which of them become part "
                "of the response is not known here.",
                "measure the KL without assistant_model and prompt_lookup_num_tokens; the responses' distribution is "
                "the same.",
            )
        if assisting == "drafting":  # any draft will do: what becomes of it is decided by the policy's tilted scores
            return scores
        critic = self.critic if self.critic is not None else generating_critic()
        if scores.shape[1] != critic.fingerprint.vocab_size:
            raise CriticError(
                f"critic knows {critic.fingerprint.vocab_size} tokens, but scores has {scores.shape[1]}.",
                "use the critic that was trained for this policy.",
            )
        strength = self._strength_for(critic)
        top_k, temperature = strength.top_k, strength.temperature
        spread = self._spread(critic, scores)
        generation = self._follow(critic, input_ids)
        recorded = self.record_kl or self.entropy_gate is not None
        ended = generation.ended(input_ids, _end_ids(critic)) if recorded else None
        if spread.lam is None:
            if self.record_kl:
                generation.kl.append(torch.zeros(len(scores), device=scores.device))
            return scores
        precise = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
        passed = spread.passed
        if self.entropy_gate is not None:
            sure = _entropy(precise, temperature) < self.entropy_gate
            passed = sure if passed is None else passed | sure
            generation.steered.append(_share(passed, ended))
            # Elsewhere than on the CPU the host would have to wait to know.
            if passed.device.type == "cpu" and critic.can_skip_steps and bool(passed.all()):
                if self.record_kl:
                    generation.kl.append(torch.zeros(len(scores)))
                return scores
        logits, ids = top_candidates(precise, top_k) if top_k is not None else (precise, None)
        tilt = critic.tilt(input_ids, ids, spread.lam)
        logprobs = tilted_logprobs(logits, tilt.to(logits.device), temperature)
        if self.record_kl:
            whole = torch.logsumexp(precise / temperature, dim=-1, keepdim=True)
            kl = step_kl(logprobs, logits / temperature - whole)
            kl = kl if passed is None else kl.masked_fill(passed[:, 0], 0.0)
            generation.kl.append(kl if ended is None else kl.masked_fill(ended, 0.0))
        if temperature != 1.0:
            logprobs = logprobs * temperature
        if ids is not None:
            logprobs = torch.full_like(precise, -torch.inf).scatter_(1, ids, logprobs)
        if passed is not None:
            logprobs = torch.where(passed, precise, logprobs)
        return logprobs.to(scores.dtype)

    # `generate` takes the length of what it is given and iterates over it: a processor alone is a list of one.
    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[MavisTilt]:
        yield self

    @property
    def kl(self) -> Tensor:
        """The KL of every step of this thread's latest generation: (B, steps) in nats.

        Steps after a row's end, by the policy's own end tokens, count 0. Under beam search a row is a place among the
        beams, which change places, so only sums over steps of other ways of generating are those of a response.

        Raises:
            DecodingError: if the tilt was built without `record_kl=True` or has not generated yet.
        """
        generation = getattr(self._thread, "generation", self._generation)
        if not self.record_kl or generation is None:
            raise DecodingError(
                f"kl was asked for, but record_kl is {self.record_kl} and "
                f"{'nothing' if generation is None else 'a response'} was generated.",
                "build the tilt with record_kl=True and generate first.",
            )
        return torch.stack(generation.kl, dim=1)

    @property
    def steered(self) -> Tensor:
        """The share of each response's steps that were tilted in this thread's latest generation: (B,) in [0, 1].

        Raises:
            DecodingError: if the tilt was built without an entropy gate, which alone leaves steps out, or has not
                generated yet.
        """
        generation = getattr(self._thread, "generation", self._generation)
        if self.entropy_gate is None or generation is None or not generation.steered:
            raise DecodingError(
                f"steered was asked for, but entropy_gate is {self.entropy_gate} and "
                f"{'nothing' if generation is None else 'a response'} was generated.",
                "build the tilt with entropy_gate=0.1 or so and generate first.",
            )
        return torch.stack(generation.steered, dim=1).nanmean(dim=1)

    @property
    def top_k(self) -> int | AsTrained | None:
        """The number of candidates, None for every token; `as_trained` until the critic is known."""
        return self._strength.top_k if self._strength is not None else self._top_k

    @property
    def temperature(self) -> float | AsTrained:
        """The temperature that `generate` has to divide by; `as_trained` until the critic is known."""
        return self._strength.temperature if self._strength is not None else self._temperature

    def _strength_for(self, critic: Critic) -> _Strength:
        kept = self._strength
        if kept is None or kept.critic is not critic:
            top_k, temperature = trained_top_k(self._top_k, critic), trained_temperature(self._temperature, critic)
            if self._beta is None:
                check_calibration(critic.calibration, self._target_kl, top_k, temperature, stacklevel=4)
            lam = lambda_rows(self._weights, critic, self._beta, self._target_kl)
            kept = self._strength = _Strength(critic, lam, top_k, temperature)
            critic.warn_outside_trained_range(lam)
        return kept

    def _spread(self, critic: Critic, scores: Tensor) -> _Lambda:
        kept = self._lambda
        if kept is not None and kept.critic is critic and kept.rows == len(scores) and kept.device == scores.device:
            return kept
        lam = self._strength_for(critic).lam
        if len(scores) % len(lam):
            raise WeightsError(
                f"weights or beta has {len(lam)} rows, but the batch has {len(scores)}, which is no multiple.",
                "give one row per prompt; beams and num_return_sequences are taken care of.",
            )
        lam = lam.repeat_interleave(len(scores) // len(lam), dim=0)
        passed = (lam == 0).all(dim=1, keepdim=True)
        kept = _Lambda(
            critic=critic,
            rows=len(scores),
            device=scores.device,
            lam=None if bool(passed.all()) else lam.to(scores.device, torch.float32),
            passed=passed.to(scores.device) if bool(passed.any()) else None,
        )
        self._lambda = kept
        return kept

    def _follow(self, critic: Critic, input_ids: Tensor) -> _Generation:
        """Tell a new generation from the next step of the one under way; check a new one's grouping."""
        generation: _Generation | None = getattr(self._thread, "generation", None)
        if generation is None or critic.restarted or not _continues(generation, input_ids):
            rows = len(self._strength_for(critic).lam)
            if 1 < rows < len(input_ids):
                _check_groups(input_ids, rows)
            generation = _Generation(prompt_ids=input_ids, length=input_ids.shape[1])
            self._thread.generation = self._generation = generation
        generation.length = input_ids.shape[1]
        return generation


def _continues(generation: _Generation, input_ids: Tensor) -> bool:
    prompt = generation.prompt_ids
    if (
        len(prompt) != len(input_ids)
        or input_ids.shape[1] != generation.length + 1
        or prompt.device != input_ids.device
    ):
        return False
    # Beams move within a prompt's rows only, so the prompts stay where they are. On an accelerator the host would have
    # to wait for the comparison; lengths are known here.
    return input_ids.device.type != "cpu" or torch.equal(input_ids[:, : prompt.shape[1]], prompt)


def _end_ids(critic: Critic) -> list[int]:
    end = getattr(getattr(critic.attached_policy, "generation_config", None), "eos_token_id", None)
    return [] if end is None else list(end) if isinstance(end, list | tuple) else [int(end)]


def _check_groups(prompt_ids: Tensor, rows: int) -> None:
    grouped = prompt_ids.unflatten(0, (rows, -1))
    same = (grouped == grouped[:, :1]).flatten(1).all(dim=1)
    if not bool(same.all()):
        first = int((~same).nonzero()[0])
        size = grouped.shape[1]
        raise WeightsError(
            f"weights has {rows} rows for {len(prompt_ids)} prompts: row {first} would serve batch rows "
            f"{first * size} to {(first + 1) * size - 1}, but their prompts differ.",
            "give one row of weights per prompt.",
        )


def _entropy(scores: Tensor, temperature: float) -> Tensor:
    """Measure how unsure the policy is: (B, 1) in nats."""
    return torch.special.entr(torch.softmax(scores / temperature, dim=-1)).sum(dim=-1, keepdim=True)


def _share(passed: Tensor, ended: Tensor | None) -> Tensor:
    """Tell the rows (B,) that are tilted from those that are not, 1 and 0, and from those that have ended, NaN."""
    steered = (~passed[:, 0]).float()
    return steered if ended is None else steered.masked_fill(ended, torch.nan)


def _check_gate(entropy_gate: object) -> None:
    if entropy_gate is None:
        return
    wrong = isinstance(entropy_gate, bool) or not isinstance(entropy_gate, int | float)
    if wrong or not 0 <= entropy_gate < math.inf:  # type: ignore[operator]
        raise DecodingError(
            f"entropy_gate is {entropy_gate!r}, expected nats ≥ 0 or None.",
            "0.1 leaves out steps that are all but sure.",
        )
