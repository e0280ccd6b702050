"""What a policy's own generation config says never changes which distribution is sampled from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, WatermarkingConfig

import mavis
from mavis.errors import ConfigError, DecodingError
from mavis.policies import generation_config
from mavis.policies.generation_config import (
    ALLOWED,
    NEUTRAL_PENALTIES,
    NEUTRAL_SAMPLING,
    NEUTRAL_SEARCH,
    REFUSED,
    SET,
    check_replayable,
    neutral_generation_config,
    special_tokens_config,
)
from mavis.rewards import Brevity
from mavis.rollouts import RolloutPlan, RolloutSettings, collect
from mavis.rollouts.sampling import sample
from tests.factories import word_policy, word_tokenizer

PROMPTS = ["once upon a time", "the dog", "she said"]
SETTINGS = RolloutSettings(max_new_tokens=24)

# Values that are not neutral, of every field that has a neutral value.
NOISE: dict[str, Any] = {
    "repetition_penalty": 1.8,
    "encoder_repetition_penalty": 1.4,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "guidance_scale": 2.0,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "penalty_alpha": 0.6,
    "top_p": 0.5,
    "min_p": 0.2,
    "typical_p": 0.6,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "min_length": 30,
    "min_new_tokens": 20,
    "max_time": 1e-6,
    "num_beams": 4,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "early_stopping": True,
    "length_penalty": 3.0,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "token_healing": True,
    "use_mtp": True,
    "is_assistant": True,
    "low_memory": True,
}

DISABLED_BY_NONE_ALONE: dict[str, Any] = {
    "suppress_tokens": [5],
    "begin_suppress_tokens": [5],
    "bad_words_ids": [[5]],
    "sequence_bias": [[[5], 2.0]],
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 0,
    "exponential_decay_length_penalty": [2, 1.5],
    "constraints": [1],
    "force_words_ids": [[5]],
    "stop_strings": ["dog"],
    "top_h": 0.4,
    "watermarking_config": WatermarkingConfig(),
    "dola_layers": "low",
    "prompt_lookup_num_tokens": 2,
    "assistant_early_exit": 1,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash",
}


@pytest.fixture
def tokenizer() -> Any:
    return word_tokenizer()


@pytest.fixture
def set_config() -> Callable[..., Any]:
    """Build the word policy whose own generation config sets some fields."""

    def build(**fields: Any) -> Any:
        policy = word_policy()
        for name, value in fields.items():
            setattr(policy.generation_config, name, value)
        return policy

    return build


def test_every_field_of_transformers_is_in_exactly_one_class() -> None:
    classes = [SET, NEUTRAL_PENALTIES.keys(), NEUTRAL_SAMPLING.keys(), NEUTRAL_SEARCH.keys(), ALLOWED, REFUSED]
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    classified = [name for one in classes for name in one]
    assert sorted(set(classified)) == sorted(classified)
    assert fields - set(classified) == set(), "a field of this version of transformers that nobody has classified"


def test_neutral_values_are_those_that_generate_falls_back_to() -> None:
    defaults = GenerationConfig()._get_default_generation_params()
    for name, value in (NEUTRAL_PENALTIES | NEUTRAL_SAMPLING | NEUTRAL_SEARCH).items():
        if defaults.get(name) is not None:
            assert value == defaults[name], name
    assert not [name for name in REFUSED if defaults.get(name) is not None]


def test_the_values_tried_below_cover_every_field() -> None:
    assert NOISE.keys() == NEUTRAL_PENALTIES.keys() | NEUTRAL_SAMPLING.keys() | NEUTRAL_SEARCH.keys()
    assert DISABLED_BY_NONE_ALONE.keys() == REFUSED


@pytest.mark.parametrize("name", NOISE)
def test_rollouts_set_aside_what_has_a_neutral_value(set_config: Any, tokenizer: Any, name: str) -> None:
    expected = sample(word_policy(), tokenizer, PROMPTS, SETTINGS, seed=3)
    policy = set_config(**{name: NOISE[name]})
    check_replayable(policy)
    before = policy.generation_config.to_dict()
    assert sample(policy, tokenizer, PROMPTS, SETTINGS, seed=3) == expected
    assert policy.generation_config.to_dict() == before


def test_rollouts_set_aside_all_of_it_at_once(set_config: Any, tokenizer: Any) -> None:
    noise = NOISE | {"do_sample": False, "temperature": 0.3, "top_k": 2}
    expected = sample(word_policy(), tokenizer, PROMPTS, SETTINGS, seed=3)
    assert sample(set_config(**noise), tokenizer, PROMPTS, SETTINGS, seed=3) == expected


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_rollouts_refuse_what_cannot_be_set_aside(set_config: Any, tokenizer: Any, tmp_path: Path, name: str) -> None:
    policy = set_config(**{name: DISABLED_BY_NONE_ALONE[name]})
    plan = RolloutPlan.reference(PROMPTS, 1)
    message = rf"policy\.generation_config\.{name} is .*Hint: set policy\.generation_config\.{name} = None, or remove"
    with pytest.raises(ConfigError, match=message):
        list(collect(policy, tokenizer, {"short": Brevity()}, plan, tmp_path, SETTINGS))
    with pytest.raises(DecodingError, match=rf"policy\.generation_config\.{name} is "):
        sample(policy, tokenizer, PROMPTS, SETTINGS, seed=3)


@pytest.mark.parametrize("sampling", [True, False])
@pytest.mark.parametrize("name", NOISE)
def test_generation_sets_aside_the_policys_own_fields(set_config: Any, name: str, sampling: bool) -> None:
    config, _ = neutral_generation_config(set_config(**{name: NOISE[name]}), 0.7, {"do_sample": sampling})
    if sampling or name not in NEUTRAL_SAMPLING:
        assert getattr(config, name) == (NEUTRAL_PENALTIES | NEUTRAL_SAMPLING | NEUTRAL_SEARCH)[name]


@pytest.mark.parametrize("name", NOISE)
def test_an_argument_of_the_caller_counts(set_config: Any, name: str) -> None:
    config, rest = neutral_generation_config(set_config(**{name: NOISE[name]}), 0.7, {name: NOISE[name]})
    assert (getattr(config, name), rest) == (NOISE[name], {})


@pytest.mark.parametrize("name", NEUTRAL_SEARCH)
def test_a_config_of_the_caller_counts_for_the_search(set_config: Any, name: str) -> None:
    given = GenerationConfig()
    setattr(given, name, NOISE[name])
    config, _ = neutral_generation_config(set_config(), 0.7, {"generation_config": given})
    assert getattr(config, name) == NOISE[name]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_generation_refuses_the_policys_own_field_unless_the_caller_chooses(set_config: Any, name: str) -> None:
    value = DISABLED_BY_NONE_ALONE[name]
    policy = set_config(**{name: value})
    for arguments in ({}, {name: None}, {"generation_config": GenerationConfig()}):
        with pytest.raises(DecodingError, match=rf"generation_config\.{name} is .*or pass {name} to mavis\.generate"):
            neutral_generation_config(policy, 1.0, arguments)
    given = GenerationConfig()
    setattr(given, name, value)
    for arguments in ({name: value}, {"generation_config": given}):
        config, _ = neutral_generation_config(policy, 1.0, arguments)
        assert getattr(config, name) == value


def test_a_field_of_a_newer_transformers_is_refused(set_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Newer(GenerationConfig):
        def __init__(self, **fields: Any) -> None:
            super().__init__(**fields)
            self.swirl = fields.get("swirl")

    monkeypatch.setattr(generation_config, "GenerationConfig", Newer)
    generation_config._refused.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"policy\.generation_config\.swirl is 3"):
            check_replayable(set_config(swirl=3))
        check_replayable(set_config(swirl=None))
    finally:
        generation_config._refused.cache_clear()


def test_a_models_own_key_that_transformers_does_not_know_is_let_be(set_config: Any, tokenizer: Any) -> None:
    policy = set_config(chat_format="chatml", max_window_size=6144)
    check_replayable(policy)
    expected = sample(word_policy(), tokenizer, PROMPTS, SETTINGS, seed=3)
    assert sample(policy, tokenizer, PROMPTS, SETTINGS, seed=3) == expected


def test_only_special_tokens_are_kept_for_training_by_trl(set_config: Any) -> None:
    policy = set_config(**NOISE, do_sample=True, top_k=3, eos_token_id=[2, 9])
    kept = special_tokens_config(policy)
    assert {name: value for name, value in vars(kept).items() if value is not None} == {
        name: value
        for name, value in vars(GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=[2, 9])).items()
        if value is not None
    }
    copied = copy.deepcopy(policy)
    copied.generation_config = kept
    assert policy.generation_config.num_beams == 4


@pytest.mark.parametrize("do_sample", [True, False])
def test_a_tilted_generation_of_a_policy_with_any_config_is_the_same(
    set_config: Any, tokenizer: Any, do_sample: bool
) -> None:
    outputs = []
    for policy in (word_policy(), set_config(**NOISE)):
        critic = mavis.HiddenStateCritic.for_policy(policy, ["a"], hidden=8, rank=4, seed=1)
        with torch.no_grad():
            critic.heads.outer.normal_(generator=torch.Generator().manual_seed(0))
        inputs = mavis.policies.encode_prompts(tokenizer, PROMPTS)
        torch.manual_seed(0)
        outputs.append(
            mavis.generate(
                policy, inputs, critic=critic, weights=[1.0], beta=2.0, max_new_tokens=12, do_sample=do_sample
            )
        )
    assert torch.equal(*outputs)
