"""`mavis.generate`: one call that sets the tilt and `generate` to agree with each other."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList

from mavis.critics import Critic
from mavis.critics.capture import attached_critic
from mavis.decoding.processor import MavisTilt
from mavis.decoding.weights import Weights
from mavis.errors import PAD_ON_THE_LEFT, DecodingError

# What a model's own generation_config would do to the scores beside the tilt, and the value that does nothing.
# `generate` fills None from that configuration again, so a neutral value has to be explicit.
_NEUTRAL_PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "renormalize_logits": False,
}
_NEUTRAL_SAMPLING: dict[str, Any] = {
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


def generate(
    policy: Any,
    inputs: Mapping[str, Tensor] | Tensor,
    *,
    weights: Weights,
    critic: Critic | Sequence[Critic] | None = None,
    beta: float | Sequence[float] | Tensor | None = None,
    target_kl: float | None = None,
    top_k: int | None = 40,
    temperature: float = 1.0,
    entropy_gate: float | None = None,
    **generate_arguments: Any,
) -> Any:
    """Generate from a policy under preference weights.

    Samples from π(a|s) ∝ π_ref(a|s)^{1/T} · exp(Σ_m β w_m Q_m(s, a)) over the top-k candidates. The policy's own
    `generation_config` does not interfere: temperature, top-k, top-p and penalties in it are set aside, and come back
    only if they are named in this call.

    Args:
        policy: a causal LM that can `generate`.
        inputs: what its tokenizer returned (`input_ids` and `attention_mask`), padded on the left, or ids (B, L).
        weights: see `MavisTilt`.
        critic: one, or several under one tilt; attached for this call if it is not attached yet; None takes the one
            attached to the policy.
        beta: see `MavisTilt`.
        target_kl: see `MavisTilt`.
        top_k: see `MavisTilt`.
        temperature: T > 0, for the tilt and for `generate`.
        entropy_gate: see `MavisTilt`.
        generate_arguments: anything else `policy.generate` takes, such as `max_new_tokens`, `num_beams`,
            `do_sample` (True unless given) or further logits processors, which run before the tilt.

    Returns:
        What `policy.generate` returns: ids (B, L + new), or its output object.

    Raises:
        CriticError: if no critic is given or attached, or it is attached to another policy.
        DecodingError, WeightsError: see `MavisTilt`; also for inputs that are no tensors or padded on the right.
    """
    tilt = MavisTilt(
        weights,
        critic if critic is not None else attached_critic(policy),
        beta=beta,
        target_kl=target_kl,
        top_k=top_k,
        temperature=temperature,
        entropy_gate=entropy_gate,
    )
    arguments = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
    if not isinstance(inputs, Mapping | Tensor):
        raise DecodingError(
            f"inputs is a {type(inputs).__name__}, expected what the tokenizer returns, or token ids.",
            PAD_ON_THE_LEFT,
        )
    mask = arguments.get("attention_mask")
    if mask is not None and mask.dim() == 2 and not bool(mask[:, -1].all()):
        raise DecodingError(
            "inputs is padded on the right, so that responses would go on from padding.",
            PAD_ON_THE_LEFT,
        )
    clash = sorted(set(arguments) & set(generate_arguments))
    if clash:
        raise DecodingError(f"{clash[0]} is given twice, in inputs and by name.", "give it once.")
    earlier = generate_arguments.pop("logits_processor", None)
    processors = LogitsProcessorList([*(earlier if earlier is not None else []), tilt])
    config, others = agreeing_config(policy, temperature, generate_arguments)
    assert tilt.critic is not None
    with tilt.critic.attached_to(policy):
        return policy.generate(**arguments, generation_config=config, logits_processor=processors, **others)


def agreeing_config(policy: Any, temperature: float, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Build a generation config that leaves a tilted distribution alone.

    Args:
        policy: whose `generation_config` is set aside.
        temperature: T that `generate` is to divide by.
        arguments: what the caller asked `generate` for; `do_sample` is filled in.

    Returns:
        The config, and the arguments it has no place for.

    Raises:
        DecodingError: if the policy's own configuration holds what cannot be set aside.
    """
    inherited = policy.generation_config
    if getattr(inherited, "top_h", None) is not None:  # has no neutral value, and None would be filled in again
        raise DecodingError(
            f"policy.generation_config.top_h is {inherited.top_h}, which would cut the tilted distribution.",
            "set policy.generation_config.top_h = None.",
        )
    given = arguments.pop("generation_config", None)
    config = copy.deepcopy(given if given is not None else inherited)
    sampling = arguments.setdefault("do_sample", True if given is None or given.do_sample is None else given.do_sample)
    neutral = _NEUTRAL_PENALTIES | (_NEUTRAL_SAMPLING if sampling else {})
    for name, value in neutral.items():
        if getattr(config, name, None) is not None or getattr(inherited, name, None) is not None:
            setattr(config, name, value)
    if sampling:
        config.top_k, config.temperature = 0, temperature
    others = config.update(**arguments)
    return config, others
