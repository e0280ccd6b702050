"""The Hydra configuration tree: where it is, and the function that its files call."""

from __future__ import annotations

import hashlib
from pathlib import Path

from omegaconf import OmegaConf

_LONGEST_NAME = 200  # file systems allow 255 bytes, and temporary names are longer


def conf_dir() -> str:
    """Return the absolute path of the conf tree: `mavis/conf` in a wheel, `conf` beside `mavis` in a clone."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "conf"
    return str(installed if installed.is_dir() else package.parent / "conf")


def folder_name(overrides: str) -> str:
    """Make the folder name of one run of a sweep from its overrides; what is too long is replaced by a hash.

    Examples:
        >>> from mavis.cli.conf_dir import folder_name
        >>> folder_name("beta=2,data.prompts.source=texts/mine.txt")
        'beta=2,data.prompts.source=texts_mine.txt'
    """
    name = overrides.replace("/", "_")
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    beginning = name.encode()[: _LONGEST_NAME - 20].decode(errors="ignore")
    return f"{beginning}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
