"""What is wrong with the overrides of a command, in one line, before Hydra says it in seven."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mavis.cli.conf_dir import conf_dir
from mavis.errors import ConfigError, closest

MULTIRUN = {"-m", "--multirun"}
"""The flags of a sweep."""

SEARCHES = {"search"}
"""The commands that are sweeps without a flag."""


def check_overrides(command: str, overrides: Sequence[str]) -> None:
    """Compose a command's config as Hydra will.

    Args:
        command: the name of its file in the conf tree.
        overrides: `name=value` each, with `-m` also several values, of which the first is tried; where there are other
            flags, such as `--help`, Hydra is left alone.

    Raises:
        ConfigError: if Hydra would refuse an override, or the launcher is not installed.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    flags = {override for override in overrides if override.startswith("-")}
    if flags - MULTIRUN:
        return
    given = [override for override in overrides if override not in flags]
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        try:
            sweeps = flags or command in SEARCHES
            compose(config_name=command, overrides=_first_values(given) if sweeps else given)
        except (HydraException, OmegaConfBaseException) as error:
            known = set(_names(OmegaConf.to_container(compose(config_name=command), resolve=False)))
            said = " ".join(str(error).split())
            raise ConfigError(*_explained(said, given, known)) from error


def _first_values(overrides: Sequence[str]) -> list[str]:
    """Leave one value of each override that has several."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob

    kept = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        value: Any = override.value()
        if isinstance(value, Glob):  # which options it stands for, Hydra alone knows
            continue
        if override.is_interval_sweep():
            kept.append(f"{override.get_key_element()}={value.start}")
        elif override.is_sweep_override():
            kept += [f"{override.get_key_element()}={first}" for first in islice(override.sweep_string_iterator(), 1)]
        else:
            kept.append(str(override.input_line))
    return kept


def _explained(said: str, overrides: Sequence[str], known: set[str]) -> tuple[str, str]:
    """Turn what Hydra says into a message and a hint."""
    groups = sorted(path.name for path in Path(conf_dir()).iterdir() if path.is_dir())
    if found := re.match(r"Could not override '([^']+)'", said):
        return f"there is no setting {found[1]!r}.", closest(found[1], sorted({*known, *groups}))
    if found := re.search(r"Could not find 'hydra/launcher/([^'_]+)", said):
        return (
            f"launcher needs hydra-{found[1]}-launcher, which is not installed.",
            "pip install 'mavis-decoding[sweep]'.",
        )
    if found := re.search(r"Could not (?:load|find) '([^'/]+)/([^']+)'", said):
        options = sorted(path.stem for path in (Path(conf_dir()) / found[1]).glob("*.yaml"))
        return f"{found[1]} has no option {found[2]!r}.", closest(found[2], options)
    if found := re.search(r"Ambiguous value for argument '([^=']+)=([^']*)'", said):
        return (
            f"{found[1]} is given several values.",
            f"write {found[1]}=[{found[2]}] for all of them, with -m for each.",
        )
    culprit = next((override for override in overrides if override in said), None)
    return (
        f"{culprit or ' '.join(overrides)!r} cannot be read: {said.split(' See ')[0].rstrip('.')}.",
        "quote what holds spaces, commas or braces: 'name={a: 1, b: 2}'.",
    )


def _names(config: Any, prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{name}.")
