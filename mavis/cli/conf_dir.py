"""The location of the Hydra configuration tree."""

from __future__ import annotations

from pathlib import Path


def conf_dir() -> str:
    """Return the absolute path of the conf tree: `mavis/conf` in a wheel, `conf` beside `mavis` in a clone."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "conf"
    return str(installed if installed.is_dir() else package.parent / "conf")
