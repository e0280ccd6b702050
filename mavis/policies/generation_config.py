"""Generation configs under which samples come from the tilted distribution and nothing else.

Every field of transformers' `GenerationConfig` is in one of five classes: what Mavis sets itself, neutral (set aside
by a value without effect), the same for sampling only, allowed, and refused. `generate` fills a field that is None from
the policy's own config again, so a field whose only neutral value is None has to be refused.
"""

from __future__ import annotations

import copy
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

from transformers import GenerationConfig

from mavis.errors import ConfigError, DecodingError, PolicyError, first_sentence
from mavis.policies.protocol import CausalLM

SET = frozenset({"do_sample", "temperature", "top_k"})
"""Fields that Mavis sets itself."""

NEUTRAL_PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "penalty_alpha": 0.0,
}
"""Fields that change the scores, with the value that has no effect; also set aside in a caller's own config."""

NEUTRAL_SAMPLING: dict[str, Any] = {
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""The same for fields that matter in sampling only, after the logits processors."""

NEUTRAL_SEARCH: dict[str, Any] = {
    "min_length": 0,
    "min_new_tokens": 0,
    "max_time": float("inf"),
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "early_stopping": False,
    "length_penalty": 1.0,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "token_healing": False,
    "use_mtp": False,
    "is_assistant": False,
    "low_memory": False,
}
"""Fields that decide how responses are searched for, cut and returned; a caller's own config may set them."""

ALLOWED = frozenset(
    {
        *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
        *("max_length", "max_new_tokens"),
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
        *("compile_config", "disable_compile", "continuous_batching_config"),
        # These change nothing unless the caller asks for assisted decoding.
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind"),
        "transformers_version",
    }
)
"""Fields of a policy's own config that may stay as they are."""

REFUSED = frozenset(
    {
        *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"),
        *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
        *("constraints", "force_words_ids", "stop_strings", "top_h", "watermarking_config", "dola_layers"),
        *("prompt_lookup_num_tokens", "assistant_early_exit", "assistant_ensemble_weight", "speculation_type"),
    }
)
"""Fields that only None disables; a policy's own config must not set them."""


@cache
def _refused() -> list[str]:
    """List the refused fields, with those of a newer transformers that nobody has classified."""
    known = SET | NEUTRAL_PENALTIES.keys() | NEUTRAL_SAMPLING.keys() | NEUTRAL_SEARCH.keys() | ALLOWED
    return sorted(REFUSED | {name for name in vars(GenerationConfig()) if not name.startswith("_")} - known)


def _value(config: Any, name: str) -> Any:
    """Return the value of a field, or None if it is missing or an empty list."""
    value = getattr(config, name, None)
    return None if value == [] else value


def neutral_generation_config(
    policy: CausalLM, temperature: float, arguments: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Build a generation config that leaves a tilted distribution alone.

    Args:
        policy: a causal LM; what its `generation_config` says of penalties, filters, beams, limits and outputs is set
            aside.
        temperature: T that `generate` divides the scores by.
        arguments: the caller's arguments of `generate`, which count; `do_sample` is filled in. A `generation_config`
            among them counts for all but the distribution.

    Returns:
        The config, and the arguments that are not part of it.

    Raises:
        DecodingError: if the policy's own config has a setting that cannot be set aside, and the caller has not chosen
            another.
    """
    inherited = policy.generation_config
    given = arguments.pop("generation_config", None)
    for name in _refused():
        value = _value(inherited, name)
        if value is not None and arguments.get(name) is None and _value(given, name) is None:
            raise DecodingError(
                f"policy.generation_config.{name} is {value!r}, so responses would not come from the tilted "
                "distribution.",
                f"set policy.generation_config.{name} = None, or pass {name} to mavis.generate if it is wanted.",
            )
    config = copy.deepcopy(given if given is not None else inherited)
    sampling = arguments.setdefault("do_sample", True if given is None or given.do_sample is None else given.do_sample)
    neutral = NEUTRAL_PENALTIES | NEUTRAL_SEARCH | (NEUTRAL_SAMPLING if sampling else {})
    for name, value in neutral.items():
        chosen = name in NEUTRAL_SEARCH and getattr(given, name, None) is not None
        if not chosen and (getattr(config, name, None) is not None or getattr(inherited, name, None) is not None):
            setattr(config, name, value)
    if sampling:
        config.top_k, config.temperature = 0, temperature
    others = config.update(**arguments)
    return config, others


def special_tokens_config(policy: CausalLM) -> Any:
    """Build a generation config that keeps the special tokens of the policy's own and nothing else."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    return GenerationConfig(**{name: getattr(policy.generation_config, name, None) for name in names})


def end_token_ids(policy: Any) -> set[int]:
    """Return the ids of the tokens that end a response; empty if the policy is None or has none."""
    end = getattr(getattr(policy, "generation_config", None), "eos_token_id", None)
    return set() if end is None else set(end) if isinstance(end, list | tuple) else {int(end)}


def check_replayable(policy: CausalLM) -> None:
    """Check that a policy samples from its own distribution, so that replaying a response reproduces its scores.

    Raises:
        ConfigError: if its generation_config changes the scores or the responses, and cannot be set aside.
    """
    for name in _refused():
        value = _value(policy.generation_config, name)
        if value is not None:
            raise ConfigError(
                f"policy.generation_config.{name} is {value!r}, so its samples do not come from its own distribution.",
                f"set policy.generation_config.{name} = None, or remove {name} from the policy's "
                "generation_config.json, while the critic is trained and evaluated.",
            )


def check_savable(policy: CausalLM) -> None:
    """Check that a policy's generation config can be saved, before a training whose result would be saved with it.

    Raises:
        PolicyError: if transformers refuses to save it.
    """
    try:
        with TemporaryDirectory() as folder:
            policy.generation_config.save_pretrained(folder)
    except ValueError as error:
        reasons = " ".join(line.strip(" -") for line in str(error).splitlines() if line.lstrip().startswith("-"))
        raise PolicyError(
            f"policy.generation_config cannot be saved: {reasons or first_sentence(error)}",
            "set policy.generation_config.do_sample = True, or unset what only sampling uses.",
        ) from error
