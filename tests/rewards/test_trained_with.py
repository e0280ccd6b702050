"""What a checkpoint says of its training is checked before it is used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mavis.errors import ObjectiveError
from mavis.rewards.trained_with import trained_with


def model_with(entry: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(mavis_reward=entry))


def test_what_was_written_is_returned_and_other_checkpoints_say_nothing() -> None:
    written = {"template": "concat", "max_length": 256, "length_penalty": 0.5}
    assert trained_with(model_with(written)) == written
    assert trained_with(model_with(None)) == trained_with(SimpleNamespace(config=SimpleNamespace())) == {}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("chat", "mavis_reward in config.json is 'chat', expected a mapping"),
        ({"max_length": "512"}, "mavis_reward.max_length in config.json is '512', expected a whole number"),
        ({"max_length": 0}, "mavis_reward.max_length in config.json is 0, expected a whole number ≥ 1"),
        ({"length_penalty": None}, "mavis_reward.length_penalty in config.json is None, expected a finite number"),
    ],
)
def test_what_it_cannot_have_been_trained_with_is_refused(entry: Any, message: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        trained_with(model_with(entry))
    assert message in str(caught.value)
