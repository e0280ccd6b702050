"""One source of defaults: every value in conf/ is the default of the dataclass or function that it is passed to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import mavis
from mavis.critics import HiddenStateCritic, ValueModelCritic
from mavis.evaluation import EvaluationSettings
from mavis.policies.loading import load_policy
from mavis.preference import candidate_pairs
from mavis.rewards import Brevity, Readability, RewardModel
from mavis.rollouts import RolloutSettings, load_prompts
from mavis.training import AlignSettings, DistillSettings, ImprovementSettings, RewardModelSettings

CONF = Path(__file__).parents[1] / "conf"


@dataclass(frozen=True)
class Shared:
    """A dataclass or a function, and where its fields are in a config.

    Args:
        overrides: that select the options of groups.
        keys: of the config, by field of `defaults`; a prefix of dotted names stands for all below it, "" for the rest.
        absent: fields that the config does not have, with the reason.
        different: fields that the config sets otherwise, with the reason.
        extra: keys of the config's node for the rest that are no field, with the reason.
    """

    name: str
    defaults: Callable[..., Any]
    command: str
    overrides: tuple[str, ...]
    keys: dict[str, str]
    absent: dict[str, str]
    different: dict[str, str]
    extra: dict[str, str]


def shared(
    name: str,
    defaults: Callable[..., Any],
    command: str,
    *overrides: str,
    keys: dict[str, str],
    absent: dict[str, str] | None = None,
    different: dict[str, str] | None = None,
    extra: dict[str, str] | None = None,
) -> Shared:
    return Shared(name, defaults, command, overrides, keys, absent or {}, different or {}, extra or {})


def sampling(node: str) -> dict[str, str]:
    """Where the fields of `RolloutSettings` are if a node holds the size of its shards."""
    return {"sampling": "decoding", "sampling.shard_size": f"{node}.shard_size", "sampling.seed": "seed"}


TARGET = {"_target_": "names the class"}
AS_TRAINED = "the values that the critic was trained with, resolved when it is loaded"

SHARED = [
    shared(
        "train",
        ImprovementSettings,
        "train",
        keys={"": "improvement", "beta": "beta", **sampling("improvement")},
    ),
    shared("distill", DistillSettings, "distill", keys={"": "distillation", **sampling("distillation")}),
    shared("align", AlignSettings, "align", keys={"": "alignment", "beta": "beta", "seed": "seed"}),
    shared("train-reward", RewardModelSettings, "train-reward", keys={"": "reward_model", "seed": "seed"}),
    shared(
        "evaluate",
        EvaluationSettings,
        "evaluate",
        keys={"": "evaluation", **sampling("evaluation")},
        different={
            "sampling.max_new_tokens": AS_TRAINED,
            "sampling.top_k": AS_TRAINED,
            "sampling.temperature": AS_TRAINED,
            "sampling.shard_size": "a sweep has many more responses than an iteration, and larger batches are faster",
        },
        extra={"held_out": "an argument of evaluate, which has no objectives by default"},
    ),
    shared(
        "elicit",
        RolloutSettings,
        "elicit",
        keys={"": "decoding", "shard_size": "shard_size", "seed": "seed"},
        different={
            "max_new_tokens": AS_TRAINED,
            "top_k": AS_TRAINED,
            "temperature": AS_TRAINED,
            "shard_size": "twelve prompts under a few weights are fewer responses",
        },
    ),
    shared(
        "candidate_pairs",
        candidate_pairs,
        "elicit",
        keys={name: name for name in ("beta", "target_kl", "divisions")},
    ),
    shared(
        "generate",
        mavis.generate,
        "generate",
        keys={
            "beta": "beta",
            "target_kl": "target_kl",
            "top_k": "decoding.top_k",
            "temperature": "decoding.temperature",
        },
        absent={
            "critic": "loaded from checkpoint",
            "entropy_gate": "Python only",
        },
    ),
    shared(
        "hidden_state",
        HiddenStateCritic.for_policy,
        "train",
        keys={"": "critic", "composition": "improvement.composition", "seed": "seed"},
        extra={"kind": "selects the class"},
    ),
    shared(
        "value_model",
        ValueModelCritic.for_policy,
        "train",
        "critic=value_model",
        keys={"": "critic", "composition": "improvement.composition", "seed": "seed"},
        absent={"tokenizer": "the policy's own"},
        extra={"kind": "selects the class"},
    ),
    shared("policy", load_policy, "train", "policy=pretrained", keys={"": "policy"}),
    *(
        shared(
            name,
            load_prompts,
            "train",
            "data=file",
            keys={"": f"data.{name}"},
            absent={
                "repeated": "duplicates are only useful for mavis generate, which sets it",
                "report": "commands print it",
            },
            different={"chat": "follows data.chat", "system": "follows data.system"},
        )
        for name in ("prompts", "evaluation_prompts")
    ),
    *(
        shared(name, kind, "train", f"objective=[{name}]", keys={"": f"objectives.{name}"}, extra=TARGET)
        for name, kind in (("brevity", Brevity), ("readability", Readability), ("reward_model", RewardModel))
    ),
]

REQUIRED = object()
"""Stands for the default of what has none."""


def defaults_of(source: Callable[..., Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """List fields or parameters by dotted name, those of nested dataclasses too, with their defaults."""
    if is_dataclass(source):
        for field in fields(source):
            nested = field.default_factory
            if nested is not MISSING and is_dataclass(nested):
                yield from defaults_of(nested, f"{prefix}{field.name}.")
            else:
                yield f"{prefix}{field.name}", REQUIRED if field.default is MISSING else field.default
        return
    for name, parameter in inspect.signature(source).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        yield name, REQUIRED if parameter.default is parameter.empty else parameter.default


def key_of(field: str, keys: dict[str, str]) -> str | None:
    """Where a field is in a config, by the longest prefix that is listed; None if it is nowhere."""
    prefix = field
    while True:
        if prefix in keys:
            rest = field[len(prefix) :].lstrip(".")
            return ".".join(part for part in (keys[prefix], rest) if part)
        if not prefix:
            return None
        prefix = prefix.rpartition(".")[0]


def compare(one: Shared) -> tuple[set[str], set[str], set[str]]:
    """Return the fields that the config lacks, those that it sets otherwise, and the keys that are no field."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose(one.command, list(one.overrides)))
    absent, different, found = set(), set(), set()
    for field, default in defaults_of(one.defaults):
        key = key_of(field, one.keys)
        value = MISSING if key is None else select(config, key)
        found.add(key)
        if value is MISSING and default is not REQUIRED:
            absent.add(field)
        elif default is not REQUIRED and value != (list(default) if isinstance(default, tuple) else default):
            different.add(field)
    if "" not in one.keys:
        return absent, different, set()
    return absent, different, set(leaves(select(config, one.keys[""]), one.keys[""])) - found


def select(config: Any, key: str) -> Any:
    """Look a dotted key up; MISSING if it does not exist."""
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return MISSING
        config = config[part]
    return config


def leaves(config: dict[Any, Any], prefix: str) -> Iterator[str]:
    """List the dotted keys of all plain values; a mapping of objectives is one."""
    for name, value in config.items():
        if isinstance(value, dict) and name != "held_out":
            yield from leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}"


@pytest.mark.parametrize("one", SHARED, ids=lambda one: one.name)
def test_a_config_has_the_defaults_of_the_code(one: Shared) -> None:
    absent, different, extra = compare(one)
    assert absent == set(one.absent), "fields that conf/ lacks"
    assert different == set(one.different), "fields for which conf/ and the code disagree"
    assert extra == {f"{one.keys.get('')}.{key}" for key in one.extra}, "keys of conf/ that are no field"


@dataclass(frozen=True)
class _Known:
    iterations: int = 3


@dataclass(frozen=True)
class _Unknown:
    iterations: int = 3
    momentum: float = 0.9


@dataclass(frozen=True)
class _Otherwise:
    iterations: int = 4


def test_the_comparison_sees_what_is_missing_and_what_differs() -> None:
    keys = {"": "improvement"}
    absent, different, extra = compare(shared("known", _Known, "train", keys=keys))
    assert (absent, different) == (set(), set())
    assert {"improvement.rollouts", "improvement.fit.epochs"} <= extra
    assert compare(shared("unknown", _Unknown, "train", keys=keys))[0] == {"momentum"}
    assert compare(shared("otherwise", _Otherwise, "train", keys=keys))[1] == {"iterations"}
