"""A tilt warns once if `generate` was not told what the tilt was told."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, WatermarkingConfig

import mavis
from mavis import HiddenStateCritic, MavisTilt

MakeCritic = Callable[..., HiddenStateCritic]
Inputs = dict[str, torch.Tensor]


def sampled(policy: Any, critic: Any, inputs: Inputs, tilt: MavisTilt, **arguments: Any) -> list[str]:
    """Sample twice under one tilt, and return the warnings."""
    with critic.attach(policy), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            policy.generate(**inputs, **({"do_sample": True, "max_new_tokens": 3} | arguments), logits_processor=tilt)
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("arguments", "found", "hint"),
    [
        (
            {"temperature": 0.3, "top_k": 0},
            "divides by temperature=0.3, but the tilt has temperature=1",
            "temperature=1",
        ),
        ({"top_k": 5}, "cuts the tilted distribution by top_k=5", "top_k=0"),
        ({"top_k": 0, "top_p": 0.5}, "cuts the tilted distribution by top_p=0.5", "top_p=1"),
        ({"top_k": 0, "min_p": 0.1}, "cuts the tilted distribution by min_p=0.1", "min_p=0"),
        ({"top_k": 0, "typical_p": 0.9}, "cuts the tilted distribution by typical_p=0.9", "typical_p=1"),
        ({"top_k": 0, "epsilon_cutoff": 0.01}, "cuts the tilted distribution by epsilon_cutoff=0.01", "=0 to"),
        ({"top_k": 0, "eta_cutoff": 0.01}, "cuts the tilted distribution by eta_cutoff=0.01", "=0 to"),
        ({"top_k": 0, "top_h": 0.5}, "cuts the tilted distribution by top_h=0.5", "top_h=None"),
        (
            {"temperature": 0.3, "top_p": 0.5, "top_k": 5},
            "divides by temperature=0.3, but the tilt has temperature=1 and cuts the tilted distribution by top_k=5, "
            "top_p=0.5",
            "pass temperature=1, top_k=0, top_p=1 to generate, or use mavis.generate",
        ),
        ({"top_k": 0, "watermarking_config": WatermarkingConfig()}, "adds a watermark", "watermarking_config=None"),
    ],
)
def test_it_warns_once_of_what_acts_after_the_tilt(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, arguments: dict[str, Any], found: str, hint: str
) -> None:
    critic = make_critic(llama)
    (message,) = sampled(llama, critic, prompts, MavisTilt([1.0, 0.3], critic, beta=1.0, top_k=None), **arguments)
    assert message.startswith(f"after the tilt, generate {found}")
    assert hint in message.partition("Hint: ")[2]


def test_the_default_top_k_of_generate_is_noticed(make_critic: MakeCritic) -> None:
    policy, tokenizer = mavis.embedded.load()
    critic = HiddenStateCritic.for_policy(policy, ["a"], hidden=8, rank=4)
    inputs = dict(tokenizer("Once upon a time", return_tensors="pt"))
    with critic.attach(policy), pytest.warns(UserWarning, match="cuts the tilted distribution by top_k=50"):
        policy.generate(**inputs, do_sample=True, max_new_tokens=2, logits_processor=MavisTilt([1.0], critic, beta=1.0))


def test_what_the_policys_own_config_says_is_noticed(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    policy = copy.deepcopy(llama)
    policy.generation_config = GenerationConfig(do_sample=True, top_p=0.5, top_k=0, pad_token_id=0)
    critic = make_critic(policy)
    with critic.attach(policy), pytest.warns(UserWarning, match="cuts the tilted distribution by top_p=0.5"):
        policy.generate(**prompts, max_new_tokens=2, logits_processor=MavisTilt([1.0, 0.3], critic, beta=1.0))


def test_rows_that_pass_through_are_cut_by_what_spares_the_candidates(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    for options, expected in (
        ({"weights": [1.0, 0.3]}, 0),
        ({"weights": [[1.0, 0.3], [0.0, 0.0], [1.0, 0.0]]}, 1),
        ({"weights": [1.0, 0.3], "entropy_gate": 0.1}, 1),
    ):
        tilt = MavisTilt(**options, critic=critic, beta=1.0, top_k=5)
        assert len(sampled(llama, critic, prompts, tilt, top_k=9)) == expected


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {"top_k": 0}),
        ({"top_k": 5}, {"top_k": 5}),
        ({"top_k": 5}, {}),
        ({}, {"top_k": 40}),  # every token of this policy
        ({"temperature": 0.7}, {"top_k": 0, "temperature": 0.7}),
        ({"temperature": 0.7}, {"do_sample": False, "top_k": 5, "top_p": 0.5}),  # these act on samples only
        ({}, {"do_sample": False, "num_beams": 2, "repetition_penalty": 1.4}),  # this acts before the tilt
        ({"beta": 0.0}, {"top_k": 3, "top_p": 0.5, "temperature": 0.3}),  # the plain policy, as it is wanted
    ],
)
def test_it_is_silent_where_both_sides_agree(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, options: dict[str, Any], arguments: dict[str, Any]
) -> None:
    critic = make_critic(llama)
    assert (
        sampled(llama, critic, prompts, MavisTilt([1.0, 0.3], critic, **({"beta": 1.0} | options)), **arguments) == []
    )


def test_what_mavis_generate_is_told_by_name_is_wanted(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    critic = make_critic(llama)
    out = mavis.generate(
        llama, prompts, critic=critic, weights=[1.0, 0.3], beta=1.0, top_p=0.5, temperature=0.7, max_new_tokens=3
    )
    assert out.shape == (3, 8)


def test_a_step_outside_of_generate_has_nothing_to_compare(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    with critic.attach(llama):
        scores = llama(**prompts).logits[:, -1]
        tilted = MavisTilt([1.0, 0.3], critic, beta=1.0)(prompts["input_ids"], scores)
    assert tilted.shape == scores.shape
