"""The `mavis` command: which Hydra app each subcommand runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from mavis.cli.commands import COMMANDS
from mavis.cli.overrides import FREE_TEXT, check_overrides, exclude_shared_overrides, quote_text, refuse_duplicates
from mavis.cli.own_objectives import register_own_objectives
from mavis.distributed import launcher_rank
from mavis.errors import ConfigError, closest

_POSITIONAL = {"report": ("folder", "output=", "format="), "info": ("checkpoint",)}
"""Commands whose first argument needs no name, with that name and what else an argument may begin with.

The names of run folders contain commas and equals signs."""

_WRITE_NOTHING = ("hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
"""Overrides that keep Hydra from writing files; of several processes only the main one writes."""


def run_command(arguments: Sequence[str]) -> int:
    """Run one command; see `mavis.cli.main`.

    Args:
        arguments: the command and its overrides.

    Returns:
        The exit status.
    """
    arguments = list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print_help()
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from mavis.version import __version__

        print(__version__)
        return 0
    command, overrides = arguments[0], arguments[1:]
    if command not in COMMANDS:
        print(f"mavis: there is no command {command!r}. Hint: {closest(command, COMMANDS)}", file=sys.stderr)
        return 2
    name, *others = _POSITIONAL.get(command, ("",))
    if name and overrides and not overrides[0].startswith(("-", f"{name}=", *others)):
        overrides[0] = f"{name}={overrides[0]}"
    try:
        refuse_duplicates(overrides)
        overrides = [quote_text(override, (*FREE_TEXT, name)) for override in overrides]
        register_own_objectives(overrides)
        check_overrides(command, overrides)
    except ConfigError as error:
        if launcher_rank() == 0:  # all processes have the same arguments
            print(f"mavis: {error}", file=sys.stderr)
        return 2
    # Hydra reads the process's arguments and names the app after the script.
    silent = _WRITE_NOTHING if launcher_rank() else ()
    sys.argv = [f"mavis-{command}", *exclude_shared_overrides(overrides), *silent]
    importlib.import_module(f"mavis.cli.{command.replace('-', '_')}").main()
    return 0


def _print_help() -> None:
    width = max(map(len, COMMANDS))
    print("usage: mavis <command> [name=value ...]\n")
    print("\n".join(f"  {name:<{width}}  {description}" for name, description in COMMANDS.items()))
    print("\nmavis <command> --help lists the settings of a command; --cfg job prints them with overrides applied.")
