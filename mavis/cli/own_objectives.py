"""Objectives of one's own on the command line, by module and name: `objective=[brevity,my_module:my_function]`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from mavis.errors import ConfigError

_OWN = re.compile(r"[\w.]+:\w+")
_CHOICE = re.compile(r"\+{0,2}objective(@[\w.]+)?=(.*)", re.DOTALL)


def register_own_objectives(overrides: Sequence[str]) -> None:
    """Make each `module:name` that overrides choose an option of the group `objective`, as a file there would be.

    Args:
        overrides: `name=value` each.

    Raises:
        ConfigError: if two objectives of one run have the same name.

    Examples:
        >>> from mavis.cli.own_objectives import register_own_objectives
        >>> register_own_objectives(["objective=[brevity,my_module:warmth]"])  # its name is warmth
    """
    from hydra.core.config_store import ConfigStore

    for choice in filter(None, map(_CHOICE.fullmatch, overrides)):
        for group in re.findall(r"\[([^\]]*)\]", choice[2]):  # others are alternatives of a sweep
            _check_names([option.strip() for option in group.split(",")])
        for option in _OWN.findall(choice[2]):
            ConfigStore.instance().store(
                group="objective",
                name=option,
                node={"_target_": f"{import_objective.__module__}.{import_objective.__name__}", "source": option},
                package=f"objectives.{_name(option)}",
                provider="mavis",
            )


def import_objective(source: str, **options: Any) -> Any:
    """Import an objective.

    Args:
        source: `module:name` of a function or a class.
        options: passed to the class when it is built, or to the function in each call.

    Raises:
        ConfigError: if there is no such module or name.

    Examples:
        >>> from mavis.cli.own_objectives import import_objective
        >>> import_objective("mavis.rewards:Brevity", scale=10.0).scale
        10.0
    """
    module, _, name = source.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module imports something that is not there
        hint = "modules are looked for in the working directory and among installed packages."
        raise ConfigError(f"objective {source!r} names no module {module!r}.", hint) from error
    except AttributeError as error:
        raise ConfigError(f"module {module!r} has no {name!r}.", f"objective={source} names it.") from error
    if isinstance(found, type):
        return found(**options)
    return partial(found, **options) if options else found


def _name(option: str) -> str:
    return option.rpartition(":")[2]


def _check_names(options: Sequence[str]) -> None:
    names = [_name(option) for option in options]
    for option, name in zip(options, names, strict=True):
        if ":" in option and names.count(name) > 1:
            raise ConfigError(
                f"objective has two that are called {name!r}.",
                f"rename one: +objective@objectives.other={option}.",
            )
