"""Tensors in safetensors files that know their checksum."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

CHECKSUM = "sha256"
"""The entry of a file's metadata that holds the checksum of its tensors."""


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write tensors and their checksum.

    Args:
        tensors: by name, on any device.
        path: of the file; wrap the call in `atomic_file` or `atomic_folder`.
    """
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # With a second entry the file would not be the same each time: safetensors writes them in any order.
    save_file(content, path, metadata={CHECKSUM: _digest(content)})


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read tensors, and compare them with their checksum if the file has one.

    Args:
        path: of the file.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        SafetensorError: if the file is damaged.
        OSError: if it cannot be read.
    """
    tensors = load_file(path)
    with safe_open(path, "pt") as opened:
        expected = (opened.metadata() or {}).get(CHECKSUM)
    if expected is not None and expected != _digest(tensors):
        raise SafetensorError("its tensors do not match their checksum")
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
