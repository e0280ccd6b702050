"""A trunk that reads prefixes step by step, held against the same trunk reading every prefix anew."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mavis.critics.trunk import reader as prefix_reader
from mavis.critics.trunk.kv_cache import PrefixCache, StepMask, prefix_mask
from mavis.critics.trunk.reader import PrefixReader
from mavis.errors import CriticError, DecodingError

VOCABULARY = 61
Call = tuple[Tensor, Tensor]
"""Ids of prefixes, and which of them are tokens."""


def build(family: str, seed: int = 0, **settings: Any) -> Any:
    """Build a random trunk of two layers whose states depend much on what its attention sees."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "initializer_range": 0.3, "max_position_embeddings": 200,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family in ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3Text"):
        sizes["num_key_value_heads"] = 1
    if family in ("Qwen3", "Gemma2", "Gemma3Text"):
        sizes["head_dim"] = 8
    if family == "GPT2":
        del sizes["intermediate_size"]
    if family == "OPT":
        sizes |= {"ffn_dim": 24, "word_embed_proj_dim": 16}
        sizes["init_std"] = sizes.pop("initializer_range")
        del sizes["intermediate_size"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**sizes | settings))
        for name, weight in trunk.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(weight, std=0.1)
    return trunk.eval()


MIXED = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, Callable[[], Any]] = {
    "Llama": lambda: build("Llama"),
    "Llama, every layer with biases": lambda: build("Llama", attention_bias=True, mlp_bias=True),
    "GPT-2": lambda: build("GPT2"),
    "Qwen2": lambda: build("Qwen2"),
    "Qwen2, one layer with a window": lambda: build(
        "Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "Qwen3": lambda: build("Qwen3"),
    "Mistral, window 4": lambda: build("Mistral", sliding_window=4),
    "Mistral, window 1": lambda: build("Mistral", sliding_window=1),
    "Gemma2, window 4": lambda: build("Gemma2", sliding_window=4),
    "Gemma3, window 4": lambda: build("Gemma3Text", sliding_window=4, layer_types=MIXED),
    "OPT": lambda: build("OPT"),
    "GPT-NeoX": lambda: build("GPTNeoX"),
}


@functools.cache
def reader_of(family: str) -> PrefixReader:
    return PrefixReader(FAMILIES[family]())


@pytest.fixture
def reader() -> PrefixReader:
    """A reader with a Llama, which has read nothing yet."""
    return fresh("Llama")


def fresh(family: str) -> PrefixReader:
    reader = reader_of(family)
    reader.release_all()
    return reader


@torch.no_grad()
def read_anew(trunk: Any, prefix_ids: Tensor, is_token: Tensor, candidate_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Read every row alone, without padding and without cache, once for each of its candidates.

    Returns:
        States at the ends of the prefixes (B, H), and at the candidates (B, K, H).
    """
    ends, states = [], []
    for ids, kept, candidates in zip(prefix_ids, is_token, candidate_ids, strict=True):
        rows = torch.cat([ids[kept].expand(len(candidates), -1), candidates[:, None]], dim=1)
        places = torch.arange(rows.shape[1]).expand(len(rows), -1)
        hidden = trunk(
            input_ids=rows, attention_mask=torch.ones_like(rows), position_ids=places, use_cache=False
        ).last_hidden_state.float()
        ends.append(hidden[0, -2])
        states.append(hidden[:, -1])
    return torch.stack(ends), torch.stack(states)


def prompts(*padding: int, length: int = 6, seed: int = 0) -> Call:
    """Random prefixes, one for each number of positions of padding."""
    ids = torch.randint(VOCABULARY, (len(padding), length), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(length) >= torch.tensor(padding)[:, None]


def then(call: Call, new: int = 1, rows: list[int] | None = None, seed: int = 1) -> Call:
    """The prefixes of some rows with new tokens after them."""
    ids, is_token = call if rows is None else (call[0][rows], call[1][rows])
    added = torch.randint(VOCABULARY, (len(ids), new), generator=torch.Generator().manual_seed(seed + ids.shape[1]))
    return torch.cat([ids, added], dim=1), torch.cat([is_token, torch.ones_like(added, dtype=torch.bool)], dim=1)


def cut(call: Call, length: int) -> Call:
    return call[0][:, :length], call[1][:, :length]


def edited(call: Call, row: int, place: int) -> Call:
    ids = call[0].clone()
    ids[row, place] = (ids[row, place] + 1) % VOCABULARY
    return ids, call[1]


def padded(call: Call, more: int) -> Call:
    """The same tokens with more padding before them."""
    ids, is_token = call
    return (
        torch.cat([ids[:, :1].expand(-1, more), ids], dim=1),
        torch.cat([torch.zeros(len(ids), more, dtype=torch.bool), is_token], dim=1),
    )


def story(name: str) -> list[Call]:
    """What generation, or something stranger, asks for in turn."""
    start = prompts(0, 3, 1)
    one = then(start)
    two = then(one)
    grown = then(two, 5)
    first_hidden = (start[0], start[1] & (torch.arange(6) > 1))
    return {
        "one token more at a time": [start, one, two, then(two), then(then(two)), grown, then(grown)],
        "several tokens at a time": [start, then(start, 3), then(then(start, 3), 4), then(then(then(start, 3), 4))],
        "from a single token on": [prompts(0, length=1), then(prompts(0, length=1))],
        "the same again": [start, start, one, one, one],
        "beams change places": [start, then(start, 1, [2, 0, 1]), then(then(start, 1, [2, 0, 1]), 1, [1, 0, 2])],
        "beams double and drop out": [start, then(start, 1, [1, 1, 2]), then(then(start, 1, [1, 1, 2]), 2, [2, 0, 0])],
        "beams change places in the last token only": [start, one, (one[0][[1, 2, 0]], one[1][[1, 2, 0]])],
        "fewer rows": [start, then(start, 1, [2, 1]), then(then(start, 1, [2, 1]), 1, [0])],
        "more rows": [start, then(start, 1, [0, 1, 2, 2, 0])],
        "rollback": [grown, two, then(two, 1, seed=7), start, one],
        "rollback to other rows": [grown, cut((grown[0][[2, 2, 1]], grown[1][[2, 2, 1]]), 8)],
        "less padding after a rollback": [
            prompts(5, 0, length=8), then(prompts(5, 0, length=8)), then(then(prompts(5, 0, length=8)), 3),
            prompts(3, 0, length=8), then(prompts(3, 0, length=8)),
        ],
        "an edited token": [grown, edited(grown, 0, 8), then(edited(grown, 0, 8))],
        "an edited beginning": [two, edited(two, 0, 0), edited(two, 2, 1)],
        "an edited last token": [two, edited(two, 1, 7), then(edited(two, 1, 7))],
        "another prompt": [one, prompts(2, 0, 0, length=7, seed=5), prompts(0, length=4, seed=6), start],
        "another prompt in one row": [start, then((torch.cat([start[0][:2], prompts(1, seed=9)[0]]), start[1]))],
        "more padding before the same tokens": [two, padded(two, 2), then(padded(two, 2)), two],
        "tokens that have become padding": [start, first_hidden, then(first_hidden), one],
        "other ids where there is padding": [start, (torch.where(start[1], start[0], 7), start[1]), one],
    }[name]  # fmt: skip


STORIES = [
    "one token more at a time", "several tokens at a time", "from a single token on", "the same again",
    "beams change places", "beams double and drop out", "beams change places in the last token only", "fewer rows",
    "more rows", "rollback", "rollback to other rows", "less padding after a rollback", "an edited token",
    "an edited beginning", "an edited last token",
    "another prompt", "another prompt in one row", "more padding before the same tokens",
    "tokens that have become padding", "other ids where there is padding",
]  # fmt: skip


def candidates_for(call: Call, number: int = 3) -> Tensor:
    return torch.randint(VOCABULARY, (len(call[0]), number), generator=torch.Generator().manual_seed(len(call[0][0])))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STORIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_is_asked_for_the_states_are_those_of_prefixes_read_anew(family: str, name: str) -> None:
    shared = reader_of(family)
    calls = [(call, candidates_for(call)) for call in story(name)]
    anew = [read_anew(shared._trunk, *call, candidates) for call, candidates in calls]
    fresh(family)
    for (call, candidates), (_, states) in zip(calls, anew, strict=True):
        assert_same(shared.read(*call, candidates), states)
    fresh(family)
    for (call, _), (ends, _) in zip(calls, anew, strict=True):
        assert_same(shared.read(*call), ends)
    fresh(family)
    for turn, ((call, candidates), (ends, states)) in enumerate(zip(calls, anew, strict=True)):
        if turn % 2:
            assert_same(shared.read(*call), ends)
        assert_same(shared.read(*call, candidates[:, : 1 + turn % 3]), states[:, : 1 + turn % 3])
        if turn % 3:
            assert_same(shared.read(*call), ends)


@settings(max_examples=40)
@given(st.data())
@pytest.mark.parametrize("family", ["Llama", "Gemma3, window 4"])
def test_a_random_walk_of_calls_is_right_at_every_step(family: str, data: st.DataObject) -> None:
    reader, seen = fresh(family), [prompts(0, 2)]
    for _ in range(data.draw(st.integers(1, 8), "steps")):
        call, seed = seen[-1], data.draw(st.integers(0, 99), "seed")
        number, length = call[0].shape
        rows = st.lists(st.integers(0, number - 1), min_size=1, max_size=4)
        kind = data.draw(st.sampled_from(["longer", "rows", "shorter", "edit", "prompt", "padding", "back"]), "kind")
        if kind == "longer":
            call = then(call, data.draw(st.integers(1, 3)), seed=seed)
        elif kind == "rows":
            call = then(call, 1, data.draw(rows), seed=seed)
        elif kind == "shorter":
            call = cut(call, data.draw(st.integers(int(call[1].int().argmax(dim=1).max()) + 1, length)))
        elif kind == "edit":
            call = edited(call, data.draw(st.integers(0, number - 1)), data.draw(st.integers(0, length - 1)))
        elif kind == "prompt":
            call = prompts(*data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)), length=5, seed=seed)
        elif kind == "padding":
            call = padded(call, data.draw(st.integers(1, 2)))
        else:
            call = data.draw(st.sampled_from(seen))
        seen.append(call)
        candidates = candidates_for(call, data.draw(st.integers(1, 3), "candidates"))
        ends, states = read_anew(reader._trunk, *call, candidates)
        if data.draw(st.booleans(), "states"):
            assert_same(reader.read(*call), ends)
        if data.draw(st.booleans(), "states of candidates"):
            assert_same(reader.read(*call, candidates), states)


def test_a_hundred_and_fifty_tokens_one_by_one(reader: PrefixReader) -> None:
    """Buffers grow several times on the way."""
    call = prompts(0, 3)
    for step in range(150):
        states = reader.read(*call, candidates_for(call))
        if step % 30 == 29:
            assert_same(states, read_anew(reader._trunk, *call, candidates_for(call))[1])
        call = then(call)


@pytest.fixture
def passes_made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[threading.Thread, int]]:
    """Who made each forward pass of a trunk, and how many positions of a row it read."""
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
        ("an edited token", [13, 5, 1]),
        ("an edited last token", [8, 1, 1]),
        ("another prompt", [7, 7, 4, 6]),
        ("other ids where there is padding", [6, 0, 1]),
    ],
)
def test_no_token_is_read_twice_that_need_not_be(
    reader: PrefixReader, passes_made: list[tuple[threading.Thread, int]], name: str, read: list[int]
) -> None:
    for call in story(name):
        reader.read(*call, candidates_for(call))
    assert positions(passes_made) == [new + 3 for new in read]


def test_what_is_known_takes_no_pass_and_a_state_that_was_skipped_takes_one_token(
    reader: PrefixReader, passes_made: list[tuple[threading.Thread, int]]
) -> None:
    start = prompts(0, 3)
    reader.read(*start, candidates_for(start))
    reader.read(*start)
    assert positions(passes_made) == [9]
    shorter = cut(start, 5)
    reader.read(*shorter, candidates_for(start))  # the state at its last token has not been kept
    ends = reader.read(*shorter)
    assert positions(passes_made) == [9, 3, 1]
    assert_same(ends, read_anew(reader._trunk, *shorter, candidates_for(start))[0])


def test_a_result_may_be_written_to(reader: PrefixReader) -> None:
    start = prompts(0, 3)
    expected = read_anew(reader._trunk, *start, candidates_for(start))[0]
    for _ in range(3):
        ends = reader.read(*start)
        assert_same(ends, expected)
        ends.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_holds_prefixes_only(family: str) -> None:
    reader = fresh(family)
    for call in story("one token more at a time") + story("rollback"):
        reader.read(*call, candidates_for(call))
        cache: PrefixCache = reader._thread.kept.cache
        assert [layer.get_seq_length() for layer in cache.layers] == [call[0].shape[1]] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_do_not_see_each_other(family: str) -> None:
    reader, call = fresh(family), prompts(0, 3)
    candidates = candidates_for(call, 5)
    states = reader.read(*call, candidates)
    order = torch.tensor([3, 0, 4, 1, 2])
    for now in (call, then(call)):
        states = reader.read(*now, candidates)
        assert_same(reader.read(*now, candidates[:, order]), states[:, order])
        assert_same(reader.read(*now, candidates[:, :2]), states[:, :2])
        assert_same(reader.read(*now, candidates[:, :1].expand(-1, 4)), states[:, :1].expand(-1, 4, -1))


def test_many_candidates_are_read_in_parts(reader: PrefixReader, monkeypatch: pytest.MonkeyPatch) -> None:
    call = prompts(0, 3)
    every = torch.arange(VOCABULARY).expand(2, -1)
    at_once = reader.read(*call, every)
    monkeypatch.setattr(prefix_reader, "_AT_ONCE", 25)
    assert_same(reader.read(*then(call), every), read_anew(reader._trunk, *then(call), every)[1])
    assert_same(reader.read(*call, every), at_once)


def test_inputs_stay_as_they_are_and_may_change_afterwards(reader: PrefixReader) -> None:
    ids, is_token = prompts(0, 3)
    candidates = candidates_for((ids, is_token))
    before = [tensor.clone() for tensor in (ids, is_token, candidates)]
    states = reader.read(ids, is_token, candidates)
    assert all(torch.equal(*pair) for pair in zip((ids, is_token, candidates), before, strict=True))
    ids += 1
    ids %= VOCABULARY
    assert_same(reader.read(ids, is_token, candidates), read_anew(reader._trunk, ids, is_token, candidates)[1])
    ids.copy_(before[0])
    assert_same(reader.read(ids, is_token, candidates), states)


def test_ids_may_be_of_any_integer_dtype(reader: PrefixReader) -> None:
    (ids, is_token), candidates = prompts(0, 3), candidates_for(prompts(0, 3))
    states = reader.read(ids.int(), is_token, candidates.int())
    assert_same(states, read_anew(reader._trunk, ids, is_token, candidates)[1])


def test_threads_do_not_disturb_each_other(passes_made: list[tuple[threading.Thread, int]]) -> None:
    """Each generates on its own, in step with the others; its states are right, and it reads no token twice."""
    reader = PrefixReader(build("Llama"))
    calls = [list(itertools.accumulate(range(4), lambda call, _: then(call), initial=prompts(0, n))) for n in range(3)]
    anew = [[read_anew(reader._trunk, *call, candidates_for(call))[1] for call in some] for some in calls]
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
        assert [read for reading, read in passes_made if reading is thread] == [9, 4, 4, 4, 4]


def test_what_is_released_is_read_again(reader: PrefixReader, passes_made: list[tuple[threading.Thread, int]]) -> None:
    with ThreadPoolExecutor(max_workers=1) as other:
        for let_go in (lambda: None, reader.release, reader.release_all):
            reader.read(*prompts(0, 3))
            other.submit(reader.read, *prompts(0, 3)).result()
            let_go()
            reader.read(*prompts(0, 3))
            other.submit(reader.read, *prompts(0, 3)).result()
    assert positions(passes_made) == [6, 6, 6, 6, 6]  # both at first, this thread once more, and both once more


def test_changed_weights_read_everything_again() -> None:
    reader, call = PrefixReader(build("Llama")), prompts(0, 3)
    reader.read(*call)
    with torch.no_grad():
        reader._trunk.layers[0].mlp.up_proj.weight.mul_(1.5)
    expected = read_anew(reader._trunk, *then(call), candidates_for(call))
    assert_same(reader.read(*then(call)), expected[0])
    reader._trunk.load_state_dict(build("Llama", seed=1).state_dict())
    expected = read_anew(reader._trunk, *call, candidates_for(call))
    assert_same(reader.read(*call, candidates_for(call)), expected[1])
    reader._trunk.double()
    expected = read_anew(reader._trunk, *call, candidates_for(call))
    assert_same(reader.read(*call, candidates_for(call)), expected[1])


@pytest.mark.parametrize("where", ["in the trunk", "while rows change places"])
@pytest.mark.parametrize("family", ["Llama", "GPT-2"])
def test_a_call_that_breaks_off_leaves_nothing_wrong_behind(family: str, where: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    reader, start = fresh(family), prompts(0, 3)
    reader.read(*start)
    with pytest.MonkeyPatch.context() as patch:
        if where == "in the trunk":
            patch.setattr(reader._thread.kept.cache.layers[1], "update", fail)
        else:
            patch.setattr(reader._thread.kept.cache.layers[1], "select", fail)
        with pytest.raises(KeyboardInterrupt):
            reader.read(*then(start, 1, [1, 0]), candidates_for(start))
    for call in (start, then(start)):
        assert_same(reader.read(*call), read_anew(reader._trunk, *call, candidates_for(call))[0])


def test_inference_mode_may_come_and_go(reader: PrefixReader) -> None:
    call = prompts(0, 3)
    for step in range(4):
        expected = read_anew(reader._trunk, *call, candidates_for(call))[1]
        with torch.inference_mode(step % 2 == 0):
            states = reader.read(*call, candidates_for(call))
        assert_same(states, expected)
        assert not states.is_inference()
        assert not states.requires_grad
        call = then(call)


def test_half_precision_is_read_in_half_precision_and_given_in_single(reader: PrefixReader) -> None:
    half = PrefixReader(build("Llama").bfloat16())
    for call in story("one token more at a time") + story("beams double and drop out"):
        expected = read_anew(half._trunk, *call, candidates_for(call))
        for actual, wanted in zip((half.read(*call), half.read(*call, candidates_for(call))), expected, strict=True):
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual, wanted, rtol=0.05, atol=0.05)
    assert half._thread.kept.cache.layers[0].keys.dtype == torch.bfloat16


# --- Rows that are taken to go on, without the host knowing it -------------------------------------------------------


class Lost(Exception):
    """What these tests raise for rows that do not go on from those before."""


def refuse(answer: Tensor) -> None:
    if bool(answer):
        raise Lost


class Unseeing(TorchDispatchMode):
    """Forbids what would make the host wait for an accelerator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.__name__.split(".")[0] not in {"_local_scalar_dense", "equal", "nonzero", "is_nonzero"}, func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Makes a reader treat the CPU as an accelerator; lists what it tells about rows that it took to go on."""
    answers: list[Tensor] = []
    take = PrefixReader._take
    monkeypatch.setattr(PrefixReader, "_take", lambda reader, ids, missing: take(reader, ids, answers.append))
    return answers


@pytest.mark.parametrize(
    "name",
    ["one token more at a time", "the same again", "beams change places", "beams double and drop out", "fewer rows",
     "more rows", "from a single token on"],
)  # fmt: skip
def test_rows_that_go_on_are_read_without_waiting_for_their_ids(
    reader: PrefixReader, told: list[Tensor], name: str
) -> None:
    calls = story(name)
    reader.read(*calls[0], candidates_for(calls[0]))
    for before, call in itertools.pairwise(calls):
        candidates = candidates_for(call)
        expected = read_anew(reader._trunk, *call, candidates)
        if call[0].shape[1] - before[0].shape[1] > 1:
            reader.read(*call)
            continue
        with Unseeing():
            states, ends = reader.read(*call, candidates), reader.read(*call)
        assert_same(states, expected[1])
        assert_same(ends, expected[0])
    assert told
    assert not any(told)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("an edited last token", 1), ("an edited beginning", 1), ("tokens that have become padding", 1),
     ("another prompt in one row", 1)],
)  # fmt: skip
def test_rows_that_do_not_go_on_are_told_of_and_never_gone_on_from(
    reader: PrefixReader, told: list[Tensor], name: str, wrong: int
) -> None:
    """Even if nobody stops there: the next call of the same rows is told of again, and one that may wait is right."""
    calls = story(name)
    reader.read(*calls[0])
    assert not any(told)
    reader.read(*calls[wrong])
    assert told.pop()
    assert not any(told)
    after = then(calls[wrong])
    reader.read(*after)
    assert told.pop()
    reader.read(*then(after, 2))  # so many more tokens are compared with the host waiting
    assert_same(reader.read(*then(after, 2)), read_anew(reader._trunk, *then(after, 2), candidates_for(after))[0])


def test_right_padding_is_told_of_too(reader: PrefixReader, told: list[Tensor]) -> None:
    ids, is_token = prompts(0, 3)
    reader.read(ids, is_token)
    is_token = torch.cat([is_token, torch.tensor([[True], [False]])], dim=1)
    reader.read(torch.cat([ids, ids[:, :1]], dim=1), is_token)
    assert told.pop()


def test_on_the_cpu_nothing_is_ever_missing(reader: PrefixReader) -> None:
    for call in story("an edited last token") + story("another prompt"):
        candidates = candidates_for(call)
        states = reader.read(*call, candidates, missing=refuse)
        assert_same(states, read_anew(reader._trunk, *call, candidates)[1])


# --- Masks ------------------------------------------------------------------------------------------------------------


def test_a_mask_shows_tokens_up_to_a_position_and_a_candidate_itself() -> None:
    """Two tokens after one of padding; the last is read, and two candidates with a window of two."""
    seen = prefix_mask(torch.tensor([[False, True, True]]), 2, 2, None, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [[0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 0, 1]]
    seen = prefix_mask(torch.tensor([[False, True, True]]), 3, 2, 2, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0],  # padding sees itself, and nobody sees it
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 0, 1],
    ]


@pytest.mark.parametrize("window", [None, 1, 2, 5])
def test_a_mask_that_grows_is_the_one_built_anew(window: int | None) -> None:
    mask = StepMask(window)
    for length in range(4, 150):
        is_token = torch.arange(length) >= torch.tensor([0, 3])[:, None]
        candidates = 3 if length < 40 else 1
        for new in (1, 0):
            expected = prefix_mask(is_token, new, candidates, window, torch.float32)
            assert torch.equal(mask.mask(is_token, new, candidates, torch.float32), expected)
        if length == 20:
            mask.select(torch.tensor([0, 1]))


# --- Which trunks ---------------------------------------------------------------------------------------------------


def test_a_reader_leaves_random_numbers_modes_and_windows_alone() -> None:
    trunk = build("Mistral", sliding_window=4).train()
    trunk.layers[0].eval()
    modes = [module.training for module in trunk.modules()]
    state, weights = torch.get_rng_state(), {name: weight.clone() for name, weight in trunk.state_dict().items()}
    PrefixReader(trunk)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in trunk.modules()] == modes
    assert trunk.config.sliding_window == 4
    assert all(torch.equal(weight, weights[name]) for name, weight in trunk.state_dict().items())


@pytest.mark.parametrize(
    ("family", "attention"), [("Llama", "sdpa"), ("Gemma2, window 4", "eager"), ("GPT-NeoX", "sdpa")]
)
def test_attention_is_set_to_one_that_takes_the_masks(family: str, attention: str) -> None:
    trunk = FAMILIES[family]()
    trunk.set_attn_implementation("eager")
    PrefixReader(trunk)
    assert trunk.config._attn_implementation == attention


def small(family: str, **settings: Any) -> Any:
    """Build a model of a kind that does not take the usual sizes by the usual names."""
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, hidden_size=16, **settings)
    with torch.random.fork_rng(devices=[]):
        return getattr(transformers, f"{family}Model")(config).eval()


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ALIBI = {"num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True}
LOCAL = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "recurrent": (lambda: small("Mamba", num_hidden_layers=2), "MambaModel, whose forward does not take"),
    "ALiBi": (lambda: small("Bloom", n_layer=2, n_head=2, **SPECIAL), "BloomModel, whose forward does not take"),
    "ALiBi beside positions": (lambda: small("Falcon", **ALIBI), "FalconModel, which raises"),
    "encoder": (lambda: build("Bert"), "BertModel, whose attention is not causal"),
    "windows of its own": (lambda: small("GPTNeo", **LOCAL, **SPECIAL), "GPTNeoModel, whose window_size of 256"),
    "rotary frequencies that change": (
        lambda: build("Llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "LlamaModel, whose rotary frequencies (dynamic) change",
    ),
    "a language model's head": (
        lambda: transformers.LlamaForCausalLM(build("Llama").config),
        "LlamaForCausalLM, which has an output embedding",
    ),
    "no weights": (lambda: build("Llama").to("meta"), "LlamaModel, whose weights are on the meta device"),
    "no model": (lambda: nn.Linear(2, 2), "Linear, which is no model of transformers"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_trunks_that_cannot_be_read_step_by_step_are_refused_by_name(kind: str) -> None:
    make, said = REFUSED[kind]
    with torch.random.fork_rng(devices=[]):
        trunk = make()
    with pytest.raises(CriticError) as caught:
        PrefixReader(trunk)
    assert f"trunk is a {said}" in caught.value.message
    assert "position_ids" in caught.value.hint


@pytest.mark.parametrize("mistake", ["positions are ignored", "masks are ignored"])
def test_a_trunk_that_says_it_takes_positions_and_masks_is_tried(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(transformers.LlamaModel):
        def forward(  # type: ignore[no-untyped-def]
            self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None
        ):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask if mistake == "positions are ignored" else None,
                position_ids=position_ids if mistake == "masks are ignored" else None,
                past_key_values=past_key_values,
                use_cache=use_cache,
            )

    trunk = Careless(build("Llama").config).eval()
    trunk.set_attn_implementation("eager")
    with pytest.raises(CriticError, match="Careless, whose states step by step differ from those of whole prefixes"):
        PrefixReader(trunk)
    assert trunk.config._attn_implementation == "eager"


# --- Calls that cannot be answered ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix_ids", "is_token", "candidate_ids", "said"),
    [
        (torch.ones(2, 0).long(), torch.ones(2, 0).bool(), None, "prefix_ids has shape (2, 0)"),
        (torch.ones(3).long(), torch.ones(3).bool(), None, "prefix_ids has shape (3,)"),
        (torch.ones(2, 3).long(), torch.ones(2, 2).bool(), None, "is_token (2, 2) of torch.bool"),
        (torch.ones(2, 3).long(), torch.ones(2, 3).long(), None, "is_token (2, 3) of torch.int64"),
        (torch.ones(2, 3).long(), torch.ones(2, 3).bool(), torch.ones(3, 4).long(), "candidate_ids has shape (3, 4)"),
        (torch.ones(2, 3).long(), torch.ones(2, 3).bool(), torch.ones(2, 0).long(), "candidate_ids has shape (2, 0)"),
        (torch.ones(2, 3).long(), torch.ones(2, 3).bool(), torch.ones(2).long(), "candidate_ids has shape (2,)"),
        (torch.ones(2, 2).long(), torch.tensor([[True, True], [True, False]]), None, "rows that end with padding"),
    ],
)
def test_calls_that_do_not_fit_are_refused(
    reader: PrefixReader, prefix_ids: Tensor, is_token: Tensor, candidate_ids: Tensor | None, said: str
) -> None:
    with pytest.raises(DecodingError) as caught:
        reader.read(prefix_ids, is_token, candidate_ids)
    assert said in caught.value.message


@pytest.mark.parametrize("family", ["GPT2", "OPT"])
def test_a_trunk_with_learnt_positions_reads_no_further(family: str) -> None:
    reader, call = PrefixReader(build(family, max_position_embeddings=12)), prompts(0, length=12)
    assert_same(
        reader.read(*cut(call, 11), candidates_for(call)),
        read_anew(reader._trunk, *cut(call, 11), candidates_for(call))[1],
    )
    reader.read(*call)
    with pytest.raises(DecodingError, match="prefix_ids has 12 positions, but the trunk has learnt 12"):
        reader.read(*call, candidates_for(call))


def test_a_trunk_whose_mode_or_attention_has_been_changed_is_not_read() -> None:
    trunk = build("Llama")
    reader = PrefixReader(trunk)
    trunk.train()
    with pytest.raises(CriticError, match="training mode"):
        reader.read(*prompts(0, 3))
    trunk.eval()
    trunk.set_attn_implementation("eager")
    with pytest.raises(CriticError, match="trunk has attention 'eager', expected 'sdpa'"):
        reader.read(*prompts(0, 3))


@pytest.mark.parametrize("family", ["Llama", "GPT-NeoX"])
def test_weights_are_laid_out_input_by_input_and_keep_their_values_and_places(family: str) -> None:
    trunk = FAMILIES[family]()
    before = {name: (weight, weight.clone()) for name, weight in trunk.named_parameters()}
    PrefixReader(trunk)
    for name, weight in trunk.named_parameters():
        same, values = before[name]
        assert weight is same
        assert torch.equal(weight, values)
        assert weight.dim() < 2 or weight.t().is_contiguous() == ("embed" not in name), name


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_are_known_are_read_in_few_operations(family: str) -> None:
    known = family.startswith(("Llama", "Qwen", "Mistral")) and family != "Llama, every layer with biases"
    assert (fresh(family)._fused is not None) == known


def test_what_a_trunk_does_otherwise_than_its_family_is_found_out_by_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk, call = build("Llama"), prompts(0, 3)
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda norm, states: 2 * norm.weight * states)
    reader = PrefixReader(trunk)
    assert reader._fused is None
    assert_same(reader.read(*call), read_anew(trunk, *call, candidates_for(call))[0])
    assert reader._fused is None


def one_weights_data(trunk: Any) -> None:
    weight = trunk.layers[1].self_attn.k_proj.weight
    weight.data = weight.data * 1.5


def one_parameter(trunk: Any) -> None:
    attention = trunk.layers[1].self_attn
    attention.k_proj.weight = nn.Parameter(attention.k_proj.weight.detach() * 1.5)


def every_parameter(trunk: Any) -> None:
    trunk.load_state_dict(build("Llama", seed=1).state_dict(), assign=True)


def precision(trunk: Any) -> None:
    trunk.double()


@pytest.mark.parametrize("change", [one_weights_data, one_parameter, every_parameter, precision])
def test_weights_that_are_replaced_are_those_that_are_read(change: Callable[[Any], None]) -> None:
    reader, call = PrefixReader(build("Llama")), prompts(0, 3)
    trunk = reader._trunk
    reader.read(*call)
    change(trunk)
    for _ in range(2):
        call = then(call)
        expected = read_anew(trunk, *call, candidates_for(call))
        assert_same(reader.read(*call), expected[0])
        assert_same(reader.read(*call, candidates_for(call)), expected[1])
        assert reader._fused is not None
        with torch.no_grad():
            trunk.layers[0].mlp.gate_proj.weight.mul_(1.1)


def test_what_is_put_into_a_trunk_is_read_with_the_next_prefixes() -> None:
    reader, fired = PrefixReader(build("Llama")), []
    reader.read(*prompts(0, 3))
    hook = reader._trunk.layers[0].register_forward_hook(lambda *_: fired.append(True))
    for fused in (False, True):
        reader.release()
        reader.read(*prompts(0, 3))
        assert (reader._fused is not None) == fused
        assert len(fired) == 1
        hook.remove()


def test_threads_that_find_new_weights_at_once_read_these() -> None:
    reader, calls = PrefixReader(build("Llama")), [prompts(0, n % 4, seed=n) for n in range(8)]
    for change in (1.1, 0.9, 1.2):
        with torch.no_grad():
            for weight in reader._trunk.parameters():
                weight.data = weight.data * change
        with ThreadPoolExecutor(max_workers=8) as threads:
            states = list(threads.map(lambda call: reader.read(*call), calls))
        for call, ends in zip(calls, states, strict=True):
            assert_same(ends, read_anew(reader._trunk, *call, candidates_for(call))[0])


def test_a_trunk_that_has_been_read_is_saved_and_trained_like_any_other(tmp_path: Path) -> None:
    trunk, call = build("Qwen2"), prompts(0, 3)
    with torch.inference_mode():
        PrefixReader(trunk).read(*call)
    trunk.save_pretrained(tmp_path)
    stored = transformers.Qwen2Model.from_pretrained(tmp_path)
    for one, other in zip(trunk.parameters(), stored.parameters(), strict=True):
        assert torch.equal(one, other)
    for model in (trunk, stored):
        model(input_ids=call[0]).last_hidden_state.square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1, fused=True).step()  # which walks through memory
    for one, other in zip(trunk.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_under_autocast_a_trunk_is_read_by_its_own_forward_pass() -> None:
    reader, call = PrefixReader(build("Llama")), prompts(0, 3)
    own = PrefixReader(build("Llama"))
    own._may_fuse = False
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reader.read(*call), own.read(*call))
    assert (reader._fused is None, own._fused is None) == (False, True)


def test_where_there_is_no_room_for_a_copy_a_trunk_is_read_by_its_own_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(prefix_reader.FusedTrunk, "__init__", full)
    reader, call = PrefixReader(build("Llama")), prompts(0, 3)
    assert_same(reader.read(*call), read_anew(reader._trunk, *call, candidates_for(call))[0])
    assert reader._fused is None


def test_weights_that_are_written_through_data_are_read_once_nothing_is_kept() -> None:
    reader, call = PrefixReader(build("Llama")), prompts(0, 3)
    reader.read(*call)
    for weight in reader._trunk.parameters():
        weight.data.mul_(1.1)
    reader.release()
    assert_same(reader.read(*call), read_anew(reader._trunk, *call, candidates_for(call))[0])


def test_a_trunk_of_inference_mode_is_read_as_its_weights_are() -> None:
    with torch.inference_mode():
        reader, call = PrefixReader(build("Llama")), prompts(0, 3)
        for seed in (0, 1):
            reader._trunk.load_state_dict(build("Llama", seed=seed).state_dict())
            reader.release()
            assert_same(reader.read(*call), read_anew(reader._trunk, *call, candidates_for(call))[0])
    assert reader._fused is None
