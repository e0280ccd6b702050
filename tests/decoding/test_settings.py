"""Strengths, candidates and temperatures that a tilt refuses, and budgets that hold as they were measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mavis
from mavis import MavisTilt
from mavis.errors import DecodingError
from tests.decoding.steps import Inputs, MakeCritic


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": -1.0}, "beta is -1.0, expected a finite number ≥ 0.*inverse of the β of DPO"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"beta": [1.0, float("inf")]}, "beta is inf"),
        ({"beta": "strong"}, "beta is 'strong'"),
        ({"beta": 1.0, "target_kl": 2.0}, "beta is 1.0 and target_kl is 2.0; both set the strength"),
        ({"target_kl": 0.0}, "target_kl is 0.0, expected a finite number > 0"),
        ({"target_kl": 2.0}, "target_kl is 2.0, and the critic carries no calibration"),
        ({}, "beta and target_kl are not given, and the critic carries no calibration"),
        ({"beta": 1.0, "top_k": 0}, "top_k is 0, expected a whole number ≥ 1.*None makes"),
        ({"beta": 1.0, "top_k": 2.5}, "top_k is 2.5"),
        ({"beta": 1.0, "temperature": 0.0}, "temperature is 0.0, expected a finite number > 0"),
    ],
)
def test_bad_strengths_and_settings_are_refused(
    llama: Any, make_critic: MakeCritic, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(DecodingError, match=message):
        MavisTilt([1.0, 0.5], make_critic(llama), **arguments)


def test_a_budget_holds_only_for_what_it_was_measured_with(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    from mavis.critics import Calibration

    critic = make_critic(llama)
    critic.calibration = Calibration([1.0, 2.0, 4.0], [[0.5, 2.0, 8.0]] * 3, 16, top_k=7, temperature=0.8)
    measured = {"top_k": 7, "temperature": 0.8}
    arguments = {"do_sample": False, "max_new_tokens": 6}
    by_kl = mavis.generate(llama, prompts, critic=critic, weights=[1.0, 0.0], target_kl=2.0, **measured, **arguments)
    by_default = mavis.generate(llama, prompts, critic=critic, weights=[1.0, 0.0], **measured, **arguments)
    by_beta = mavis.generate(llama, prompts, critic=critic, weights=[1.0, 0.0], beta=2.0, **measured, **arguments)
    assert torch.equal(by_kl, by_beta)
    assert torch.equal(by_default, by_beta)
    for other in ({"top_k": 40}, {"top_k": 7, "temperature": 1.0}):
        with pytest.raises(DecodingError, match="calibrated with top_k=7 and temperature=0.8, but the tilt has top_k="):
            MavisTilt([1.0, 0.0], critic, target_kl=2.0, **other)
        with pytest.warns(UserWarning, match="beta is not given; the critic was calibrated with top_k=7"):
            MavisTilt([1.0, 0.0], critic, **other)
