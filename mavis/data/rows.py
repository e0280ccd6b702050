"""The rows of a source: a list, a text file, a table, a folder written by `save_to_disk`, or a dataset on the hub."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mavis.errors import DataError, PromptError, closest, first_sentence, warn_user

_JSON = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
FILE_TYPES = (".txt", ".csv", ".parquet", *_JSON)
"""The kinds of file that are read."""

_KINDS = f"a file ({', '.join(FILE_TYPES)}), a folder from save_to_disk, or a hub name"


@dataclass(frozen=True)
class Rows:
    """The rows of a source by column.

    Args:
        name: of the source, for messages.
        columns: of equal length, by name; a list or a text file has one, whose name is empty.
    """

    name: str
    columns: dict[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def texts(self) -> list[str]:
        """Return the names of the columns of texts; texts that are numbers count only if there are no others."""
        texts = [name for name, values in self.columns.items() if _first_type(values) is str]
        return [name for name in texts if not all(map(_is_number, self.columns[name]))] or texts

    def column(self, name: str) -> Sequence[Any]:
        """Return a column.

        Raises:
            DataError: if there is no such column.
        """
        if name not in self.columns:
            raise DataError(f"column is {name!r}, which {self.name} does not have.", closest(name, self.columns))
        return self.columns[name]


def as_source(source: Any) -> Any:
    """Return what names a source as a text, and a list as it is.

    Raises:
        DataError: if it is neither.
    """
    if isinstance(source, os.PathLike):
        return os.fspath(source)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError(f"source is {source!r:.60}, expected a list of rows or a name.", f"name {_KINDS}.")
    if hasattr(source, "columns"):  # a data frame, which iterates over their names
        raise DataError(
            f"source is a {type(source).__name__}, expected a list of rows or a name.",
            "give its rows: source.to_dict('records').",
        )
    return list(source) if isinstance(source, Iterator) else source


def read_rows(source: str | Sequence[Any], split: str | None = None) -> Rows:
    """Read the rows of a source.

    Lines end at line breaks alone, a byte order mark is no part of the text, and the cells of a CSV file are texts as
    they stand: "NA" and "007" too.

    Args:
        source: rows as a list; `-` for standard input or a `.txt` file, one row a line; a `.csv`, `.json`, `.jsonl` or
            `.parquet` file, the middle two also gzipped; a folder written by `save_to_disk`; else the name of a dataset
            on the hub.
        split: of a dataset that has several; None takes `train`, or the only one.

    Returns:
        The rows.

    Raises:
        DataError: if the source is missing or unreadable, or has no such split.

    Examples:
        >>> from mavis.data.rows import read_rows
        >>> read_rows(["Once upon a time", "The dog"]).columns
        {'': ['Once upon a time', 'The dog']}
    """
    if not isinstance(source, str):
        return Rows("the list", {"": list(source)})
    path = Path(source).expanduser()
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])
    if source != "-" and suffix in FILE_TYPES and not path.is_file():
        raise DataError(f"source is {source!r}, which does not exist.", "check the path.")
    if source == "-" or path.is_file():
        if split not in (None, "train"):
            raise DataError(f"split is {split!r}, but {source!r} is a file, which has no splits.", "leave split out.")
        if source == "-":
            text = decode_text(sys.stdin.buffer.read(), "standard input")
            return Rows("standard input", {"": split_lines(text)})
        return Rows(repr(source), _file_columns(source, path, suffix))
    dataset = _dataset(source, path, split)
    return Rows(repr(source), {name: dataset[name] for name in dataset.column_names})


def report_unusable(problems: Sequence[PromptError], others: bool, of_all: str) -> None:
    """Warn of rows that are left out, with their number and the first of them.

    Args:
        problems: of each such row.
        others: whether any row is left.
        of_all: how many rows there are, such as `of 9 pairs`.

    Raises:
        PromptError: the first, if no row is left.
    """
    if problems and not others:
        raise problems[0]
    if problems:
        warn_user(f"{len(problems)} {of_all} are left out, the first because {problems[0].message}")


def read_text(path: Path, source: str) -> str:
    """Read a UTF-8 file as `decode_text` does.

    Args:
        path: of the file.
        source: what an error calls it.

    Raises:
        DataError: if it cannot be read, or is not UTF-8 text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"source is {source!r}, which cannot be read: {first_sentence(error)}.", "check it.") from error
    return decode_text(content, source)


def decode_text(content: bytes, source: str) -> str:
    """Decode UTF-8 without a byte order mark; `\\r\\n` becomes `\\n`, and a `\\r` alone stays.

    Args:
        content: of a file or of standard input.
        source: what an error calls it.

    Raises:
        DataError: if it is not UTF-8 text.
    """
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"source is {source!r}, which is not UTF-8 text.", "save it as UTF-8.") from error


def split_lines(text: str) -> list[str]:
    """Split a text at `\\n` alone: `splitlines` would also split at form feeds, U+2028 and the like."""
    return text.split("\n")


def _file_columns(source: str, path: Path, suffix: str) -> dict[str, Sequence[Any]]:
    if suffix == ".txt":
        return {"": split_lines(read_text(path, source))}
    if suffix == ".csv":
        return _csv_columns(source, path)
    if suffix not in FILE_TYPES:
        raise DataError(f"source is {source!r}, which is of an unsupported type.", f"known: {', '.join(FILE_TYPES)}.")
    import datasets

    builder = "json" if suffix in _JSON else "parquet"
    with _ReadErrors(source):
        dataset = datasets.load_dataset(builder, data_files=str(path), split="train")
    return {name: dataset[name] for name in dataset.column_names}


def _csv_columns(source: str, path: Path) -> dict[str, Sequence[Any]]:
    """Read a CSV file; the library's reader would take cells such as NA or 007 for something else than text."""
    text = read_text(path, source)
    reader = csv.reader(io.StringIO(text), strict=True)
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # of the process, where others may be reading
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise DataError(
            f"source is {source!r}, which is not CSV: {error} in line {reader.line_num}.", "quote it."
        ) from error
    if not rows:
        raise DataError(f"source is {source!r}, which is empty.", "begin it with a line of column names.")
    names = rows[0][1]
    if repeated := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
        raise DataError(
            f"source is {source!r}, which has several columns named {', '.join(map(repr, repeated))}.",
            "give each column a name of its own.",
        )
    for line, row in rows:
        if len(row) != len(names):
            raise DataError(
                f"source is {source!r}, where line {line} has {len(row)} cells, expected {len(names)}.",
                "quote cells that contain commas.",
            )
    return {name: [row[index] for _, row in rows[1:]] for index, name in enumerate(names)}


def _dataset(source: str, path: Path, split: str | None) -> Any:
    import datasets

    is_saved = path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file())
    with _ReadErrors(source):
        loaded = (
            datasets.load_from_disk(str(path)) if is_saved else datasets.load_dataset(source, split=split or "train")
        )
    if isinstance(loaded, datasets.DatasetDict):
        name = split or (next(iter(loaded)) if len(loaded) == 1 else "train")
        if name not in loaded:
            raise DataError(f"split is {name!r}, which {source!r} does not have.", closest(name, loaded))
        return loaded[name]
    if is_saved and split not in (None, "train"):
        raise DataError(f"split is {split!r}, but {source!r} is one dataset without splits.", "leave split out.")
    return loaded


class _ReadErrors:
    """Turns the errors of the datasets library, of many kinds, into one that says what the cause is."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception):
            return
        causes: list[str] = []
        cause: BaseException | None = error
        while cause is not None:  # "an error occurred while generating the dataset" says nothing; its cause does
            causes.append(first_sentence(cause))
            cause = cause.__cause__
        raise DataError(
            f"source is {self.source!r}, which the datasets library cannot read: {': '.join(dict.fromkeys(causes))}.",
            f"give {_KINDS}.",
        ) from error


def _first_type(values: Sequence[Any]) -> type:
    return next((type(value) for value in values if value is not None), type(None))


def _is_number(value: Any) -> bool:
    """Whether a cell is a number written as text, or empty."""
    if not value:
        return True
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
