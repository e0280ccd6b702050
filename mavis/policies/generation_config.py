"""Generation configs under which samples come from the tilted distribution and nothing else."""

from __future__ import annotations

import copy
from typing import Any

from mavis.errors import ConfigError, DecodingError
from mavis.policies.protocol import CausalLM

# Settings of a model's generation_config that change the scores beside the tilt, with the value that has no effect.
# `generate` fills None from that config again, so the neutral value has to be explicit.
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


def neutral_generation_config(
    policy: CausalLM, temperature: float, arguments: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Build a generation config that leaves a tilted distribution alone.

    Args:
        policy: a causal LM; the penalties and filters of its `generation_config` are disabled.
        temperature: T that `generate` divides the scores by.
        arguments: the caller's arguments of `generate`; `do_sample` is filled in.

    Returns:
        The config, and the arguments that are not part of it.

    Raises:
        DecodingError: if the policy's own config has a setting that cannot be disabled.
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


def end_token_ids(policy: Any) -> set[int]:
    """Return the ids of the tokens that end a response; empty if the policy is None or has none."""
    end = getattr(getattr(policy, "generation_config", None), "eos_token_id", None)
    return set() if end is None else set(end) if isinstance(end, list | tuple) else {int(end)}


# Settings of a policy's generation_config whose effect on the scores is not reproduced when responses are replayed.
_NOT_REPLAYED = (
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "sequence_bias",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "min_length",
    "min_new_tokens",
)


def check_replayable(policy: CausalLM) -> None:
    """Check that a policy samples from its own distribution, so that replaying a response reproduces its scores.

    Raises:
        ConfigError: if its generation_config changes the scores.
    """
    for name in _NOT_REPLAYED:
        value = getattr(policy.generation_config, name, None)
        if value not in (None, 0, []):
            raise ConfigError(
                f"policy.generation_config.{name} is {value!r}, so its samples do not come from its own distribution.",
                f"set policy.generation_config.{name} = None while the critic is trained and evaluated.",
            )
