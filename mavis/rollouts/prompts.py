"""Prompts from a list, a file, a saved dataset or a hub."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mavis.errors import DataError, check_whole, closest

_BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_prompts(
    source: str | Sequence[str],
    *,
    column: str | None = None,
    split: str = "train",
    first_words: int | None = None,
    limit: int | None = None,
    repeated: bool = False,
) -> list[str]:
    """Read prompts from any source that the `datasets` library knows.

    Args:
        source: prompts themselves as a list; `-` for standard input, one prompt a line; a `.txt` file, one prompt a
            line; a `.json`, `.jsonl`, `.csv` or `.parquet` file; a folder written by `save_to_disk`; else the name of
            a dataset on a hub.
        column: the column that holds the prompts; None takes the only column of text.
        split: of the dataset.
        first_words: keep only this many words of each row, ≥ 1, for corpora of whole texts; None keeps all.
        limit: keep only this many prompts, ≥ 1; None keeps all.
        repeated: whether duplicates are kept.

    Returns:
        Prompts in their order, without empty ones and, unless `repeated`, without duplicates.

    Raises:
        DataError: if the source is missing or unreadable, a column or split is unknown, a number is out of range, or no
            prompt is left.

    Examples:
        >>> from mavis.rollouts import load_prompts
        >>> load_prompts(["Once upon a time", "", "The dog ran", "The dog ran"], first_words=2)
        ['Once upon', 'The dog']
    """
    given = {name: value for name, value in (("first_words", first_words), ("limit", limit)) if value is not None}
    check_whole(DataError, "leave it out to keep everything.", **given)
    rows = _rows(source, column, split)
    if first_words is not None:
        rows = [" ".join(row.split()[:first_words]) for row in rows]
    not_empty = [row for row in rows if row.strip()]
    prompts = not_empty if repeated else list(dict.fromkeys(not_empty))
    if not prompts:
        shown = "an empty list" if not isinstance(source, str) else repr(source)
        raise DataError(f"prompts come from {shown}, which holds no prompt.", "give at least one line of text.")
    return prompts[:limit]


def draw_prompts(prompts: Sequence[str], rows: int, seed: int) -> list[str]:
    """Draw prompts in random order, each as often as any other or once more.

    Args:
        prompts: at least one.
        rows: how many to draw, ≥ 1.
        seed: of the random orders; each pass over the prompts has its own.

    Returns:
        `rows` prompts.

    Examples:
        >>> from mavis.rollouts import draw_prompts
        >>> sorted(draw_prompts(["a", "b"], 4, seed=0))
        ['a', 'a', 'b', 'b']
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: list[str] = []
    while len(drawn) < rows:
        drawn.extend(prompts[i] for i in torch.randperm(len(prompts), generator=generator).tolist())
    return drawn[:rows]


def _rows(source: str | Sequence[str], column: str | None, split: str) -> list[str]:
    if not isinstance(source, str):
        bad = [row for row in source if not isinstance(row, str)]
        if bad:
            raise DataError(f"prompts holds {bad[0]!r}, expected text.", "quote every prompt.")
        return list(source)
    if source == "-":
        return sys.stdin.read().removeprefix("\ufeff").split("\n")
    path = Path(source).expanduser()
    if path.suffix == ".txt":
        if not path.is_file():
            raise DataError(f"prompts come from {source!r}, which does not exist.", "give a file, one prompt a line.")
        try:
            # Lines end at line breaks alone: `splitlines` would also split at form feeds, U+2028 and the like.
            return path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"prompts come from {source!r}, which is not UTF-8 text.", "save it as UTF-8.") from error
    dataset = _dataset(source, path, split)
    return [str(value) for value in dataset[_column(dataset, column, source)] if value is not None]


def _dataset(source: str, path: Path, split: str) -> Any:
    import datasets

    try:
        if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            loaded = datasets.load_from_disk(str(path))
            if not isinstance(loaded, datasets.DatasetDict):
                return loaded
            if split not in loaded:
                raise DataError(f"split is {split!r}, which {source!r} does not have.", closest(split, loaded))
            return loaded[split]
        if path.suffix in _BUILDERS and not path.is_file():
            raise DataError(f"prompts come from {source!r}, which does not exist.", "check the path.")
        if path.is_file():
            builder = _BUILDERS.get(path.suffix)
            if builder is None:
                raise DataError(
                    f"prompts come from {source!r}, which is of an unsupported type.",
                    f"known: {', '.join(_BUILDERS)}.",
                )
            return datasets.load_dataset(builder, data_files=str(path), split="train")
        return datasets.load_dataset(source, split=split)
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds, and its message is what helps
        raise DataError(
            f"prompts come from {source!r}, which the datasets library cannot read: {error}",
            "give a file (.txt, .jsonl, .csv, .parquet), a folder from save_to_disk, or a hub name.",
        ) from error


def _column(dataset: Any, column: str | None, source: str) -> str:
    names = list(dataset.column_names)
    if column is not None:
        if column not in names:
            raise DataError(f"column is {column!r}, which {source!r} does not have.", closest(column, names))
        return column
    texts = [name for name in names if str(getattr(dataset.features[name], "dtype", "")) in {"string", "large_string"}]
    if len(texts) != 1:
        raise DataError(f"{source!r} has {len(texts)} columns of text: {', '.join(texts)}.", "name one by column=...")
    return texts[0]
