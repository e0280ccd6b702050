"""What makes an objective another one: its code and what it refers to, and what does not."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mavis.rewards import (
    Brevity,
    Dialogue,
    Positive,
    RewardModel,
    Signed,
    check_batch_independence,
    exclamations,
    objective_identity,
    score,
)
from mavis.rewards.identity import depends_on_python, is_as_in_first_release, keep_identities
from tests.hash_seeds import printed_under_hash_seeds

MODULE = '''
import re

WORDS = ["good", "fine"]
PATTERN = re.compile("o+")

def helper(text):
    return text.count("!")

def unused(text):
    return 1

class Scale:
    factor = 2.0

    def times(self, number):
        return self.factor * number

def objective(prompts, responses, offset=0.0):
    """Score."""
    return [helper(r) + sum(w in r for w in WORDS) + Scale().times(len(PATTERN.findall(r))) + offset for r in responses]

class Objective:
    def __init__(self, scale=1.0):
        self.scale = scale

    @property
    def doubled(self):
        return 2 * self.scale

    def __call__(self, prompts, responses):
        return [self.doubled * helper(r) for r in responses]

def make(limit):
    def closure(prompts, responses):
        return [float(len(r) > limit) for r in responses]
    return closure

short = lambda prompts, responses: [1.0 for r in responses]
'''

Load = Callable[[str], Any]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """A function that writes the module with a given source and imports it anew."""

    def from_source(source: str) -> Any:
        path = tmp_path / "my_objectives.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("my_objectives", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        exec(compile(source, str(path), "exec"), module.__dict__)
        return module

    return from_source


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('text.count("!")', 'text.count("?")'),
        ('["good", "fine"]', '["good", "nice"]'),
        ('re.compile("o+")', 're.compile("e+")'),
        ("factor = 2.0", "factor = 3.0"),
        ("self.factor * number", "self.factor + number"),
        ("offset=0.0", "offset=1.0"),
        ("for r in responses]\n\nclass", "for r in prompts]\n\nclass"),
    ],
)
def test_a_change_of_what_a_function_does_or_uses_changes_it(load: Load, old: str, new: str) -> None:
    assert old in MODULE
    before = objective_identity(load(MODULE).objective)
    assert objective_identity(load(MODULE.replace(old, new)).objective) != before
    assert objective_identity(load(MODULE).objective) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Score."""', '"""Score responses."""'),
        ("def helper(text):", "# Counts.\n\n\ndef helper(text):"),
        ("    return 1\n", "    return 2\n"),
        ("import re\n", "import os\nimport re\n"),
    ],
)
def test_comments_docstrings_and_what_it_does_not_use_change_nothing(load: Load, old: str, new: str) -> None:
    assert old in MODULE
    for name in ("objective", "short"):
        before = objective_identity(getattr(load(MODULE), name))
        assert objective_identity(getattr(load(MODULE.replace(old, new)), name)) == before


def test_a_class_is_its_code_and_an_object_its_attributes_too(load: Load) -> None:
    module = load(MODULE)
    before = objective_identity(module.Objective())
    assert objective_identity(module.Objective(1.0)) == before
    assert objective_identity(module.Objective(2.0)) != before
    for old, new in [("2 * self.scale", "3 * self.scale"), ('count("!")', 'count("?")'), ("* helper", "+ helper")]:
        assert objective_identity(load(MODULE.replace(old, new)).Objective()) != before


def test_closures_partials_methods_and_wrappers_are_followed(load: Load) -> None:
    module, other = load(MODULE), load(MODULE.replace("len(r) > limit", "len(r) < limit"))
    assert (
        objective_identity(module.make(3)) == objective_identity(module.make(3)) != objective_identity(module.make(4))
    )
    assert objective_identity(other.make(3)) != objective_identity(module.make(3))
    one, two = partial(module.objective, offset=1.0), partial(module.objective, offset=2.0)
    assert objective_identity(one) != objective_identity(two)
    changed = load(MODULE.replace('count("!")', 'count("?")'))
    assert objective_identity(partial(changed.objective, offset=1.0)) != objective_identity(one)
    assert objective_identity(cache(changed.objective)) != objective_identity(cache(module.objective))
    assert objective_identity(changed.Objective().__call__) != objective_identity(module.Objective().__call__)
    assert objective_identity(Signed(changed.objective)) != objective_identity(Signed(module.objective))
    assert objective_identity(Signed(module.objective, 1)) != objective_identity(Signed(module.objective, -1))


@pytest.mark.parametrize(
    "make", [list, tuple, set, dict.fromkeys, np.array, torch.tensor, lambda v: torch.nn.Linear(*v)]
)
def test_data_is_compared_by_value(make: Any) -> None:
    def holding(values: Any) -> str:
        torch.manual_seed(0)
        data = make(values)
        return objective_identity(lambda prompts, responses: [float(len(data)) for _ in responses])

    assert holding([1, 2]) == holding([1, 2]) != holding([1, 3])


def test_weights_of_a_module_count() -> None:
    layer = torch.nn.Linear(2, 2)
    before = objective_identity(Signed(layer))  # type: ignore[arg-type]
    torch.nn.init.zeros_(layer.weight)
    assert objective_identity(Signed(layer)) != before  # type: ignore[arg-type]


def test_what_ships_is_its_name_its_options_and_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    different = [
        Brevity(),
        Brevity(scale=10),
        Brevity(longest=9),
        Dialogue(),
        Positive(),
        Signed(Brevity()),
        exclamations,
    ]
    assert len({objective_identity(objective) for objective in different}) == len(different)
    before = objective_identity(Brevity())
    monkeypatch.setattr(Brevity, "version", 3)
    assert objective_identity(Brevity()) != before


def test_a_declared_version_stands_for_the_code(load: Load) -> None:
    module, other = load(MODULE), load(MODULE.replace('count("!")', 'count("?")'))
    for loaded in (module, other):
        loaded.objective.version = loaded.Objective.version = "1"
    assert objective_identity(module.objective) == objective_identity(other.objective)
    assert objective_identity(module.Objective()) == objective_identity(other.Objective())
    assert objective_identity(module.Objective(2.0)) != objective_identity(other.Objective())
    other.objective.version = other.Objective.version = "2"
    assert objective_identity(module.objective) != objective_identity(other.objective)
    assert objective_identity(module.Objective()) != objective_identity(other.Objective())


class Caches:
    def __init__(self) -> None:
        self.cache: dict[str, float] = {}
        self.scale = 1.0

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [self.cache.setdefault(response, self.scale * len(response)) for response in responses]


def test_what_is_stored_while_scoring_changes_nothing_but_what_is_set_does() -> None:
    objective = Caches()
    before = objective_identity(objective)
    score({"x": objective}, ["p"], ["one"])
    score({"x": objective}, ["p"], ["two"])
    assert objective.cache
    assert objective_identity(objective) == before == objective_identity(Caches())
    objective.scale = 2.0
    assert objective_identity(objective) != before


def test_objects_that_refer_to_themselves_or_to_anything_are_identified() -> None:
    objective: Any = Caches()
    objective.itself, objective.lock, objective.stream = objective, __import__("threading").Lock(), sys.stdout
    other: Any = Caches()
    other.itself, other.lock, other.stream = other, __import__("threading").Lock(), sys.stdout
    assert objective_identity(objective) == objective_identity(other)


def test_the_identity_is_the_same_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "my_objectives.py").write_text(
        MODULE + "\nTABLE = {'a', 'b', 'c'}\ndef table(p, r):\n    return TABLE\n"
    )
    code = (
        "import my_objectives as m; from mavis.rewards import Brevity, objective_identity as i; "
        "print(i(m.objective), i(m.Objective(2)), i(m.make(3)), i(m.table), i(Brevity()))"
    )
    assert len(printed_under_hash_seeds(code, tmp_path)) == 1


def test_only_objectives_with_code_of_ones_own_depend_on_the_version_of_python(load: Load) -> None:
    assert all(map(depends_on_python, [load(MODULE).objective, load(MODULE).Objective(), Signed(Caches())]))
    versioned = load(MODULE).objective
    versioned.version = 1
    assert not any(map(depends_on_python, [Brevity(), Signed(Positive()), exclamations, versioned]))


def test_a_reward_model_is_its_files_and_what_it_reads(make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder(labels=2)
    before = objective_identity(RewardModel(folder, template="concat", output=1))
    assert objective_identity(RewardModel(folder, template="concat", output=0)) != before
    assert objective_identity(RewardModel(folder, template="concat", output=1, batch_size=3)) == before
    moved = make_folder(labels=2, name="moved")
    assert objective_identity(RewardModel(moved, template="concat", output=1)) == before
    tensors = load_file(moved / "model.safetensors")
    torch.nn.init.normal_(tensors["score.weight"])
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    assert objective_identity(RewardModel(moved, template="concat", output=1)) != before


def test_objectives_that_score_otherwise_than_in_the_first_release_are_known(load: Load) -> None:
    assert all(map(is_as_in_first_release, [Positive(), exclamations, load(MODULE).objective, Signed(Positive())]))
    assert not any(map(is_as_in_first_release, [Brevity(), Dialogue(), Signed(Brevity())]))


SHARED: dict[str, float] = {}


def first_with_shared_cache(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [SHARED.setdefault(response, 1.0) for response in responses]


def second_with_shared_cache(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [2 * SHARED.setdefault(response, 1.0) for response in responses]


def test_objectives_that_share_a_cache_stay_what_they_are() -> None:
    objectives = {"first": first_with_shared_cache, "second": second_with_shared_cache}
    before = list(map(objective_identity, objectives.values()))
    rewards = score(objectives, ["p"] * 4, list("abcd"))
    with keep_identities(objectives.values()):
        check_batch_independence(objectives, ["p"] * 4, list("efgh"), rewards)
    assert len(SHARED) == 8
    assert list(map(objective_identity, objectives.values())) == before
    SHARED["a"] = 3.0
    assert not set(map(objective_identity, objectives.values())) & set(before)


@dataclass
class Unhashable:
    scale: float = 1.0
    cache: dict[tuple[str, str], float] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        pairs = zip(prompts, responses, strict=True)
        return [self.cache.setdefault(pair, self.scale * len(pair[1])) for pair in pairs]


def test_an_objective_without_a_hash_stays_what_it_is() -> None:
    objective, other = Unhashable(), Unhashable()
    score({"x": objective}, ["p"], ["one"])
    assert objective_identity(objective) == objective_identity(other)
    other.scale = 2.0
    assert objective_identity(objective) != objective_identity(other)


@pytest.mark.parametrize("changed", [-2, -1.0, "-1", None, [1]])
def test_a_value_set_between_calls_changes_the_identity_of_an_objective_with_a_cache(changed: Any) -> None:
    """Also one that is equal or has the same hash in Python."""
    objective: Any = Caches()
    objective.weights = {"good": -1}
    before = objective_identity(objective)
    for response in ("one", "two"):
        score({"x": objective}, ["p"], [response])
    assert objective_identity(objective) == before
    objective.weights["good"] = changed
    assert objective_identity(objective) != before
    score({"x": objective}, ["p"], ["three"])
    assert objective_identity(objective) != before
