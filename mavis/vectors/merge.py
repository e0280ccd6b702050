"""Merging of a vector into a base model's folder, one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from mavis.errors import VectorError
from mavis.utils.files import PICKLE_SUFFIXES, atomic_folder
from mavis.vectors.applying import add_to
from mavis.vectors.model_tensors import ModelTensors, tensors_of
from mavis.vectors.tensor_files import INDEX, explain_write_errors, new_folder
from mavis.vectors.vector import AlignmentVector

_WEIGHTS = {*PICKLE_SUFFIXES, ".safetensors", ".h5", ".msgpack", ".gguf", ".onnx"}


def write_merged(base: str | os.PathLike[str], vector: AlignmentVector, output: str | os.PathLike[str]) -> Path:
    """Write base + Δ as a folder of the Hugging Face format, with one tensor in memory at a time.

    Args:
        base: a folder with `config.json` and safetensors; its config, tokenizer and other small files are copied, and
            its shards and precisions are preserved.
        vector: Δ.
        output: a new folder.

    Returns:
        The folder.

    Raises:
        VectorError: if base is not such a folder, the vector does not fit it, a sum is not finite, or output exists.

    Examples:
        >>> import copy, tempfile
        >>> import mavis
        >>> from mavis.vectors import AlignmentVector, write_merged
        >>> base, _ = mavis.embedded.load()
        >>> aligned = copy.deepcopy(base)
        >>> aligned.model.norm.weight += 0.5
        >>> vector = AlignmentVector.between(base, aligned)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     merged = write_merged(mavis.embedded.path(), 0.5 * vector, f"{folder}/merged")
        ...     round(AlignmentVector.between(base, merged).norm() / vector.norm(), 4)
        0.5
    """
    target = new_folder(output, "output")
    model = tensors_of(base, "base")
    if model.stored is None:
        raise VectorError("base is a model in memory.", "save it with save_pretrained and pass the folder.")
    vector.layout.check(model.layout, "base", "the vector")
    with explain_write_errors(target), atomic_folder(target) as temporary:
        for file in sorted(model.stored.folder.iterdir()):
            is_stale = file.name == INDEX and model.stored.index is None
            if file.is_file() and not is_stale and not _belongs_to_base_only(file):
                shutil.copyfile(file, temporary / file.name)
        for file in model.stored.files:
            _write_merged_file(file, temporary / file.name, model, vector)
    return target


def _belongs_to_base_only(file: Path) -> bool:
    """Return whether a file is weights in any format, an index of pickled weights, or the model card."""
    index = file.name.endswith(".json") and any(part in PICKLE_SUFFIXES for part in Path(file.stem).suffixes)
    return file.suffix in _WEIGHTS or index or file.name.startswith(".") or file.name == "README.md"


def _write_merged_file(source: Path, target: Path, model: ModelTensors, vector: AlignmentVector) -> None:
    """Copy a safetensors file and overwrite the tensors that the vector changes.

    A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON with the offsets of every
    tensor), and the tensors' bytes. Precision and shape do not change, so the copied header is valid for the new bytes.
    """
    shutil.copyfile(source, target)
    names = {stored: name for name in vector.tensors for stored in model.stored_names[name]}
    with target.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for stored in sorted(set(header) & set(names)):
            name = names[stored]
            total = model[name].clone(memory_format=torch.contiguous_format)
            add_to(total, vector.tensors[name], name)
            file.seek(8 + length + header[stored]["data_offsets"][0])
            file.write(total.view(-1).view(torch.uint8).numpy().data)
