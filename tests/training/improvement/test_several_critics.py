"""Several critics are used under one tilt, but each is trained on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mavis.critics import CriticGroup, HiddenStateCritic
from mavis.errors import ConfigError
from mavis.training import ImprovementSettings, improve


@pytest.mark.parametrize("kind", [CriticGroup, list])
def test_several_critics_are_refused_before_anything_is_sampled(
    tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, tmp_path: Path, kind: Any
) -> None:
    critics = kind(
        HiddenStateCritic.for_policy(tiny_policy, [name], hidden=4, rank=2, composition="independent")
        for name in ("good", "brevity")
    )
    settings = ImprovementSettings(composition="independent")
    run = improve(tiny_policy, tiny_tokenizer, critics, tiny_objectives, ["the dog"], tmp_path / "run", settings)
    with pytest.raises(ConfigError, match=f"critic is a {kind.__name__}, expected one critic with heads.* Hint: train"):
        next(run)
    assert not (tmp_path / "run").exists()
