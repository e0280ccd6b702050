"""Recurrent memories of responses: step by step, and when rows are reordered, dropped or rolled back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mavis.critics.recurrent import RecurrentMemory, SequenceMemories
from mavis.policies.forward_pass import ResponsePosition


class UnknownRows(Exception):
    """Raised by these tests for unknown rows."""


def raise_if_true(answer: Tensor) -> None:
    if bool(answer):
        raise UnknownRows


@pytest.fixture
def memory() -> RecurrentMemory:
    torch.manual_seed(0)
    return RecurrentMemory(3, 4)


def at(length: int, starts_response: bool | None, shortest_resumable: int | None = None) -> ResponsePosition:
    """The position of rows without padding that are never rolled back."""
    return ResponsePosition(
        torch.tensor([length]), starts_response, length - 1 if shortest_resumable is None else shortest_resumable
    )


def test_single_steps_equal_the_whole_response(memory: RecurrentMemory) -> None:
    states, before = torch.randn(5, 6, 3), None
    at_once = memory(states)
    for step in range(6):
        before = memory.step(states[:, step], before)
        torch.testing.assert_close(before, at_once[:, step])


def test_reordered_duplicated_and_dropped_rows_keep_their_memory(memory: RecurrentMemory) -> None:
    """Each row has the memory of its own states, although parents are resampled at every step."""
    with torch.no_grad():
        torch.manual_seed(1)
        rows, ids = SequenceMemories(), torch.arange(4)[:, None] + 10
        states = torch.randn(4, 1, 3)
        found = rows.advance(memory, ids, states[:, 0], at(1, True), raise_if_true)
        for step in range(1, 8):
            parents = torch.randint(4, (4,))
            ids = torch.cat([ids[parents], torch.randperm(4)[:, None]], dim=1)  # no two rows alike
            states = torch.cat([states[parents], torch.randn(4, 1, 3)], dim=1)
            found = rows.advance(memory, ids, states[:, -1], at(step + 1, False), raise_if_true)
            torch.testing.assert_close(found, memory(states)[:, -1])


def test_rows_continue_when_the_batch_shrinks(memory: RecurrentMemory) -> None:
    with torch.no_grad():
        rows, ids, states = SequenceMemories(), torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.randn(3, 2, 3)
        rows.advance(memory, ids, states[:, 0], at(2, True), raise_if_true)
        ids = torch.cat([ids[[2, 0]], torch.tensor([[7], [8]])], dim=1)
        found = rows.advance(memory, ids, states[[2, 0], 1], at(3, False), raise_if_true)
        torch.testing.assert_close(found, memory(states)[[2, 0], 1])


def test_rows_continue_after_rejected_drafts(memory: RecurrentMemory) -> None:
    """Four drafts are read in turn at every step, of which a varying number is accepted."""
    with torch.no_grad():
        rows, ids, states = SequenceMemories(), torch.tensor([[1, 2]]), torch.randn(1, 1, 3)
        rows.advance(memory, ids, states[:, -1], at(2, True, shortest_resumable=0), raise_if_true)
        for accepted in (1, 3, 0, 2, 0):
            shortest_resumable = ids.shape[1]
            draft_ids, draft_states = torch.randint(50_000, (1, 4)), torch.randn(1, 4, 3)
            for n in range(1, 5):
                drafted = torch.cat([ids, draft_ids[:, :n]], dim=1)
                seen = torch.cat([states, draft_states[:, :n]], dim=1)
                found = rows.advance(
                    memory, drafted, seen[:, -1], at(shortest_resumable + n, False, shortest_resumable), raise_if_true
                )
                torch.testing.assert_close(found, memory(seen)[:, -1])
            ids = torch.cat([ids, draft_ids[:, : accepted + 1]], dim=1)
            states = torch.cat([states, draft_states[:, : accepted + 1]], dim=1)


@pytest.mark.parametrize(
    "ids",
    [[[1, 9, 7]], [[2, 1, 7]], [[1, 2, 7, 7]]],
    ids=["another token", "another order", "two tokens further"],
)
def test_unknown_rows_are_reported(memory: RecurrentMemory, ids: list[list[int]]) -> None:
    rows, states = SequenceMemories(), torch.randn(1, 3)
    rows.advance(memory, torch.tensor([[1, 2]]), states, at(2, True), raise_if_true)
    with pytest.raises(UnknownRows):
        rows.advance(memory, torch.tensor(ids), states, at(len(ids[0]), False), raise_if_true)


def test_without_a_cache_rows_start_anew_unless_all_are_known(memory: RecurrentMemory) -> None:
    with torch.no_grad():
        rows, states = SequenceMemories(), torch.randn(2, 2, 3)
        first = torch.tensor([[1, 2], [3, 4]])
        at_once = memory(states)
        begun = rows.advance(memory, first, states[:, 0], at(2, None), raise_if_true)
        torch.testing.assert_close(begun, at_once[:, 0])
        known = torch.tensor([[1, 2, 5], [3, 4, 5]])
        torch.testing.assert_close(rows.advance(memory, known, states[:, 1], at(3, None), raise_if_true), at_once[:, 1])
        partly = torch.tensor([[1, 2, 5, 0], [9, 4, 5, 0]])
        torch.testing.assert_close(
            rows.advance(memory, partly, states[:, 0], at(4, None), raise_if_true), at_once[:, 0]
        )


def test_keys_distinguish_orders_and_lengths(memory: RecurrentMemory) -> None:
    """A thousand random prefixes of three tokens in all orders have different keys: no two of them are confused."""
    rows = SequenceMemories()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50_000, (1_000, 3), generator=generator)
    ids = torch.cat([ids[:, order] for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [2, 1, 0])])
    ids = torch.unique(ids, dim=0)
    multipliers = rows._multipliers_for(3, ids.device)
    keys = (ids * multipliers[:3]).sum(1)
    assert len(torch.unique(keys)) == len(ids)
    assert (multipliers % 2 == 1).all()
    assert len(torch.unique(multipliers)) == len(multipliers)
    kept = multipliers[:1_000].clone()
    assert torch.equal(rows._multipliers_for(5_000, ids.device)[:1_000], kept)
