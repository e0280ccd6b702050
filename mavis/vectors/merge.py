"""Merging of a vector into a base model's folder, one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from mavis.errors import VectorError
from mavis.utils.files import atomic_folder, write_json
from mavis.vectors.applying import add_to
from mavis.vectors.model_tensors import ModelTensors, tensors_of
from mavis.vectors.tensor_files import INDEX, explain_write_errors, new_folder
from mavis.vectors.vector import AlignmentVector

_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*token*.json",  # tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json
    "vocab.*",
    "merges.txt",
    "normalizer.json",
    "*.model",  # of SentencePiece
    "*.tiktoken",
    "chat_template.*",
    "*processor*.json",
    "*.py",  # of models with code of their own
    "LICENSE*",
    "NOTICE*",
    INDEX,
)
"""The files of a model, beside its weights, that a merged model takes over."""
MERGED = "mavis_merge.json"
"""The file that marks a folder as written by `write_merged`, which may replace it."""


def write_merged(base: str | os.PathLike[str], vector: AlignmentVector, output: str | os.PathLike[str]) -> Path:
    """Write base + Δ as a folder of the Hugging Face format, with one tensor in memory at a time.

    Args:
        base: a folder with `config.json` and safetensors; its config, tokenizer, code and licence are copied, and its
            shards and precisions are preserved. The model card and other files are not copied.
        vector: Δ.
        output: a new folder, or one that an earlier call wrote, which is replaced.

    Returns:
        The folder.

    Raises:
        VectorError: if base is not such a folder, the vector does not fit it, a sum is not finite, or output holds
            something else.

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
    target = Path(output).expanduser()
    if not (target / MERGED).is_file() or target.resolve() == Path(base).expanduser().resolve():
        new_folder(target, "output")
    model = tensors_of(base, "base")
    if model.stored is None:
        raise VectorError("base is a model in memory.", "save it with save_pretrained and pass the folder.")
    vector.layout.check(model.layout, "base", "the vector")
    with explain_write_errors(target), atomic_folder(target) as temporary:
        for file in sorted(model.stored.folder.iterdir()):
            is_stale = file.name == INDEX and model.stored.index is None
            if file.is_file() and not is_stale and any(map(file.match, _MODEL_FILES)):
                shutil.copyfile(file, temporary / file.name)
        for file in model.stored.files:
            _write_merged_file(file, temporary / file.name, model, vector)
        write_json(temporary / MERGED, {"kind": "merged_model", "base": vector.base.to_json()})
    return target


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
