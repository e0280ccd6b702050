"""Preference weights that a tilt takes, and those that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mavis import MavisTilt
from mavis.errors import WeightsError
from tests.decoding.steps import Inputs, MakeCritic


def test_rows_of_weights_serve_groups_of_equal_prompts_only(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    four = {name: tensor[[0, 0, 1, 2]] for name, tensor in prompts.items()}
    arguments = {"do_sample": False, "max_new_tokens": 3}
    with critic.attach(llama):
        with pytest.raises(WeightsError, match="row 1 would be used for batch rows 2 to 3, but their prompts differ"):
            llama.generate(**four, **arguments, logits_processor=MavisTilt([[1.0, 0.0], [0.0, 1.0]], critic, beta=1.0))
        with pytest.raises(WeightsError, match="2 rows, but the batch has 3, which is no multiple"):
            llama.generate(
                **prompts, **arguments, logits_processor=MavisTilt([[1.0, 0.0], [0.0, 1.0]], critic, beta=1.0)
            )
        tilt = MavisTilt([[1.0, 0.0], [0.0, 1.0]], critic, beta=1.0)
        pairs = {name: tensor[[0, 0, 1, 1]] for name, tensor in prompts.items()}
        llama.generate(**pairs, **arguments, logits_processor=tilt)
        with pytest.raises(WeightsError, match="prompts differ"):  # also when an earlier generation was right
            llama.generate(**four, **arguments, logits_processor=tilt)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"helpfull": 1.0},
            "weights names objective 'helpfull', but the critic has: helpful, short. Hint: did you mean",
        ),
        ({}, "weights is empty, but the critic has: helpful, short"),
        ([], r"weights is \[\], expected weights for: helpful, short"),
        ([1.0], "has 2 objectives: helpful, short"),
        ([1.0, 2.0, 3.0], "has 2 objectives: helpful, short"),
        (torch.ones(2, 2, 2), r"weights has shape \(2, 2, 2\)"),
        ({"helpful": float("nan")}, "weights for objective 'helpful' is nan, expected a finite number"),
        ([0.0, float("inf")], "weights for objective 'short' is inf, expected a finite number"),
        ({"helpful": "much"}, "expected numbers"),
        ([[1.0, 0.0], [1.0]], "expected 2 numbers"),
        ([{"helpful": 1.0}, [0.0, 1.0]], "do not mix forms"),
        ("helpful", "weights is 'helpful', expected weights for"),
        (None, "weights is None, expected weights for"),
    ],
)
def test_bad_weights_are_refused_where_the_tilt_is_built(
    llama: Any, make_critic: MakeCritic, weights: Any, message: str
) -> None:
    critic = make_critic(llama, ("helpful", "short"))
    with pytest.raises(WeightsError, match=message):
        MavisTilt(weights, critic, beta=1.0)


def test_weights_and_beta_with_different_numbers_of_rows_are_refused(llama: Any, make_critic: MakeCritic) -> None:
    with pytest.raises(WeightsError, match="weights has 2 rows but beta has 3"):
        MavisTilt([[1.0, 0.5], [0.0, 1.0]], make_critic(llama), beta=[1.0, 2.0, 3.0])
