"""`MavisLogitsProcessor`: the tilt inside vLLM, enabled by its class path.

vllm serve <model> --logits-processors mavis.vllm.logits_processor:MavisLogitsProcessor
"""

from __future__ import annotations

import sys
import threading
import warnings
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.logits_processor import LogitsProcessor as LogitsLayer
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from mavis.critics import Critic
from mavis.errors import CriticError, DecodingError
from mavis.vllm.batch import TiltedBatch, TiltedRow
from mavis.vllm.recurrent_memory import PreemptedMemories
from mavis.vllm.request_arguments import Tilt, asks_for_tilt, parse_tilt
from mavis.vllm.served_critic import critic_folder, describe_for_engine, load_served_critic, needs_every_token

_captured = threading.local()
_PREEMPTED = "_mavis_preempted"


class CapturingLogitsLayer(LogitsLayer):
    """vLLM's logits layer, which also captures the hidden states from which it computes logits."""

    def forward(self, lm_head: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """Compute the logits (R, V) of hidden states (R, H), and keep the states for the tilt."""
        _captured.states = hidden_states
        logits: Tensor | None = LogitsLayer.forward(self, lm_head, hidden_states, *args, **kwargs)
        return logits


# vLLM imports this module before it builds the model, so the model gets the logits layer that is registered here.
if LogitsLayer.__name__ in op_registry_oot:
    raise CriticError(
        f"another package has replaced vLLM's logits layer with {op_registry_oot[LogitsLayer.__name__].__qualname__}, "
        "so the hidden states cannot be captured.",
        "remove that package from this environment.",
    )
LogitsLayer.register_oot(CapturingLogitsLayer, name=LogitsLayer.__name__)


class MavisLogitsProcessor(LogitsProcessor):
    """Tilt the requests that ask for it, each towards its own weighted objectives.

        π(a|s) ∝ π_ref(a|s)^{1/T} · exp(Σ_m λ_m Q_m(s, a)),   λ = β·w,   a ∈ top-K of π_ref(·|s)

    T is the request's own temperature. A greedy request (T = 0) takes the most likely token of the distribution at
    T = 1. Requests that ask for no tilt stay bit-identical to the plain model.

    Constraints that are applied as −inf (allowed tokens, bad words, `min_tokens`, structured output, `logit_bias`) are
    part of π_ref and still hold after the tilt. The request's penalties, `min_p`, `top_k` and `top_p` act on the
    tilted distribution.

    The critic folder comes from `additional_config={"mavis_critic": ...}` or the environment variable `MAVIS_CRITIC`. A
    request passes the arguments of `parse_tilt` in `SamplingParams.extra_args`, or `vllm_xargs` over REST.

    Args:
        vllm_config: of the engine.
        device: of its logits.
        is_pin_memory: not used.

    Raises:
        CriticError: if no critic is configured, it does not fit the model, or the engine uses an unsupported feature.

    Source: MAVIS, arXiv 2508.13415.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        folder = critic_folder(vllm_config.additional_config)
        _check_engine(vllm_config)
        model = vllm_config.model_config
        critic = load_served_critic(folder, str(model.model), model.get_hidden_size(), model.get_vocab_size())
        if needs_every_token(critic):
            _check_engine_shows_every_token(vllm_config)
        self._critic = critic.to(device).requires_grad_(False)
        # A value model's buffers are allocated before the engine measures how much memory is left for its own.
        self._batch = TiltedBatch(self._critic, (vllm_config.scheduler_config.max_num_seqs, model.max_model_len))

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request whose arguments cannot be used; the server answers it with status 400.

        Args:
            sampling_params: of the request.

        Raises:
            RequestError: naming the argument.
        """
        if asks_for_tilt(sampling_params.extra_args):
            engine = _calling_engine()
            folder = critic_folder(engine.additional_config if engine is not None else None)
            critic = describe_for_engine(folder, engine.instance_id if engine is not None else "")
            _tilt_of(sampling_params, critic)

    def is_argmax_invariant(self) -> bool:
        """Return False: a tilt can change which token is the most likely."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Apply a change of the batch.

        Args:
            batch_update: the requests that joined, left or moved since the last step; None if the batch is the same.

        Raises:
            DecodingError: if a request returns whose recurrent memory was not saved.
        """
        self._batch.advance()
        if batch_update is None:
            return
        added = [(row, self._tilted_row(*request)) for row, *request in batch_update.added]
        moved = [(source, target, how is MoveDirectionality.SWAP) for source, target, how in batch_update.moved]
        self._batch.update(batch_update.batch_size, batch_update.removed, added, moved)

    def apply(self, logits: Tensor) -> Tensor:
        """Tilt the rows that ask for it.

        Args:
            logits: (R, V) float32, the rows of the batch; changed in place.

        Returns:
            `logits`.

        Raises:
            DecodingError: if the captured hidden states do not match the rows.
        """
        batch = self._batch
        if not batch.any_tilted:
            return logits
        states: Tensor | None = getattr(_captured, "states", None)
        _captured.states = None
        if states is None or len(states) != len(logits) or len(logits) != batch.size:
            raise DecodingError(
                f"the engine has {len(logits)} rows of logits for {batch.size} requests, but "
                f"{0 if states is None else len(states)} rows of hidden states were captured.",
                "report this with the model's name: its logits do not come from vLLM's logits layer, row by row.",
            )
        return batch.apply(logits, states)

    def _tilted_row(
        self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> TiltedRow | None:
        if not asks_for_tilt(params.extra_args):
            return None
        with warnings.catch_warnings():  # `validate_params` has already warned
            warnings.simplefilter("ignore")
            tilt = _tilt_of(params, self._critic)
        if tilt is None:
            return None
        # The engine keeps a request's parameters exactly as long as the request can return.
        preempted = params.__dict__.setdefault(_PREEMPTED, PreemptedMemories())
        return TiltedRow(tilt, output_ids, preempted, prompt_ids or ())


def _check_engine(config: VllmConfig) -> None:
    """Refuse unsupported features; vLLM itself refuses speculative decoding and pooling with any logits processor."""
    parallel = config.parallel_config
    for name, value in {
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
    }.items():
        if value != 1:
            raise CriticError(f"{name} is {value}, but the tilt only supports 1.", f"set {name}=1.")
    if config.lora_config is not None:
        raise CriticError(
            "enable_lora is True, but a critic fits one policy and requests could choose among several.",
            "merge the adapter, and serve the merged model with a critic that was trained on it.",
        )


def _check_engine_shows_every_token(config: VllmConfig) -> None:
    """Refuse features that draw, skip or hide tokens, for a critic that has to see all of them."""
    for name, enabled, remedy in (
        ("async_scheduling", config.scheduler_config.async_scheduling, "pass --no-async-scheduling"),
        ("kv_transfer_config", config.kv_transfer_config is not None, "leave it out"),
        ("enable_prompt_embeds", config.model_config.enable_prompt_embeds, "leave it out"),
    ):
        if enabled:
            raise CriticError(
                f"{name} is enabled, which hides tokens from the critic; a critic with a memory and a value model need "
                "to see all of them.",
                f"{remedy}, or serve a hidden-state critic without a memory.",
            )


def _calling_engine() -> Any:
    """Return the configuration of the engine that validates a request, or None if no caller has one.

    vLLM passes only the request to `validate_params`, and one process may hold engines with different critics, so the
    engine is found on the call stack. Otherwise the environment variable decides.
    """
    frame = sys._getframe(1)
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        config = getattr(frame.f_locals.get("self"), "vllm_config", None)
        if isinstance(config, VllmConfig):
            return config
    return None


def _tilt_of(params: SamplingParams, critic: Critic) -> Tilt | None:
    """Parse the tilt of a request from its sampling parameters."""
    return parse_tilt(params.extra_args, params.temperature, critic, params.max_tokens)
