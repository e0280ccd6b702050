"""Settings of reward models: what is refused, and how."""

from __future__ import annotations

from typing import Any

import pytest

from mavis.errors import ConfigError
from mavis.training import RewardModelSettings


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("template", "chta", "template is 'chta'. Hint: did you mean 'chat'?"),
        ("epochs", 0, "epochs is 0, expected a whole number ≥ 1"),
        ("batch_size", 2.5, "batch_size is 2.5, expected a whole number"),
        ("micro_pairs", 0, "micro_pairs is 0, expected a whole number ≥ 1. Hint: null"),
        ("learning_rate", 0, "learning_rate is 0, expected a finite number > 0"),
        ("lora_rank", -1, "lora_rank is -1, expected a whole number ≥ 0"),
        ("label_smoothing", 0.5, "label_smoothing is 0.5, expected a finite number ≥ 0 and ≤ 0.49"),
        ("length_penalty", "atuo", "length_penalty is 'atuo', expected a finite number. Hint: auto"),
        ("held_out", 0.0, "held_out is 0.0, expected a finite number > 0 and ≤ 0.5"),
        ("max_length", 1, "max_length is 1, expected a whole number ≥ 2"),
        ("precision", "float16", "precision is 'float16'. Hint: did you mean 'bfloat16'?"),
        ("save_every", None, "save_every is None, expected a whole number ≥ 1"),
    ],
)
def test_a_setting_out_of_range_is_refused(setting: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RewardModelSettings(**{setting: value})
    assert message in str(caught.value)
