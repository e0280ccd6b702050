"""`MavisLogitsProcessor`: the tilt inside vLLM, opted into by its class name.

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

from mavis.errors import CriticError, DecodingError
from mavis.vllm.batch import Row, TiltedBatch
from mavis.vllm.recurrent_rows import Parked
from mavis.vllm.request_arguments import asks_for_tilt, read_tilt
from mavis.vllm.served_critic import critic_folder, described, follows_tokens, served_critic

_caught = threading.local()
_PARKED = "_mavis_parked"


class CatchingLogitsLayer(LogitsLayer):
    """vLLM's logits layer, which lets the tilt see the hidden states of the rows whose logits it computes."""

    def forward(self, lm_head: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """Compute the logits (R, V) of hidden states (R, H), and keep the latter until they are asked for."""
        _caught.states = hidden_states
        logits: Tensor | None = LogitsLayer.forward(self, lm_head, hidden_states, *args, **kwargs)
        return logits


# The engine imports this module before it builds the model, whose logits layer is then of the class registered here.
if LogitsLayer.__name__ in op_registry_oot:
    raise CriticError(
        f"another package has put {op_registry_oot[LogitsLayer.__name__].__qualname__} in the place of vLLM's logits "
        "layer, so that the hidden states cannot be seen.",
        "leave that package out of this engine.",
    )
LogitsLayer.register_oot(CatchingLogitsLayer, name=LogitsLayer.__name__)


class MavisLogitsProcessor(LogitsProcessor):
    """Tilt requests that ask for it towards their own weighted objectives; leave all others alone.

        π(a|s) ∝ π_ref(a|s)^{1/T} · exp(Σ_m λ_m Q_m(s, a)),   λ = β·w,   a ∈ top-K of π_ref(·|s)

    T is the request's own temperature. A greedy request (T = 0) takes the likeliest token of the distribution at T = 1.
    Bans that arrive as −inf (allowed tokens, bad words, `min_tokens`, structured output, `logit_bias`) are part of
    π_ref and stay; penalties, `min_p`, `top_k` and `top_p` of the request act on the tilted distribution.

    The critic folder is named by `additional_config={"mavis_critic": ...}` or else by the environment's `MAVIS_CRITIC`;
    a request's arguments in `SamplingParams.extra_args`, or REST `vllm_xargs`, are those of `read_tilt`.

    Args:
        vllm_config: of the engine.
        device: of its logits.
        is_pin_memory: not used.

    Raises:
        CriticError: if no critic is named, it does not fit the model, or the engine has a feature that is refused.

    Source: MAVIS, arXiv 2508.13415.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        folder = critic_folder(vllm_config.additional_config)
        _check_engine(vllm_config)
        model = vllm_config.model_config
        critic = served_critic(folder, str(model.model), model.get_hidden_size(), model.get_vocab_size())
        if follows_tokens(critic):
            _check_engine_for_tokens(vllm_config)
        self._critic = critic.to(device).requires_grad_(False)
        # A value model's room is set aside before the engine measures how much memory is left for its own.
        self._batch = TiltedBatch(self._critic, (vllm_config.scheduler_config.max_num_seqs, model.max_model_len))

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request whose arguments cannot be used; the engine answers it with status 400.

        Args:
            sampling_params: of the request.

        Raises:
            RequestError: naming the argument.
        """
        if asks_for_tilt(sampling_params.extra_args):
            engine = _asking_engine()
            folder = critic_folder(engine.additional_config if engine is not None else None)
            critic = described(folder, engine.instance_id if engine is not None else "")
            read_tilt(sampling_params.extra_args, sampling_params.temperature, critic)

    def is_argmax_invariant(self) -> bool:
        """Say that a tilt changes which token is the likeliest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests that join, leave and change places.

        Args:
            batch_update: what has changed since the last step, or None.

        Raises:
            DecodingError: if a request comes back whose memory is not known.
        """
        self._batch.step()
        if batch_update is None:
            return
        added = [(at, self._row(params, prompt, outputs)) for at, params, prompt, outputs in batch_update.added]
        moved = [(one, two, how is MoveDirectionality.SWAP) for one, two, how in batch_update.moved]
        self._batch.change(batch_update.batch_size, batch_update.removed, added, moved)

    def apply(self, logits: Tensor) -> Tensor:
        """Tilt the rows that ask for it.

        Args:
            logits: (R, V) float32, the rows of the batch; changed in place.

        Returns:
            `logits`.

        Raises:
            DecodingError: if the hidden states that were caught last are not those of these rows.
        """
        batch = self._batch
        if not batch.any_tilted:
            return logits
        states: Tensor | None = getattr(_caught, "states", None)
        _caught.states = None
        if states is None or len(states) != len(logits) or len(logits) != batch.size:
            raise DecodingError(
                f"the engine gives {len(logits)} rows of logits for {batch.size} requests, and the hidden states that "
                f"were caught have {None if states is None else len(states)} rows.",
                "report this with the model's name: its logits do not come from vLLM's logits layer, row by row.",
            )
        return batch.apply(logits, states)

    def _row(self, params: SamplingParams, prompt: list[int] | None, outputs: list[int]) -> Row | None:
        if not asks_for_tilt(params.extra_args):
            return None
        with warnings.catch_warnings():  # what there is to warn about has been said where the request was validated
            warnings.simplefilter("ignore")
            tilt = read_tilt(params.extra_args, params.temperature, self._critic)
        if tilt is None:
            return None
        # The engine keeps a request's parameters exactly as long as the request can come back.
        parked = params.__dict__.setdefault(_PARKED, Parked())
        return Row(tilt, outputs, parked, prompt or ())


def _check_engine(config: VllmConfig) -> None:
    """Refuse what is not covered; speculative decoding and pooling vLLM itself refuses beside any logits processor."""
    parallel = config.parallel_config
    for name, value in {
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
    }.items():
        if value != 1:
            raise CriticError(f"{name} is {value}, but a tilt is tested with 1 only.", f"set {name}=1.")
    if config.lora_config is not None:
        raise CriticError(
            "enable_lora is True, but a critic is of one policy and its requests may be of several.",
            "serve the merged model, with a critic that was trained on it.",
        )


def _check_engine_for_tokens(config: VllmConfig) -> None:
    """Refuse what draws, drops or hides tokens, for a critic that has to know of all."""
    for name, on, remedy in (
        ("async_scheduling", config.scheduler_config.async_scheduling, "pass --no-async-scheduling"),
        ("kv_transfer_config", config.kv_transfer_config is not None, "leave it out"),
        ("enable_prompt_embeds", config.model_config.enable_prompt_embeds, "leave it out"),
    ):
        if on:
            raise CriticError(
                f"{name} is on, under which the critic does not see every token; it has a memory of them, or reads "
                "them itself.",
                f"{remedy}, or serve a critic of hidden states without a memory.",
            )


def _asking_engine() -> Any:
    """Return the configuration of the engine that asks to validate a request, or None if no caller has one.

    `validate_params` is told the request only, and one process may hold engines with different critics; so the engine
    is looked for among the callers. Without one the environment has to name the critic.
    """
    frame = sys._getframe(1)
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        config = getattr(frame.f_locals.get("self"), "vllm_config", None)
        if isinstance(config, VllmConfig):
            return config
    return None
