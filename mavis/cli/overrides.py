"""Overrides on the command line: free text is quoted, and errors are explained in one line instead of Hydra's seven."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mavis.cli.conf_dir import conf_dir
from mavis.errors import ConfigError, closest

_MULTIRUN_FLAGS = {"-m", "--multirun"}

_SWEEPING_COMMANDS = {"search"}
"""Commands that are sweeps without a flag."""

_MAPPINGS = {"weights": ("objective", "weight"), "vectors": ("folder", "coefficient")}
"""Settings that map names to numbers, with the words for both."""

FREE_TEXT = ("prompt", "story", "folder", "system")
"""Settings whose values are taken literally."""


def refuse_duplicates(overrides: Sequence[str]) -> None:
    """Check that no mapping such as `weights` names a key twice: Hydra would silently keep the last.

    Raises:
        ConfigError: naming the key.
    """
    for name, value in (override.partition("=")[::2] for override in overrides):
        key, number = _MAPPINGS.get(name.lstrip("+"), ("", ""))
        keys = re.findall(r"[{,]\s*['\"]?([^\s:,{}'\"]+)['\"]?\s*:", value) if key else []
        duplicates = sorted({one for one in keys if keys.count(one) > 1})
        if duplicates:
            raise ConfigError(f"{name} names {key} {duplicates[0]!r} twice.", f"give each {key} one {number}.")


def quote_text(override: str, names: Sequence[str] = FREE_TEXT) -> str:
    """Quote the value of an override of free text, so that commas, quotes, braces and equals signs are taken literally.

    Args:
        override: `name=value`.
        names: of the settings that are free text.

    Examples:
        >>> from mavis.cli.overrides import quote_text
        >>> quote_text("prompt=Tom said, {hi}"), quote_text("beta=2,4")
        ("prompt='Tom said, {hi}'", 'beta=2,4')
    """
    name, equals, value = override.partition("=")
    if not equals or name.lstrip("+") not in names or value in ("", "null"):
        return override
    # OmegaConf unescapes backslashes before an interpolation, Hydra those before a quote; others are literal.
    value = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    value = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + match[2].replace("'", r"\'"), value)
    return f"{name}='{value}'"


def literal_override(name: str, text: str) -> str:
    """Return the override that sets a setting to a text, quoted where Hydra would read it as something else.

    Args:
        name: of the setting.
        text: its value, such as a path.

    Examples:
        >>> from mavis.cli.overrides import literal_override
        >>> literal_override("folder", "outputs/a b"), literal_override("folder", "outputs/a,b")
        ('folder=outputs/a b', "folder='outputs/a,b'")
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if text == "null":  # which `quote_text` leaves as it is
        return f"{name}='null'"
    plain = f"{name}={text}"
    try:
        is_plain = OverridesParser.create().parse_override(plain).value() == text
    except HydraException:
        is_plain = False
    return plain if is_plain and "${" not in text else quote_text(plain, (name,))


def exclude_shared_overrides(overrides: list[str]) -> list[str]:
    """Keep overrides that are the same in all runs of a sweep out of the runs' folder names, which are long enough."""
    if not _MULTIRUN_FLAGS & set(overrides):
        return overrides
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides([item for item in overrides if not item.startswith("-")])
    except HydraException:  # Hydra reports it later
        return overrides
    shared = [f"'{item.key_or_group}'" for item in parsed if not item.is_sweep_override()]
    excluded = ",".join(["output", "threads", *shared])
    return [*overrides, f"hydra.job.config.override_dirname.exclude_keys=[{excluded}]"]


def check_overrides(command: str, overrides: Sequence[str]) -> None:
    """Compose a command's config as Hydra will, and explain what is wrong with an override.

    Args:
        command: the name of its file in the conf tree.
        overrides: `name=value` each. In a sweep the first of several values is tried. With any other flag, such as
            `--help`, nothing is checked.

    Raises:
        ConfigError: if Hydra would refuse an override, or the launcher is not installed.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    flags = {override for override in overrides if override.startswith("-")}
    if flags - _MULTIRUN_FLAGS:
        return
    assignments = [override for override in overrides if override not in flags]
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        try:
            is_sweep = flags or command in _SWEEPING_COMMANDS
            composed = compose(config_name=command, overrides=_first_values(assignments) if is_sweep else assignments)
        except ValueError as error:  # Hydra checks neither null nor a mapping as the option of a group
            group = next((item for item in assignments if item.endswith("=null")), " ".join(assignments))
            hint = "name an option of the group, or leave it out."
            raise ConfigError(f"{group!r} chooses no option.", hint) from error
        except (HydraException, OmegaConfBaseException) as error:
            settings = set(_setting_names(OmegaConf.to_container(compose(config_name=command), resolve=False)))
            text = " ".join(str(error).split())
            raise ConfigError(*_explanation(text, assignments, settings)) from error
    if isinstance(output := composed.get("output"), str):
        _check_output(output)


def _check_output(output: str) -> None:
    """Check that an output folder can be made and written, before Hydra tries."""
    folder = Path(output).expanduser()
    existing = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    if not existing.is_dir():
        raise ConfigError(f"output is {output!r}, but {str(existing)!r} is a file.", "name a folder.")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"output is {output!r}, but {str(existing)!r} cannot be written to.", "name another folder.")


def _first_values(overrides: Sequence[str]) -> list[str]:
    """Reduce each override with several values to the first."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob

    reduced = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        value: Any = override.value()
        if isinstance(value, Glob):  # only Hydra knows which options it matches
            continue
        if override.is_interval_sweep():
            reduced.append(f"{override.get_key_element()}={value.start}")
        elif override.is_sweep_override():
            first = islice(override.sweep_string_iterator(), 1)
            reduced += [f"{override.get_key_element()}={value}" for value in first]
        else:
            reduced.append(str(override.input_line))
    return reduced


def _explanation(text: str, overrides: Sequence[str], settings: set[str]) -> tuple[str, str]:
    """Turn Hydra's error into a message and a hint."""
    groups = {path.name for path in Path(conf_dir()).iterdir() if path.is_dir()} - {"hydra"}
    if match := re.match(r"Could not override '([^']+)'", text):
        return _unknown_setting(match[1], overrides, settings | groups)
    if match := re.search(r"Could not find 'hydra/launcher/([^'_]+)", text):
        return (
            f"launcher needs hydra-{match[1]}-launcher, which is not installed.",
            "pip install 'mavis-decoding[sweep]'.",
        )
    if match := re.search(r"Could not (?:load|find) '([^'/]+)/([^']+)'", text):
        options = sorted(path.stem for path in (Path(conf_dir()) / match[1]).glob("*.yaml"))
        hint = closest(match[2], options)
        if match[1] == "objective":
            hint = f"{hint} Name one of your own as module:name."
        return f"{match[1]} has no option {match[2]!r}.", hint
    if match := re.search(r"Ambiguous value for argument '([^=']+)=([^']*)'", text):
        return (
            f"{match[1]} is given several values.",
            f"write {match[1]}=[{match[2]}] to use all of them in one run, or add -m for one run each.",
        )
    culprit = next((override for override in overrides if override in text), None)
    return (
        f"{culprit or ' '.join(overrides)!r} cannot be parsed: {text.split(' See ')[0].rstrip('.')}.",
        "quote values that contain spaces, commas or braces: 'name={a: 1, b: 2}'.",
    )


def _unknown_setting(name: str, overrides: Sequence[str], known: set[str]) -> tuple[str, str]:
    """Say what to do about a setting that the composed config lacks: often another option of its group has it."""
    group, _, rest = name.partition(".")
    message = f"there is no setting {name!r}."
    if group == "objectives" and (objective := rest.partition(".")[0]):
        options = sorted(path.stem for path in (Path(conf_dir()) / "objective").glob("*.yaml"))
        is_known = objective in options
        return message, f"choose it: objective=[...,{objective}]." if is_known else closest(objective, options)
    having = [
        path.stem
        for path in sorted((Path(conf_dir()) / group).glob("*.yaml"))
        if rest and rest in set(_setting_names(OmegaConf.to_container(OmegaConf.load(path), resolve=False)))
    ]
    if having:
        return message, f"{' or '.join(f'{group}={option}' for option in having)} has it."
    return message, closest(name, sorted(known))


def _setting_names(config: Any, prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _setting_names(value, f"{prefix}{name}.")
