"""`mavis <command> [name=value ...]`: which command runs which Hydra app."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence

from mavis.cli.overrides import MULTIRUN, check_overrides
from mavis.distributed import launcher_rank
from mavis.errors import ConfigError, closest

COMMANDS = {
    "demo": "train, measure and use a critic on the embedded policy; takes minutes and needs nothing",
    "train": "train a critic for a policy",
    "search": "search the settings of training for the best critic",
    "distill": "make one critic of several",
    "evaluate": "sweep weights and β, and compare with the best that is possible at each KL",
    "generate": "continue prompts under preference weights",
    "elicit": "infer a user's preference weights from choices between two responses",
    "align": "fine-tune a copy of a policy for an objective, at a price for its distance",
    "report": "gather the runs of a sweep into one table and one plot",
}

_SILENT = ("hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
"""Overrides that keep Hydra from writing files, which of several processes only the main one does."""

_MAPPINGS = {"weights": ("objective", "weight"), "vectors": ("folder", "coefficient")}
"""The settings that map names to numbers, and what they call these."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command and its overrides; None takes the process's own.

    Returns:
        The exit status: 0, or 2 for a mistake in the arguments.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print("usage: mavis <command> [name=value ...]\n")
        print("\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()))
        print("\nmavis <command> --help lists its settings; --cfg job prints them as they would be used.")
        return 0 if given else 2
    if given[0] == "--version":
        from mavis.version import __version__

        print(__version__)
        return 0
    command, overrides = given[0], given[1:]
    if command not in COMMANDS:
        print(f"mavis: there is no command {command!r}. Hint: {closest(command, COMMANDS)}", file=sys.stderr)
        return 2
    if command == "report" and overrides and not overrides[0].startswith(("-", "folder=", "output=", "format=")):
        overrides[0] = f"folder={overrides[0]}"  # whose name may hold commas and equals signs, as those of runs do
    for name, value in (override.partition("=")[::2] for override in overrides):
        what, number = _MAPPINGS.get(name.lstrip("+"), ("", ""))
        names = re.findall(r"[{,]\s*['\"]?([^\s:,{}'\"]+)['\"]?\s*:", value) if what else []
        twice = sorted({one for one in names if names.count(one) > 1})
        if twice:  # Hydra would silently keep the last
            print(f"mavis: {name} names {what} {twice[0]!r} twice. Hint: give each one {number}.", file=sys.stderr)
            return 2
    overrides = [_quoted(override) for override in overrides]
    try:
        check_overrides(command, overrides)
    except ConfigError as error:
        if launcher_rank() == 0:  # the others have been given the same
            print(f"mavis: {error}", file=sys.stderr)
        return 2
    # Hydra reads the process's arguments and names the app after the script.
    sys.argv = [f"mavis-{command}", *_named_by_what_differs(overrides), *(_SILENT if launcher_rank() else [])]
    importlib.import_module(f"mavis.cli.{command}").main()
    return 0


def _named_by_what_differs(overrides: list[str]) -> list[str]:
    """Keep what is the same in all runs of a sweep out of the names of the runs' folders, which are long enough."""
    if not MULTIRUN & set(overrides):
        return overrides
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides([item for item in overrides if not item.startswith("-")])
    except HydraException:  # the app says what is wrong with it
        return overrides
    same = [f"'{item.key_or_group}'" for item in parsed if not item.is_sweep_override()]
    excluded = ",".join(["output", "threads", *same])
    return [*overrides, f"hydra.job.config.override_dirname.exclude_keys=[{excluded}]"]


def _quoted(override: str) -> str:
    """Quote what follows `prompt=` or `folder=`, so that commas, quotes, braces and equals signs in it are text."""
    name, equals, value = override.partition("=")
    if not equals or name.lstrip("+") not in ("prompt", "story", "folder") or value in ("", "null"):
        return override
    # OmegaConf reads backslashes before an interpolation, Hydra those before a quote; elsewhere they are themselves.
    value = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    value = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + match[2].replace("'", r"\'"), value)
    return f"{name}='{value}'"
