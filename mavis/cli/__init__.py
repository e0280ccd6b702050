"""The command line: `mavis <command> [name=value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mavis.cli.commands import COMMANDS

__all__ = ["COMMANDS", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command and its overrides; None reads the process's own.

    Returns:
        The exit status: 0, 2 for an error in the arguments, or 130 if it was interrupted before the command began;
        errors inside a command end in `mavis/cli/hydra_app.py`.

    Examples:
        >>> from mavis.cli import main
        >>> main(["generated"])  # "there is no command 'generated'" goes to standard error
        2
    """
    try:
        from mavis.cli.entry_point import run_command

        return run_command(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # while torch is imported
        print("\nmavis: interrupted.", file=sys.stderr)
        return 130
