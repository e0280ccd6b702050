"""The command line: `mavis <command> [name=value ...]`."""

from mavis.cli.entry_point import COMMANDS, main

__all__ = ["COMMANDS", "main"]
