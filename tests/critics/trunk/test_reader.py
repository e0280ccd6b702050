"""A prefix reader returns the states of whole prefixes, and reads each token once."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mavis.critics.trunk import reader as prefix_reader
from mavis.critics.trunk.kv_cache import PrefixCache
from mavis.critics.trunk.reader import PrefixReader
from tests.critics.trunk.reading import (
    FAMILIES,
    SCENARIOS,
    VOCABULARY,
    assert_same,
    build,
    cached_reader,
    calls_of,
    candidates_for,
    fresh_reader,
    longer,
    prompts,
    read_from_scratch,
    truncated,
    with_edit,
    with_padding,
)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("family", FAMILIES)
def test_states_equal_those_of_prefixes_read_from_scratch(family: str, name: str) -> None:
    shared = cached_reader(family)
    calls = [(call, candidates_for(call)) for call in calls_of(name)]
    anew = [read_from_scratch(shared._trunk, *call, candidates) for call, candidates in calls]
    fresh_reader(family)
    for (call, candidates), (_, states) in zip(calls, anew, strict=True):
        assert_same(shared.read(*call, candidates), states)
    fresh_reader(family)
    for (call, _), (ends, _) in zip(calls, anew, strict=True):
        assert_same(shared.read(*call), ends)
    fresh_reader(family)
    for turn, ((call, candidates), (ends, states)) in enumerate(zip(calls, anew, strict=True)):
        if turn % 2:
            assert_same(shared.read(*call), ends)
        assert_same(shared.read(*call, candidates[:, : 1 + turn % 3]), states[:, : 1 + turn % 3])
        if turn % 3:
            assert_same(shared.read(*call), ends)


@settings(max_examples=40)
@given(st.data())
@pytest.mark.parametrize("family", ["Llama", "Gemma3, window 4"])
def test_random_sequences_of_calls_are_right_at_every_step(family: str, data: st.DataObject) -> None:
    reader, seen = fresh_reader(family), [prompts(0, 2)]
    for _ in range(data.draw(st.integers(1, 8), "steps")):
        call, seed = seen[-1], data.draw(st.integers(0, 99), "seed")
        number, length = call[0].shape
        rows = st.lists(st.integers(0, number - 1), min_size=1, max_size=4)
        kind = data.draw(st.sampled_from(["longer", "rows", "shorter", "edit", "prompt", "padding", "back"]), "kind")
        if kind == "longer":
            call = longer(call, data.draw(st.integers(1, 3)), seed=seed)
        elif kind == "rows":
            call = longer(call, 1, data.draw(rows), seed=seed)
        elif kind == "shorter":
            call = truncated(call, data.draw(st.integers(int(call[1].int().argmax(dim=1).max()) + 1, length)))
        elif kind == "edit":
            call = with_edit(call, data.draw(st.integers(0, number - 1)), data.draw(st.integers(0, length - 1)))
        elif kind == "prompt":
            call = prompts(*data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)), length=5, seed=seed)
        elif kind == "padding":
            call = with_padding(call, data.draw(st.integers(1, 2)))
        else:
            call = data.draw(st.sampled_from(seen))
        seen.append(call)
        candidates = candidates_for(call, data.draw(st.integers(1, 3), "candidates"))
        ends, states = read_from_scratch(reader._trunk, *call, candidates)
        if data.draw(st.booleans(), "states"):
            assert_same(reader.read(*call), ends)
        if data.draw(st.booleans(), "states of candidates"):
            assert_same(reader.read(*call, candidates), states)


def test_long_prefixes_grow_token_by_token(reader: PrefixReader) -> None:
    """Buffers grow several times on the way."""
    call = prompts(0, 3)
    for step in range(150):
        states = reader.read(*call, candidates_for(call))
        if step % 30 == 29:
            assert_same(states, read_from_scratch(reader._trunk, *call, candidates_for(call))[1])
        call = longer(call)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[threading.Thread, int]]:
    """The thread of each forward pass of a trunk, and the number of positions per row."""
    passes: list[tuple[threading.Thread, int]] = []
    forward = PrefixReader.forward

    def watched(reader: PrefixReader, ids: Tensor, *rest: Any) -> Tensor:
        passes.append((threading.current_thread(), ids.shape[1]))
        return forward(reader, ids, *rest)

    monkeypatch.setattr(PrefixReader, "forward", watched)
    return passes


def positions(passes: list[tuple[threading.Thread, int]]) -> list[int]:
    return [read for _, read in passes]


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("one token more at a time", [6, 1, 1, 1, 1, 5, 1]),
        ("several tokens at a time", [6, 3, 4, 1]),
        ("the same again", [6, 0, 1, 0, 0]),
        ("beams change places", [6, 1, 1]),
        ("beams double and drop out", [6, 1, 2]),
        ("beams change places in the last token only", [6, 1, 0]),
        ("fewer rows", [6, 1, 1]),
        ("more rows", [6, 1]),
        ("rollback", [13, 0, 1, 0, 1]),
        ("rollback to other rows", [13, 0]),
        ("an with_edit token", [13, 5, 1]),
        ("an with_edit last token", [8, 1, 1]),
        ("another prompt", [7, 7, 4, 6]),
        ("other ids where there is padding", [6, 0, 1]),
    ],
)
def test_each_token_is_read_once_where_possible(
    reader: PrefixReader, passes: list[tuple[threading.Thread, int]], name: str, read: list[int]
) -> None:
    for call in calls_of(name):
        reader.read(*call, candidates_for(call))
    assert positions(passes) == [new + 3 for new in read]


def test_known_states_take_no_pass_and_a_dropped_state_takes_one_token(
    reader: PrefixReader, passes: list[tuple[threading.Thread, int]]
) -> None:
    start = prompts(0, 3)
    reader.read(*start, candidates_for(start))
    reader.read(*start)
    assert positions(passes) == [9]
    shorter = truncated(start, 5)
    reader.read(*shorter, candidates_for(start))  # the state at its last token was dropped
    ends = reader.read(*shorter)
    assert positions(passes) == [9, 3, 1]
    assert_same(ends, read_from_scratch(reader._trunk, *shorter, candidates_for(start))[0])


def test_results_may_be_modified(reader: PrefixReader) -> None:
    start = prompts(0, 3)
    expected = read_from_scratch(reader._trunk, *start, candidates_for(start))[0]
    for _ in range(3):
        ends = reader.read(*start)
        assert_same(ends, expected)
        ends.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_holds_prefixes_without_candidates(family: str) -> None:
    reader = fresh_reader(family)
    for call in calls_of("one token more at a time") + calls_of("rollback"):
        reader.read(*call, candidates_for(call))
        cache: PrefixCache = reader._thread.kept.cache
        assert [layer.get_seq_length() for layer in cache.layers] == [call[0].shape[1]] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_do_not_attend_to_each_other(family: str) -> None:
    reader, call = fresh_reader(family), prompts(0, 3)
    candidates = candidates_for(call, 5)
    states = reader.read(*call, candidates)
    order = torch.tensor([3, 0, 4, 1, 2])
    for now in (call, longer(call)):
        states = reader.read(*now, candidates)
        assert_same(reader.read(*now, candidates[:, order]), states[:, order])
        assert_same(reader.read(*now, candidates[:, :2]), states[:, :2])
        assert_same(reader.read(*now, candidates[:, :1].expand(-1, 4)), states[:, :1].expand(-1, 4, -1))


def test_many_candidates_are_read_in_several_passes(reader: PrefixReader, monkeypatch: pytest.MonkeyPatch) -> None:
    call = prompts(0, 3)
    every = torch.arange(VOCABULARY).expand(2, -1)
    at_once = reader.read(*call, every)
    monkeypatch.setattr(prefix_reader, "_MAX_CANDIDATES_PER_PASS", 25)
    assert_same(reader.read(*longer(call), every), read_from_scratch(reader._trunk, *longer(call), every)[1])
    assert_same(reader.read(*call, every), at_once)


def test_inputs_are_not_modified_and_may_change_afterwards(reader: PrefixReader) -> None:
    ids, is_token = prompts(0, 3)
    candidates = candidates_for((ids, is_token))
    before = [tensor.clone() for tensor in (ids, is_token, candidates)]
    states = reader.read(ids, is_token, candidates)
    assert all(torch.equal(*pair) for pair in zip((ids, is_token, candidates), before, strict=True))
    ids += 1
    ids %= VOCABULARY
    assert_same(reader.read(ids, is_token, candidates), read_from_scratch(reader._trunk, ids, is_token, candidates)[1])
    ids.copy_(before[0])
    assert_same(reader.read(ids, is_token, candidates), states)


def test_ids_may_be_of_any_integer_dtype(reader: PrefixReader) -> None:
    (ids, is_token), candidates = prompts(0, 3), candidates_for(prompts(0, 3))
    states = reader.read(ids.int(), is_token, candidates.int())
    assert_same(states, read_from_scratch(reader._trunk, ids, is_token, candidates)[1])


def test_threads_are_independent(passes: list[tuple[threading.Thread, int]]) -> None:
    """Threads that generate in lockstep get the right states, and read each token once."""
    reader = PrefixReader(build("Llama"))
    calls = [
        list(itertools.accumulate(range(4), lambda call, _: longer(call), initial=prompts(0, n))) for n in range(3)
    ]
    anew = [[read_from_scratch(reader._trunk, *call, candidates_for(call))[1] for call in some] for some in calls]
    turn, errors = threading.Barrier(3), []

    def generate(number: int) -> None:
        for call, states in zip(calls[number], anew[number], strict=True):
            turn.wait(30)
            errors.append(float((reader.read(*call, candidates_for(call)) - states).abs().max()))

    threads = [threading.Thread(target=generate, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(errors) == 15
    assert max(errors) < 1e-5
    for thread in threads:
        assert [read for reading, read in passes if reading is thread] == [9, 4, 4, 4, 4]


def test_released_prefixes_are_read_again(reader: PrefixReader, passes: list[tuple[threading.Thread, int]]) -> None:
    with ThreadPoolExecutor(max_workers=1) as other:
        for let_go in (lambda: None, reader.release, reader.release_all):
            reader.read(*prompts(0, 3))
            other.submit(reader.read, *prompts(0, 3)).result()
            let_go()
            reader.read(*prompts(0, 3))
            other.submit(reader.read, *prompts(0, 3)).result()
    assert positions(passes) == [6, 6, 6, 6, 6]  # both threads, then this one again, then both again


def test_changed_weights_invalidate_the_cache() -> None:
    reader, call = PrefixReader(build("Llama")), prompts(0, 3)
    reader.read(*call)
    with torch.no_grad():
        reader._trunk.layers[0].mlp.up_proj.weight.mul_(1.5)
    expected = read_from_scratch(reader._trunk, *longer(call), candidates_for(call))
    assert_same(reader.read(*longer(call)), expected[0])
    reader._trunk.load_state_dict(build("Llama", seed=1).state_dict())
    expected = read_from_scratch(reader._trunk, *call, candidates_for(call))
    assert_same(reader.read(*call, candidates_for(call)), expected[1])
    reader._trunk.double()
    expected = read_from_scratch(reader._trunk, *call, candidates_for(call))
    assert_same(reader.read(*call, candidates_for(call)), expected[1])


@pytest.mark.parametrize("where", ["in the trunk", "while rows change places"])
@pytest.mark.parametrize("family", ["Llama", "GPT-2"])
def test_interrupted_calls_leave_no_corrupt_cache(family: str, where: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    reader, start = fresh_reader(family), prompts(0, 3)
    reader.read(*start)
    with pytest.MonkeyPatch.context() as patch:
        if where == "in the trunk":
            patch.setattr(reader._thread.kept.cache.layers[1], "update", fail)
        else:
            patch.setattr(reader._thread.kept.cache.layers[1], "select", fail)
        with pytest.raises(KeyboardInterrupt):
            reader.read(*longer(start, 1, [1, 0]), candidates_for(start))
    for call in (start, longer(start)):
        assert_same(reader.read(*call), read_from_scratch(reader._trunk, *call, candidates_for(call))[0])


def test_inference_mode_may_change_between_calls(reader: PrefixReader) -> None:
    call = prompts(0, 3)
    for step in range(4):
        expected = read_from_scratch(reader._trunk, *call, candidates_for(call))[1]
        with torch.inference_mode(step % 2 == 0):
            states = reader.read(*call, candidates_for(call))
        assert_same(states, expected)
        assert not states.is_inference()
        assert not states.requires_grad
        call = longer(call)


def test_half_precision_trunks_return_float32_states(reader: PrefixReader) -> None:
    half = PrefixReader(build("Llama").bfloat16())
    for call in calls_of("one token more at a time") + calls_of("beams double and drop out"):
        expected = read_from_scratch(half._trunk, *call, candidates_for(call))
        for actual, wanted in zip((half.read(*call), half.read(*call, candidates_for(call))), expected, strict=True):
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual, wanted, rtol=0.05, atol=0.05)
    assert half._thread.kept.cache.layers[0].keys.dtype == torch.bfloat16
