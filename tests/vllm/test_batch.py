"""A batch of mixed requests is tilted as each alone, however rows come, go, wait and change places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.critics.test_prefix_reader import FAMILIES
from torch import Tensor

from mavis.errors import CriticError, DecodingError
from mavis.math.tilt import tilted_logprobs, top_candidates
from mavis.vllm.batch import Row, TiltedBatch
from mavis.vllm.recurrent_rows import Parked
from mavis.vllm.request_arguments import Tilt

VOCABULARY, HIDDEN = 61, 32


def expected(critic: Any, logits: Tensor, inputs: Tensor, tilt: Tilt) -> Tensor:
    """One row as `MavisTilt` makes it: log π over the candidates, −inf elsewhere (V,)."""
    values, ids = top_candidates(logits[None], tilt.top_k) if tilt.top_k else (logits[None], None)
    logprobs = tilted_logprobs(values, critic.tilt_of_inputs(inputs[None], ids, tilt.lam[None]), tilt.temperature)
    return torch.full_like(logits, -torch.inf).scatter_(0, ids[0], logprobs[0]) if ids is not None else logprobs[0]


def close(found: Tensor, wanted: Tensor) -> None:
    """Equal to 1e-5, and −inf at the same places."""
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


tilts = st.one_of(
    st.none(),
    st.builds(
        lambda lam, top_k, temperature: Tilt(torch.tensor(lam), top_k, temperature),
        st.sampled_from([[1.0, 0.0], [0.5, -2.0], [3.0, 3.0]]),
        st.sampled_from([None, 1, 5, 40, VOCABULARY]),
        st.sampled_from([1.0, 0.5, 2.0]),
    ),
)


@pytest.mark.parametrize("composition", ["independent", "conditioned"])
@pytest.mark.parametrize("memory", [0, 4])
def test_every_row_has_its_own_weights_candidates_and_temperature(
    tiny_policy: Any,
    make_critic: Callable[..., Any],
    composition: str,
    memory: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mavis.vllm.batch._NARROW", 20)  # so that few, many and all tokens meet in one batch
    critic = make_critic(tiny_policy, composition=composition, memory=memory)

    @settings(max_examples=40)
    @given(rows=st.lists(tilts, min_size=1, max_size=9), seed=st.integers(0, 99))
    def check(rows: list[Tilt | None], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(len(rows), VOCABULARY, generator=generator) * 3
        logits[:, 7] = -torch.inf  # a ban that arrives
        states = torch.randn(len(rows), HIDDEN, generator=generator)
        batch = TiltedBatch(critic)
        added = [(at, Row(tilt, [], Parked()) if tilt else None) for at, tilt in enumerate(rows)]
        batch.step()
        batch.change(len(rows), [], added, [])
        tilted = batch.apply(logits.clone(), states)
        inputs = critic.inputs_of_responses(states[:, None])[:, 0]
        for at, tilt in enumerate(rows):
            if tilt is None:
                assert torch.equal(tilted[at], logits[at])
            else:
                found = torch.log_softmax(tilted[at] / tilt.temperature, 0)
                close(found, expected(critic, logits[at], inputs[at], tilt))
                assert found[7] == -torch.inf

    check()


def test_logits_are_written_in_place_and_states_are_not(tiny_policy: Any, make_critic: Callable[..., Any]) -> None:
    batch = TiltedBatch(make_critic(tiny_policy, memory=4))
    batch.change(1, [], [(0, Row(Tilt(torch.ones(2), 5, 1.0), [], Parked()))], [])
    logits, states = torch.randn(1, VOCABULARY), torch.randn(1, HIDDEN)
    before = states.clone()
    assert batch.apply(logits, states) is logits
    assert torch.equal(states, before)
    assert int(logits.isfinite().sum()) == 5


def test_states_in_half_precision_are_read_as_what_they_are(tiny_policy: Any, make_critic: Callable[..., Any]) -> None:
    critic = make_critic(tiny_policy, memory=4)
    logits, states = torch.randn(2, VOCABULARY), torch.randn(2, HIDDEN).bfloat16()
    found = []
    for read in (states, states.float()):
        batch = TiltedBatch(critic)
        rows = [(at, Row(Tilt(torch.ones(2), top_k, 1.0), [], Parked())) for at, top_k in enumerate((5, None))]
        batch.change(2, [], rows, [])
        found.append(batch.apply(logits.clone(), read))
    assert found[0].dtype == torch.float32
    assert torch.equal(*found)


def test_many_candidates_of_one_row_are_not_gathered_for_the_others(
    tiny_policy: Any, make_critic: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A (B, K, r) tensor with K near V is gigabytes on a real vocabulary: one request could end the engine."""
    monkeypatch.setattr("mavis.vllm.batch._NARROW", 20)
    critic, asked = make_critic(tiny_policy), []
    tilt_of_inputs = critic.tilt_of_inputs

    def spy(inputs: Tensor, ids: Tensor | None, lam: Tensor) -> Tensor:
        asked.append((len(inputs), None if ids is None else ids.shape[1]))
        return tilt_of_inputs(inputs, ids, lam)

    monkeypatch.setattr(critic, "tilt_of_inputs", spy)
    batch = TiltedBatch(critic)
    rows = [(at, Row(Tilt(torch.ones(2), top_k, 1.0), [], Parked())) for at, top_k in enumerate((5, VOCABULARY - 1, 8))]
    batch.change(3, [], rows, [])
    tilted = batch.apply(torch.randn(3, VOCABULARY), torch.randn(3, HIDDEN))
    assert asked == [(2, 8), (1, None)]
    assert tilted.isfinite().sum(dim=1).tolist() == [5, VOCABULARY - 1, 8]


def test_the_first_tilt_can_come_as_plain_rows_leave(tiny_policy: Any, make_critic: Callable[..., Any]) -> None:
    batch = TiltedBatch(make_critic(tiny_policy))
    batch.change(5, [], [(at, None) for at in range(5)], [])
    batch.change(4, [4], [(2, Row(Tilt(torch.ones(2), 5, 1.0), [], Parked()))], [])
    tilted = batch.apply(torch.randn(4, VOCABULARY), torch.randn(4, HIDDEN))
    assert tilted.isfinite().sum(dim=1).tolist() == [VOCABULARY, VOCABULARY, 5, VOCABULARY]


def test_a_batch_without_tilts_is_left_alone(tiny_policy: Any, make_critic: Callable[..., Any]) -> None:
    batch = TiltedBatch(make_critic(tiny_policy))
    batch.change(2, [], [(0, None), (1, None)], [])
    logits = torch.randn(2, VOCABULARY)
    before = logits.clone()
    assert not batch.any_tilted
    assert torch.equal(batch.apply(logits, torch.randn(2, HIDDEN)), before)


def test_who_comes_back_without_a_memory_is_an_error(tiny_policy: Any, make_critic: Callable[..., Any]) -> None:
    batch = TiltedBatch(make_critic(tiny_policy, memory=4))
    stranger = Row(Tilt(torch.ones(2), 5, 1.0), [3, 4], Parked())
    with pytest.raises(DecodingError, match="joins the batch with 2 tokens drawn, but its memory has read 0"):
        batch.change(1, [], [(0, stranger)], [])


@dataclass
class Request:
    """One response: the states it will be drawn from, and what it has drawn."""

    tilt: Tilt | None
    states: Tensor
    parked: Parked
    prompt: list[int]
    drawn: list[int] = field(default_factory=list)
    unread: int = 0

    @property
    def row(self) -> Row | None:
        return Row(self.tilt, self.drawn, self.parked, self.prompt) if self.tilt else None


def play(critic: Any, seed: int, check: Callable[[Request, Tensor, Tensor], None]) -> tuple[int, int]:
    """Play an engine: requests join, are preempted, wait, read again in chunks, end, and the batch closes its gaps.

    Updates are told as vLLM tells them: a place that is filled again at once is not named among those that were left.

    Returns:
        How often a request came back, and how often a token was not kept.
    """
    dice, generator = Random(seed), torch.Generator().manual_seed(seed)
    lam = [[1.0, 0.5], [-1.0, 2.0], [0.3, 0.0]]
    shared = Parked()

    def new(number: int) -> Request:
        tilted = bool(number % 4) == bool(seed % 2)  # few are plain, or few are tilted and the batch is often plain
        tilt = Tilt(torch.tensor(lam[number % 3]), [None, 5, 9][number % 3], 1.0) if tilted else None
        steps = dice.randint(1, 8)
        parked = shared if number % 5 == 0 else Parked()  # children of one request can share their parameters
        prompt = [dice.randrange(1, VOCABULARY) for _ in range(dice.randint(1, 12))]
        return Request(tilt, torch.randn(steps, HIDDEN, generator=generator), parked, prompt, unread=dice.randint(0, 2))

    waiting = [new(number) for number in range(24)]
    places: list[Request | None] = []
    batch, back, dropped = TiltedBatch(critic, room=(5, 20)), 0, 0
    while waiting or any(places):
        batch.step()
        left, added, moved = [], [], []
        for at, one in enumerate(places):
            if one and (len(one.drawn) == len(one.states) or dice.random() < 0.15):
                places[at] = None
                left.append(at)
                if len(one.drawn) < len(one.states):  # preempted: it will read again what it had read
                    one.unread = dice.randint(0, 2)
                    waiting.insert(dice.randint(0, len(waiting)), one)
        removed = sorted(left)
        while waiting and sum(one is not None for one in places) < 5 and dice.random() < 0.8:
            one = waiting.pop(0)
            back += bool(one.drawn)
            at = removed.pop(0) if removed else len(places)
            places[at : at + 1] = [one]
            added.append((at, one.row))
        while removed and removed[0] < len(places) - 1:
            if places[-1] is None:
                removed.remove(len(places) - 1)
                places.pop()
                continue
            at = removed.pop(0)
            moved.append((len(places) - 1, at, False))
            places[at] = places.pop()
        places = [one for one in places if one is not None]
        if len(places) > 1 and dice.random() < 0.3:
            one, two = dice.sample(range(len(places)), 2)
            moved.append((one, two, True))
            places[one], places[two] = places[two], places[one]
        if left or added or moved:
            batch.change(len(places), [at for at in left if at >= len(places)], added, moved)
        if not places:
            continue
        running = [one for one in places if one is not None]
        noise = torch.randn(len(running), HIDDEN, generator=generator)
        states = torch.stack(
            [z if one.unread else one.states[len(one.drawn)] for one, z in zip(running, noise, strict=True)]
        )
        logits = torch.randn(len(running), VOCABULARY, generator=generator)
        tilted = batch.apply(logits.clone(), states)
        for at, one in enumerate(running):
            if one.unread:  # it has read a part of what it must, and the engine throws its token away
                one.unread -= 1
                dropped += 1
            else:
                check(one, logits[at], tilted[at])
                one.drawn.append(dice.randrange(1, VOCABULARY))
    assert batch.size == 0
    assert batch.tilted == []
    return back, dropped


@pytest.mark.parametrize("memory", [0, 4])
@pytest.mark.parametrize("seed", range(8))
def test_rows_keep_their_tilt_and_memory_wherever_they_go(
    tiny_policy: Any, make_critic: Callable[..., Any], seed: int, memory: int
) -> None:
    critic = make_critic(tiny_policy, memory=memory)

    def check(one: Request, logits: Tensor, tilted: Tensor) -> None:
        if one.tilt is None:
            assert torch.equal(tilted, logits)
            return
        step = len(one.drawn)
        inputs = critic.inputs_of_responses(one.states[None, : step + 1])[0, -1]
        close(torch.log_softmax(tilted, 0), expected(critic, logits, inputs, one.tilt))

    back, dropped = play(critic, seed, check)
    assert back > 0
    assert dropped > 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_value_model_reads_every_prefix_as_if_it_were_alone(
    tiny_policy: Any, make_critic: Callable[..., Any], family: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seed:  # prompts are read in many pieces, and few at a time
        monkeypatch.setattr("mavis.vllm.paged_prefixes._POSITIONS_AT_ONCE", 4)
        monkeypatch.setattr("mavis.vllm.paged_prefixes._TOKENS_AT_ONCE", 8)
        monkeypatch.setattr("mavis.vllm.paged_prefixes._SCORES_AT_ONCE", 40)
    if seed == 2:  # rows of other lengths are read by themselves
        monkeypatch.setattr("mavis.vllm.paged_prefixes._ALIKE", 1)
    trunk = FAMILIES[family]()
    critic = make_critic(tiny_policy, backbone=trunk.config)
    critic.trunk.load_state_dict(trunk.state_dict())
    checked = 0

    def check(one: Request, logits: Tensor, tilted: Tensor) -> None:
        nonlocal checked
        if one.tilt is None:
            assert torch.equal(tilted, logits)
            return
        ids = torch.tensor([[*one.prompt, *one.drawn, 0]])
        inputs = critic.inputs_of_rollouts(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, 1, 0))[0, 0]
        torch.testing.assert_close(
            torch.log_softmax(tilted, 0), expected(critic, logits, inputs, one.tilt), atol=1e-4, rtol=1e-4
        )
        checked += len(one.drawn) > 0

    back, dropped = play(critic, seed, check)
    assert min(back, dropped, checked) > 0


def test_a_value_model_reads_more_requests_than_each_has_tokens(
    tiny_policy: Any, make_critic: Callable[..., Any]
) -> None:
    critic = make_critic(tiny_policy, backbone=FAMILIES["Llama"]().config)
    batch, tilt = TiltedBatch(critic, room=(9, 3)), Tilt(torch.ones(2), 5, 1.0)
    rows = [(at, Row(tilt, [], Parked(), [3 + at, 7])) for at in range(9)]
    batch.change(9, [], rows, [])
    logits, states = torch.randn(9, VOCABULARY), torch.randn(9, HIDDEN)
    together = batch.apply(logits.clone(), states)
    for at, (_, row) in enumerate(rows):
        alone = TiltedBatch(critic, room=(1, 3))
        alone.change(1, [], [(0, row)], [])
        close(alone.apply(logits[at : at + 1].clone(), states[at : at + 1])[0], together[at])


def test_a_value_model_with_fewer_positions_than_the_engine_takes_is_refused(
    tiny_policy: Any, make_critic: Callable[..., Any]
) -> None:
    critic = make_critic(tiny_policy, backbone=FAMILIES["GPT-2"]().config)
    TiltedBatch(critic, room=(2, 200))
    with pytest.raises(CriticError, match="up to 201 tokens, but .* has learnt 200 positions.*--max-model-len 200"):
        TiltedBatch(critic, room=(2, 201))


def test_a_value_model_without_memory_for_its_requests_is_refused(
    tiny_policy: Any, make_critic: Callable[..., Any]
) -> None:
    critic = make_critic(tiny_policy, backbone=FAMILIES["Llama"]().config)
    with pytest.raises(
        CriticError, match="no memory for .* GiB.* 1000000000 requests of up to 100000 tokens.*max_num_seqs"
    ):
        TiltedBatch(critic, room=(10**9, 10**5))


def test_what_is_set_aside_ends_with_the_request(tiny_policy: Any, make_critic: Callable[..., Any]) -> None:
    import weakref

    batch = TiltedBatch(make_critic(tiny_policy, memory=4))
    drawn: list[int] = []
    parked = Parked()
    gone = weakref.ref(parked)
    batch.change(1, [], [(0, Row(Tilt(torch.ones(2), 5, 1.0), drawn, parked))], [])
    batch.apply(torch.randn(1, VOCABULARY), torch.randn(1, HIDDEN))
    drawn.append(1)
    batch.step()
    batch.change(0, [0], [], [])
    del parked
    assert gone() is None
