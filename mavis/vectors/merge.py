"""A base's folder plus a vector, as a new folder: file by file, tensor by tensor."""

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
from mavis.vectors.tensor_files import INDEX, new_folder, writing
from mavis.vectors.vector import AlignmentVector

_WEIGHTS = {*PICKLE_SUFFIXES, ".safetensors", ".h5", ".msgpack", ".gguf", ".onnx"}


def write_merged(base: str | os.PathLike[str], vector: AlignmentVector, output: str | os.PathLike[str]) -> Path:
    """Write base + Δ as a folder of the Hugging Face format; one tensor is in memory at a time.

    Args:
        base: a folder with `config.json` and safetensors; its config, tokenizer and other small files are copied, its
            shards and precisions kept.
        vector: Δ.
        output: a new folder.

    Returns:
        The folder.

    Raises:
        VectorError: if base is no such folder, the vector does not fit it, a sum is not finite, or output exists.
    """
    target = new_folder(output, "output")
    model = tensors_of(base, "base")
    if model.stored is None:
        raise VectorError("base is a model in memory.", "save it with save_pretrained and give the folder.")
    vector.layout.check(model.layout, "base", "the vector")
    with writing(target), atomic_folder(target) as temporary:
        for file in sorted(model.stored.folder.iterdir()):
            is_stale = file.name == INDEX and model.stored.index is None
            if file.is_file() and not is_stale and not _is_of_the_base_alone(file):
                shutil.copyfile(file, temporary / file.name)
        for file in model.stored.files:
            _write_file(file, temporary / file.name, model, vector)
    return target


def _is_of_the_base_alone(file: Path) -> bool:
    """Weights in whatever format, the index of a format that is left out, and the model card."""
    index = file.name.endswith(".json") and any(part in PICKLE_SUFFIXES for part in Path(file.stem).suffixes)
    return file.suffix in _WEIGHTS or index or file.name.startswith(".") or file.name == "README.md"


def _write_file(source: Path, target: Path, model: ModelTensors, vector: AlignmentVector) -> None:
    """Copy a file of weights and overwrite in the copy what the vector changes.

    A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON with the offsets of every
    tensor), and the tensors' bytes. Precision and shape stay, so the copied header holds for the new bytes too.
    """
    shutil.copyfile(source, target)
    names = {kept: name for name in vector.tensors for kept in model.kept_as[name]}
    with target.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for kept in sorted(set(header) & set(names)):
            name = names[kept]
            total = model[name].clone(memory_format=torch.contiguous_format)
            add_to(total, vector.tensors[name], name)
            file.seek(8 + length + header[kept]["data_offsets"][0])
            file.write(total.view(-1).view(torch.uint8).numpy().data)
