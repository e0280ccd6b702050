"""Runs `python -m mavis.cli <command>`, where the `mavis` script is not on the path."""

import sys

from mavis.cli import main

sys.exit(main())
