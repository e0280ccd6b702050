"""Tensors in safetensors files, read one at a time and written in shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mavis.errors import DataError, VectorError, first_sentence
from mavis.utils.files import describe_pickles, read_json, restore_folder, write_json

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of weights that are not quantised."""

INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are computed on access and not cached.

    Args:
        names: of the tensors, in order.
        compute: returns a tensor, given its name.
    """

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files, sharded or not, read on access.

    Args:
        folder: with `model.safetensors`, or with `model.safetensors.index.json` and the files that it lists; with both,
            the index is ignored, as in transformers.

    Raises:
        VectorError: if there are no such files, or one is missing, corrupt or truncated; on access, also if a file has
            changed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        self._signatures: dict[Path, tuple[int, ...]] = {}
        index, whole = self.folder / INDEX, self.folder / _WHOLE
        self.index = index if index.is_file() and not whole.is_file() else None
        indexed = _weight_map(index) if self.index else {}
        for file in [self.folder / name for name in sorted({*indexed.values()} or {_WHOLE})]:
            if not file.is_file():
                raise self._missing_file(file)
            self._signatures[file] = _signature(file)
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (not a mapping)
                        self._files[name] = file
                        self.shapes[name] = tuple(opened.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise _corrupt(file, error) from error
        if missing := sorted(set(indexed) - set(self._files)):
            raise VectorError(
                f"{str(index)!r} lists {missing[0]!r}, which its file does not hold.", "copy the folder again."
            )

    @property
    def files(self) -> list[Path]:
        """The safetensors files."""
        return list(self._signatures)

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        if not file.is_file() or _signature(file) != self._signatures[file]:
            raise VectorError(
                f"{str(file)!r} has changed since it was opened.", "do not change files while vectors read them."
            )
        try:
            # Opened each time: an open file would keep in memory everything that was read from it.
            with safe_open(file, "pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _corrupt(file, error) from error
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _missing_file(self, file: Path) -> VectorError:
        return VectorError(
            f"folder {str(self.folder)!r} has no {file.name}{describe_pickles(self.folder)}.",
            "save the weights as safetensors, e.g. by save_pretrained.",
        )


def write_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], folder: Path, dtype: torch.dtype, limit: str
) -> None:
    """Write tensors as `model.safetensors`, or as shards and their index, with one file's tensors in memory.

    Args:
        tensors: by name.
        shapes: of the tensors, as computing them only for that would be slow.
        folder: an existing folder.
        dtype: to round to.
        limit: maximum size of a file, such as `1GB`.

    Raises:
        VectorError: if a number overflows the dtype.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    sizes = {name: torch.empty(shapes[name], dtype=dtype, device="meta") for name in tensors}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=limit)
    for file, names in (plan.filename_to_tensors or {_WHOLE: []}).items():
        shard = {name: _rounded(tensors[name], dtype, name) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


@contextmanager
def explain_write_errors(target: Path) -> Iterator[None]:
    """Convert errors in writing files, such as a full disk, to a `VectorError`.

    Raises:
        VectorError: if a file cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise VectorError(
            f"writing {str(target)!r} failed: {first_sentence(error)}.",
            "check the free space and the permissions.",
        ) from error


def existing_folder(folder: str | os.PathLike[str], argument: str) -> Path:
    """Return the path of a folder with a `config.json`.

    Raises:
        VectorError: if it does not exist or has none.
    """
    path = Path(folder).expanduser()
    restore_folder(path)
    if not path.is_dir():
        raise VectorError(f"{argument} is {str(folder)!r}, which is not a folder.", "name a local folder.")
    if not (path / "config.json").is_file():
        raise VectorError(
            f"{argument} is {str(folder)!r}, which has no config.json.",
            "name a folder that save_pretrained or AlignmentVector.save wrote.",
        )
    return path


def new_folder(folder: str | os.PathLike[str], argument: str) -> Path:
    """Return the path of a folder that does not exist or is empty.

    Raises:
        VectorError: if it exists and is not empty.
    """
    path = Path(folder).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise VectorError(f"{argument} is {str(folder)!r}, which exists.", "name a new folder, or remove that one.")
    return path


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = read_json(index, strict=False)["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file != "" for file in found.values()):
            raise TypeError("weight_map does not map to file names")
    except (AttributeError, DataError, KeyError, TypeError) as error:
        raise _corrupt(index, error) from error
    return found


def _rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = tensor.to(dtype).contiguous()
    if not bool(rounded.isfinite().all()):
        raise VectorError(f"{name!r} overflows {dtype}.", "save it as bfloat16 or float32.")
    return rounded


def _signature(file: Path) -> tuple[int, ...]:
    status = file.stat()
    # A file that was replaced may have the same size and modification time, but not the same inode.
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns


def _corrupt(file: Path, error: Exception) -> VectorError:
    return VectorError(f"{str(file)!r} is corrupt or truncated: {first_sentence(error)}.", "copy the folder again.")
