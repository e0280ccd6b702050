"""Rewards of objectives that have changed since are never mixed with new ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mavis.errors import DataError
from mavis.rewards import Brevity, Objective, Positive
from mavis.rollouts import RolloutPlan, RolloutSettings, collect
from mavis.rollouts.manifest import (
    changed_objectives,
    matches_scored_manifest,
    settings_manifest,
    write_scored_manifest,
)
from mavis.training import FitSettings, ImprovementSettings
from mavis.utils.files import read_json, write_json

MONTE_CARLO = FitSettings(target="monte_carlo")
MANIFEST = {"plan": "abc", "objectives": ["mine", "brevity"]}


def counting(mark: str) -> Objective:
    return lambda prompts, responses: [float(response.count(mark)) for response in responses]


def matches(path: Path, mine: Objective, manifest: dict[str, Any] = MANIFEST, brevity: Objective | None = None) -> bool:
    objectives = {"mine": mine, "brevity": brevity or Brevity()}
    return matches_scored_manifest(path, manifest, objectives, "rollouts with different")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The manifest of a folder with a shard."""
    (tmp_path / "shard-00000").mkdir()
    write_scored_manifest(tmp_path / "plan.json", MANIFEST, {"mine": counting("!"), "brevity": Brevity()})
    return tmp_path / "plan.json"


def test_settings_that_the_first_release_did_not_have_are_named_only_where_they_do_something() -> None:
    """So that runs which it started can resume."""
    plain = settings_manifest(ImprovementSettings())
    assert "kl_label" not in plain
    assert "zeta" in plain
    paper = ImprovementSettings("independent", reuse=False, zeta=0.02, kl_label="whole_response", fit=MONTE_CARLO)
    assert settings_manifest(paper)["kl_label"] == "whole_response"
    assert "min_new_tokens" not in settings_manifest(RolloutSettings())
    assert settings_manifest(RolloutSettings(min_new_tokens=1))["min_new_tokens"] == 1


def test_the_same_objectives_match(path: Path) -> None:
    assert matches(path, counting("!"))
    assert not matches(path.with_name("nothing.json"), counting("!"))


def test_an_objective_that_has_changed_is_named(path: Path) -> None:
    with pytest.raises(DataError) as caught:
        matches(path, counting("?"))
    assert caught.value.message == (
        f"folder {str(path.parent)!r} holds rewards of other objectives: 'mine' has changed since, in its code, its "
        "options, its files or the version of a package that it uses."
    )
    with pytest.raises(DataError, match="holds rewards of other objectives: 'brevity' has changed since"):
        matches(path, counting("!"), brevity=Brevity(scale=3))


def test_other_differences_come_first(path: Path) -> None:
    with pytest.raises(DataError, match="holds rollouts with different plan"):
        matches(path, counting("?"), MANIFEST | {"plan": "def"})


def test_a_run_without_results_may_change(path: Path) -> None:
    (path.parent / "shard-00000").rmdir()
    assert not matches(path, counting("?"))


def test_a_manifest_of_the_first_release_matches_objectives_that_score_as_then(path: Path) -> None:
    write_json(path, MANIFEST)
    assert matches(path, counting("!"), brevity=Positive())
    with pytest.raises(DataError, match="'brevity' has changed since"):
        matches(path, counting("!"))


def test_a_resumed_collection_refuses_an_objective_that_has_changed(
    tiny_policy: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    def run(objective: Callable[[Sequence[str], Sequence[str]], Any]) -> Any:
        plan = RolloutPlan.reference(["the dog", "she said"], 1)
        settings = RolloutSettings(max_new_tokens=4)
        return list(collect(tiny_policy, tiny_tokenizer, {"mine": objective}, plan, tmp_path, settings))

    first = run(counting("a"))
    assert [shard.to_dict() for shard in run(counting("a"))] == [shard.to_dict() for shard in first]
    with pytest.raises(DataError, match="'mine' has changed since"):
        run(counting("e"))
    assert list(read_json(tmp_path / "plan.json")["scoring"]) == ["mine"]


def test_another_version_of_python_is_named_as_the_cause_for_compiled_code(path: Path) -> None:
    manifest = read_json(path)
    assert manifest["scoring_python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    write_json(path, manifest | {"scoring_python": "3.10"})
    assert matches(path, counting("!"))  # whose compiled code happens to be the same
    with pytest.raises(DataError, match=r"scored under Python 3\.10, and this is Python 3\.\d+, .*'mine'"):
        matches(path, counting("?"))
    with pytest.raises(DataError, match="'brevity' has changed since"):
        matches(path, counting("!"), brevity=Brevity(scale=3))
    with pytest.warns(UserWarning, match=r"is of Python 3\.10, .*'mine' has changed cannot be told"):
        assert changed_objectives(path, {"mine": counting("?"), "brevity": Brevity(scale=3)}) == ["brevity"]
