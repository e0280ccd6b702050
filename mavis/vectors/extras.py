"""Packages that only some uses of vectors need."""

from __future__ import annotations

import importlib
from typing import Any

from mavis.errors import VectorError


def optional(module: str, purpose: str) -> Any:
    """Import one of them.

    Args:
        module: its name.
        purpose: what needs it.

    Raises:
        VectorError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise VectorError(
            f"{purpose} needs {module.partition('.')[0]}, which is not installed.", "pip install 'mavis[vectors]'."
        ) from error
