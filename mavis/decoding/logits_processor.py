"""`MavisTilt`, the logits processor that steers a policy by its critic."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
    disagreement,
    trained_temperature,
    trained_top_k,
)
from mavis.decoding.trace import GenerationTrace
from mavis.decoding.weights import Weights, check_prompt_groups, lambda_rows
from mavis.errors import CriticError, DecodingError, WeightsError, warn_user
from mavis.math.kl import step_kl
from mavis.math.tilt import tilted_logprobs, top_candidates
from mavis.policies.call_stack import assistance, running_generation_config
from mavis.policies.generation_config import end_token_ids


class _ResolvedSettings(NamedTuple):
    """The settings of a tilt, resolved for one critic."""

    critic: Critic
    lam: Tensor
    """(R, M) float64, λ = β·w."""
    top_k: int | None
    temperature: float


class _BatchLambda(NamedTuple):
    """λ repeated for the rows of a batch, kept from step to step."""

    critic: Critic
    rows: int
    device: torch.device
    lam: Tensor | None
    """(B, M) float32, or None if no row is tilted."""
    is_untilted: Tensor | None
    """(B, 1) bool, True where λ = 0; None if every row is tilted."""


class MavisTilt(LogitsProcessor):
    """Tilt the policy's distribution over its top-k candidates towards the weighted objectives.

        π(a|s) ∝ π_ref(a|s) · exp(Σ_m λ_m Q_m(s, a)),   λ = β·w,   a ∈ top-k of π_ref(·|s)

    Rows whose λ is 0 pass through untouched. Other rows come back as T · log π over the candidates and −inf elsewhere,
    so that `generate`'s own division by T gives π, and a beam's score is log π. Pass it to `generate` alone, in a list
    or in a `LogitsProcessorList`, together with `top_k=0` and the same `temperature`; it warns once if `generate`
    changes the tilted distribution afterwards. `mavis.generate` sets both sides.

    Args:
        weights: a mapping from objective to weight, M numbers, a tensor (M,) or (R, M), or one mapping per prompt. With
            R rows each is used for B/R consecutive rows of the batch. Finite; need not sum to one.
        critic: an attached critic, or several, whose tilts are added and whose objectives are weighted jointly; None
            takes the one attached to the policy that is generating in this thread.
        beta: tilt strength in 1 / reward, ≥ 0, one number or one per prompt; the *inverse* of the β of DPO and RLHF
            papers. None takes the critic's calibrated default.
        target_kl: KL budget in nats per response, > 0, from which the critic's calibration derives beta.
        top_k: number of candidates K, 1 ≤ K ≤ V; None makes every token a candidate, `as_trained` takes the number that
            the critic was trained with, or every token if it does not record one.
        temperature: T > 0 that `generate` will divide by afterwards; `as_trained` takes the critic's, or 1.
        max_new_tokens: the length over which `target_kl` is spent, ≥ 1; None is the length of the calibration.
        record_kl: keep every step's exact KL for `kl`.
        entropy_gate: do not tilt a row at steps where the policy's own distribution at T has less entropy than this, in
            nats, ≥ 0, that is where it is nearly certain. None tilts every step. See `steered`.

    Raises:
        DecodingError: for a bad beta, target_kl, top_k, temperature or entropy_gate.
        WeightsError: for weights that do not fit the critic or the batch.
        CriticError: if no critic is found.

    Source: MAVIS, arXiv 2508.13415.

    Examples:
        >>> import mavis
        >>> policy, tokenizer = mavis.embedded.load()
        >>> critic = mavis.Critic.from_pretrained(mavis.embedded.critic_path())
        >>> inputs = tokenizer(["Once upon a time"] * 2, return_tensors="pt")
        >>> tilt = mavis.MavisTilt({"positive": 0.7, "dialogue": 0.3}, critic, target_kl=2.0, record_kl=True)
        >>> with critic.attach(policy):
        ...     sampling = {"do_sample": True, "top_k": 0, "temperature": tilt.temperature}
        ...     ids = policy.generate(**inputs, **sampling, max_new_tokens=8, logits_processor=tilt)
        >>> tilt.kl.shape
        torch.Size([2, 8])
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
        max_new_tokens: int | None = None,
        record_kl: bool = False,
        entropy_gate: float | None = None,
    ) -> None:
        critic = as_critic(critic) if critic is not None else None
        check_settings(beta, target_kl, top_k, temperature, entropy_gate, max_new_tokens)
        self._weights = weights
        self.critic: Critic | None = critic
        self._beta, self._target_kl, self._max_new_tokens = beta, target_kl, max_new_tokens
        self._top_k, self._temperature, self.record_kl = top_k, temperature, record_kl
        self.entropy_gate = entropy_gate
        self.checks_generate = True
        """Whether to warn once if `generate` changes the tilted distribution afterwards."""
        self._resolved: _ResolvedSettings | None = None
        self._batch_lambda: _BatchLambda | None = None
        self._thread = threading.local()
        self._latest_trace: GenerationTrace | None = None
        if critic is not None:  # mistakes are raised now rather than at the first step
            self._resolve(critic)

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
                "record_kl is True, but generate is assisted: it also scores drafts, and the tilt cannot know which of "
                "them become part of the response.",
                "measure the KL without assistant_model and prompt_lookup_num_tokens; the responses' distribution is "
                "the same.",
            )
        if assisting == "drafting":  # any draft is correct: the policy's tilted scores decide whether it is accepted
            return scores
        critic = self.critic if self.critic is not None else generating_critic()
        if scores.shape[1] != critic.fingerprint.vocab_size:
            raise CriticError(
                f"critic has a vocabulary of {critic.fingerprint.vocab_size} tokens, but scores has {scores.shape[1]}.",
                "use the critic that was trained for this policy.",
            )
        resolved = self._resolve(critic)
        top_k, temperature = resolved.top_k, resolved.temperature
        batch = self._lambda_of_batch(critic, scores)
        trace = self._trace(critic, input_ids)
        if self.checks_generate and input_ids is trace.prompt_ids and batch.lam is not None:
            self._check_generate(resolved, scores.shape[1], batch)
        if self.record_kl or self.entropy_gate is not None:
            trace.update_ended(input_ids, end_token_ids(critic.attached_policy))
        if batch.lam is None:
            if self.record_kl:
                trace.record_kl(torch.zeros(len(scores), device=scores.device))
            return scores
        precise = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
        is_untilted = batch.is_untilted
        if self.entropy_gate is not None:
            is_certain = _entropy(precise, temperature) < self.entropy_gate
            is_untilted = is_certain if is_untilted is None else is_untilted | is_certain
            trace.record_tilted(is_untilted)
            # On an accelerator the host would have to wait for this answer.
            if is_untilted.device.type == "cpu" and critic.can_skip_steps and bool(is_untilted.all()):
                if self.record_kl:
                    trace.record_kl(torch.zeros(len(scores)))
                return scores
        logits, ids = top_candidates(precise, top_k) if top_k is not None else (precise, None)
        tilt = critic.tilt(input_ids, ids, batch.lam)
        logprobs = tilted_logprobs(logits, tilt.to(logits.device), temperature)
        if self.record_kl:
            normaliser = torch.logsumexp(precise / temperature, dim=-1, keepdim=True)
            kl = step_kl(logprobs, logits / temperature - normaliser)
            trace.record_kl(kl if is_untilted is None else kl.masked_fill(is_untilted[:, 0], 0.0))
        if temperature != 1.0:
            logprobs = logprobs * temperature
        if ids is not None:
            logprobs = torch.full_like(precise, -torch.inf).scatter_(1, ids, logprobs)
        if is_untilted is not None:
            logprobs = torch.where(is_untilted, precise, logprobs)
        return logprobs.to(scores.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle has: everything but the records of generations; its critic is detached."""
        return self.__dict__ | {"_thread": None, "_latest_trace": None, "_batch_lambda": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _thread=threading.local())

    # `generate` iterates over its logits_processor, so a single processor acts as a list of one.
    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[MavisTilt]:
        yield self

    @property
    def kl(self) -> Tensor:
        """The KL of every step of this thread's latest generation: (B, steps) in nats.

        Steps after a row's end, by the policy's own end tokens, count 0. The sum over steps is the KL of a response,
        except under beam search, where beams move between rows.

        Raises:
            DecodingError: if the tilt was built without `record_kl=True` or has not generated yet.
        """
        trace = getattr(self._thread, "trace", self._latest_trace)
        if not self.record_kl or trace is None:
            raise DecodingError(
                f"kl is not available: record_kl is {self.record_kl} and "
                f"{'nothing' if trace is None else 'a response'} was generated.",
                "build the tilt with record_kl=True and generate first.",
            )
        return torch.stack(trace.kl, dim=1)

    @property
    def steered(self) -> Tensor:
        """The fraction of each response's steps that were tilted in this thread's latest generation: (B,) in [0, 1].

        Raises:
            DecodingError: if the tilt was built without an entropy gate, so that every step is tilted, or has not
                generated yet.
        """
        trace = getattr(self._thread, "trace", self._latest_trace)
        if self.entropy_gate is None or trace is None or not trace.tilted:
            raise DecodingError(
                f"steered is not available: entropy_gate is {self.entropy_gate} and "
                f"{'nothing' if trace is None else 'a response'} was generated.",
                "build the tilt with entropy_gate=0.1 or so and generate first.",
            )
        return torch.stack(trace.tilted, dim=1).nanmean(dim=1)

    @property
    def top_k(self) -> int | AsTrained | None:
        """The number of candidates, None for every token; `as_trained` until the critic is known."""
        return self._resolved.top_k if self._resolved is not None else self._top_k

    @property
    def temperature(self) -> float | AsTrained:
        """The temperature that `generate` has to divide by; `as_trained` until the critic is known."""
        return self._resolved.temperature if self._resolved is not None else self._temperature

    def _resolve(self, critic: Critic) -> _ResolvedSettings:
        kept = self._resolved
        if kept is None or kept.critic is not critic:
            top_k, temperature = trained_top_k(self._top_k, critic), trained_temperature(self._temperature, critic)
            if self._beta is None:
                check_calibration(critic.calibration, self._target_kl, top_k, temperature)
            lam = lambda_rows(self._weights, critic, self._beta, self._target_kl, self._max_new_tokens)
            kept = self._resolved = _ResolvedSettings(critic, lam, top_k, temperature)
            critic.warn_outside_trained_range(lam)
        return kept

    def _lambda_of_batch(self, critic: Critic, scores: Tensor) -> _BatchLambda:
        kept = self._batch_lambda
        if kept is not None and kept.critic is critic and kept.rows == len(scores) and kept.device == scores.device:
            return kept
        lam = self._resolve(critic).lam
        if len(scores) % len(lam):
            raise WeightsError(
                f"weights or beta has {len(lam)} rows, but the batch has {len(scores)}, which is no multiple.",
                "give one row per prompt; rows are repeated for beams and num_return_sequences.",
            )
        lam = lam.repeat_interleave(len(scores) // len(lam), dim=0)
        is_untilted = (lam == 0).all(dim=1, keepdim=True)
        kept = _BatchLambda(
            critic=critic,
            rows=len(scores),
            device=scores.device,
            lam=None if bool(is_untilted.all()) else lam.to(scores.device, torch.float32),
            is_untilted=is_untilted.to(scores.device) if bool(is_untilted.any()) else None,
        )
        self._batch_lambda = kept
        return kept

    def _check_generate(self, resolved: _ResolvedSettings, vocabulary: int, batch: _BatchLambda) -> None:
        config = running_generation_config()
        some_pass_through = batch.is_untilted is not None or self.entropy_gate is not None
        candidates = vocabulary if resolved.top_k is None or some_pass_through else resolved.top_k
        problem = disagreement(config, candidates, resolved.temperature) if config is not None else None
        if problem is not None:
            self.checks_generate = False
            warn_user(problem)

    def _trace(self, critic: Critic, input_ids: Tensor) -> GenerationTrace:
        """Return the trace of the current generation; at the first step start one and check how rows are grouped."""
        trace: GenerationTrace | None = getattr(self._thread, "trace", None)
        if trace is None or critic.restarted or not trace.is_continued_by(input_ids):
            rows = len(self._resolve(critic).lam)
            if 1 < rows < len(input_ids):
                check_prompt_groups(input_ids, rows)
            trace = GenerationTrace(prompt_ids=input_ids, length=input_ids.shape[1])
            self._thread.trace = self._latest_trace = trace
        trace.length = input_ids.shape[1]
        return trace


def _entropy(scores: Tensor, temperature: float) -> Tensor:
    """Compute the entropy of the policy's distribution at T: (B, 1) in nats."""
    return torch.special.entr(torch.softmax(scores / temperature, dim=-1)).sum(dim=-1, keepdim=True)
