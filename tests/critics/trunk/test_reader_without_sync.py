"""On an accelerator, rows are assumed to continue known ones, and the host does not wait for the comparison."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mavis.critics.trunk.reader import PrefixReader
from tests.critics.trunk.reading import (
    assert_same,
    calls_of,
    candidates_for,
    longer,
    prompts,
    read_from_scratch,
)


class UnknownRows(Exception):
    """Raised by these tests for rows that do not continue known ones."""


def raise_if_true(answer: Tensor) -> None:
    if bool(answer):
        raise UnknownRows


class ForbidSync(TorchDispatchMode):
    """Forbids operations that make the host wait for an accelerator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.__name__.split(".")[0] not in {"_local_scalar_dense", "equal", "nonzero", "is_nonzero"}, func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Make a reader treat the CPU as an accelerator, and list its reports of whether rows are unknown."""
    answers: list[Tensor] = []
    take = PrefixReader._take_kept
    monkeypatch.setattr(
        PrefixReader, "_take_kept", lambda reader, ids, raise_if_unknown: take(reader, ids, answers.append)
    )
    return answers


@pytest.mark.parametrize(
    "name",
    ["one token more at a time", "the same again", "beams change places", "beams double and drop out", "fewer rows",
     "more rows", "from a single token on"],
)  # fmt: skip
def test_continued_rows_are_read_without_waiting_for_their_ids(
    reader: PrefixReader, reports: list[Tensor], name: str
) -> None:
    calls = calls_of(name)
    reader.read(*calls[0], candidates_for(calls[0]))
    for before, call in itertools.pairwise(calls):
        candidates = candidates_for(call)
        expected = read_from_scratch(reader._trunk, *call, candidates)
        if call[0].shape[1] - before[0].shape[1] > 1:
            reader.read(*call)
            continue
        with ForbidSync():
            states, ends = reader.read(*call, candidates), reader.read(*call)
        assert_same(states, expected[1])
        assert_same(ends, expected[0])
    assert reports
    assert not any(reports)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("an with_edit last token", 1), ("an with_edit beginning", 1), ("tokens that have become padding", 1),
     ("another prompt in one row", 1)],
)  # fmt: skip
def test_unknown_rows_are_reported_and_never_continued(
    reader: PrefixReader, reports: list[Tensor], name: str, wrong: int
) -> None:
    """Even if the report is ignored: the next call of these rows is reported again, and one that may wait is right."""
    calls = calls_of(name)
    reader.read(*calls[0])
    assert not any(reports)
    reader.read(*calls[wrong])
    assert reports.pop()
    assert not any(reports)
    after = longer(calls[wrong])
    reader.read(*after)
    assert reports.pop()
    reader.read(*longer(after, 2))  # after several new tokens, the host waits for the comparison
    assert_same(
        reader.read(*longer(after, 2)),
        read_from_scratch(reader._trunk, *longer(after, 2), candidates_for(after))[0],
    )


def test_right_padding_is_reported_too(reader: PrefixReader, reports: list[Tensor]) -> None:
    ids, is_token = prompts(0, 3)
    reader.read(ids, is_token)
    is_token = torch.cat([is_token, torch.tensor([[True], [False]])], dim=1)
    reader.read(torch.cat([ids, ids[:, :1]], dim=1), is_token)
    assert reports.pop()


def test_on_the_cpu_no_row_is_ever_unknown(reader: PrefixReader) -> None:
    for call in calls_of("an with_edit last token") + calls_of("another prompt"):
        candidates = candidates_for(call)
        states = reader.read(*call, candidates, raise_if_unknown=raise_if_true)
        assert_same(states, read_from_scratch(reader._trunk, *call, candidates)[1])
