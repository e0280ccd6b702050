"""Alignment vectors on disk: a `config.json` with layout and base, and safetensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mavis.errors import DataError, VectorError
from mavis.policies.fingerprint import Fingerprint
from mavis.utils.files import atomic_folder, read_json, write_json
from mavis.vectors.model_tensors import Layout
from mavis.vectors.tensor_files import (
    LazyTensors,
    StoredTensors,
    existing_folder,
    explain_write_errors,
    new_folder,
    write_tensors,
)

_FORMAT, _KIND = 1, "alignment_vector"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class VectorContent(NamedTuple):
    """The parts of an alignment vector."""

    tensors: Mapping[str, Tensor]
    layout: Layout
    base: Fingerprint


def save_vector(vector: VectorContent, folder: str | os.PathLike[str], dtype: torch.dtype, max_shard_size: str) -> None:
    """Write a vector's folder atomically; see `AlignmentVector.save`."""
    target = Path(folder).expanduser()
    if _kind(target) != _KIND:
        new_folder(target, "folder")
    if dtype not in _DTYPES:
        raise VectorError(f"dtype is {dtype}.", f"known: {', '.join(map(str, _DTYPES))}.")
    config = {
        "format": _FORMAT,
        "kind": _KIND,
        "base": vector.base.to_json_with_sample(),
        "layout": vector.layout.to_json(),
        "names": list(vector.tensors),
    }
    with explain_write_errors(target), atomic_folder(target) as temporary:
        write_json(temporary / "config.json", config)
        write_tensors(vector.tensors, vector.layout.shapes, temporary, dtype, max_shard_size)


def load_vector(folder: str | os.PathLike[str]) -> VectorContent:
    """Open a vector's folder; see `AlignmentVector.load`."""
    path = existing_folder(folder, "folder")
    if _kind(path) != _KIND:
        raise VectorError(
            f"folder is {str(folder)!r}, which is not an alignment vector.",
            "name a folder that AlignmentVector.save wrote; AlignmentVector.between computes one from two models.",
        )
    config: dict[str, Any] = read_json(path / "config.json", strict=False)
    if config.get("format") != _FORMAT:
        raise VectorError(
            f"folder {str(folder)!r} has vector format {config.get('format')!r}; this version reads {_FORMAT}.",
            "install the version of mavis that wrote it.",
        )
    try:
        layout, base = Layout.from_json(config["layout"]), Fingerprint(**config["base"])
        names = list(config["names"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise VectorError(f"{str(path / 'config.json')!r} is corrupt: {error}.", "copy the folder again.") from error
    stored = StoredTensors(path)
    mismatched = [name for name in names if stored.shapes.get(name, ()) != layout.shapes.get(name)]
    if mismatched or len(names) != len(stored):
        first = (mismatched or sorted(set(stored) - set(names)))[0]
        raise VectorError(
            f"folder {str(folder)!r}: {first!r} does not match its config.json.", "copy the folder again."
        )
    return VectorContent(LazyTensors(names, lambda name: stored[name].float()), layout, base)


def _kind(folder: Path) -> str | None:
    """Read the kind that a folder's config.json states, or None."""
    try:
        config = read_json(folder / "config.json", strict=False)
    except (OSError, DataError):
        return None
    return str(config.get("kind")) if isinstance(config, dict) else None
