"""A batch of mixed requests is tilted as each request alone, however rows join, leave, wait and move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mavis.errors import CriticError, DecodingError
from mavis.math.tilt import tilted_logprobs, top_candidates
from mavis.vllm.batch import TiltedBatch, TiltedRow
from mavis.vllm.recurrent_memory import PreemptedMemories
from mavis.vllm.request_arguments import Tilt
from tests.critics.trunk.test_reader import FAMILIES

VOCABULARY, HIDDEN = 61, 32


def expected(critic: Any, logits: Tensor, inputs: Tensor, tilt: Tilt) -> Tensor:
    """Compute one row as `MavisTilt` does: log π over the candidates, −inf elsewhere (V,)."""
    values, ids = top_candidates(logits[None], tilt.top_k) if tilt.top_k else (logits[None], None)
    logprobs = tilted_logprobs(values, critic.tilt_from_inputs(inputs[None], ids, tilt.lam[None]), tilt.temperature)
    return torch.full_like(logits, -torch.inf).scatter_(0, ids[0], logprobs[0]) if ids is not None else logprobs[0]


def close(found: Tensor, wanted: Tensor) -> None:
    """Assert equality to 1e-5, with −inf at the same tokens."""
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
    monkeypatch.setattr(
        "mavis.vllm.batch._MAX_GATHERED", 20
    )  # so that one batch has few, many and all tokens as candidates
    critic = make_critic(tiny_policy, composition=composition, memory=memory)

    @settings(max_examples=40)
    @given(rows=st.lists(tilts, min_size=1, max_size=9), seed=st.integers(0, 99))
    def check(rows: list[Tilt | None], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(len(rows), VOCABULARY, generator=generator) * 3
        logits[:, 7] = -torch.inf  # banned before the tilt
        states = torch.randn(len(rows), HIDDEN, generator=generator)
        batch = TiltedBatch(critic)
        added = [(at, TiltedRow(tilt, [], PreemptedMemories()) if tilt else None) for at, tilt in enumerate(rows)]
        batch.advance()
        batch.update(len(rows), [], added, [])
        tilted = batch.apply(logits.clone(), states)
        inputs = critic.response_inputs(states[:, None])[:, 0]
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
    batch.update(1, [], [(0, TiltedRow(Tilt(torch.ones(2), 5, 1.0), [], PreemptedMemories()))], [])
    logits, states = torch.randn(1, VOCABULARY), torch.randn(1, HIDDEN)
    before = states.clone()
    assert batch.apply(logits, states) is logits
    assert torch.equal(states, before)
    assert int(logits.isfinite().sum()) == 5


def test_states_in_half_precision_are_read_without_loss(tiny_policy: Any, make_critic: Callable[..., Any]) -> None:
    critic = make_critic(tiny_policy, memory=4)
    logits, states = torch.randn(2, VOCABULARY), torch.randn(2, HIDDEN).bfloat16()
    found = []
    for read in (states, states.float()):
        batch = TiltedBatch(critic)
        rows = [
            (at, TiltedRow(Tilt(torch.ones(2), top_k, 1.0), [], PreemptedMemories()))
            for at, top_k in enumerate((5, None))
        ]
        batch.update(2, [], rows, [])
        found.append(batch.apply(logits.clone(), read))
    assert found[0].dtype == torch.float32
    assert torch.equal(*found)


def test_many_candidates_of_one_row_are_not_gathered_for_the_others(
    tiny_policy: Any, make_critic: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A (B, K, r) tensor with K near V is gigabytes on a real vocabulary: one request could end the engine."""
    monkeypatch.setattr("mavis.vllm.batch._MAX_GATHERED", 20)
    critic, calls = make_critic(tiny_policy), []
    tilt_from_inputs = critic.tilt_from_inputs

    def spy(inputs: Tensor, ids: Tensor | None, lam: Tensor) -> Tensor:
        calls.append((len(inputs), None if ids is None else ids.shape[1]))
        return tilt_from_inputs(inputs, ids, lam)

    monkeypatch.setattr(critic, "tilt_from_inputs", spy)
    batch = TiltedBatch(critic)
    rows = [
        (at, TiltedRow(Tilt(torch.ones(2), top_k, 1.0), [], PreemptedMemories()))
        for at, top_k in enumerate((5, VOCABULARY - 1, 8))
    ]
    batch.update(3, [], rows, [])
    tilted = batch.apply(torch.randn(3, VOCABULARY), torch.randn(3, HIDDEN))
    assert calls == [(2, 8), (1, None)]
    assert tilted.isfinite().sum(dim=1).tolist() == [5, VOCABULARY - 1, 8]


def test_the_first_tilted_row_can_join_while_plain_rows_leave(
    tiny_policy: Any, make_critic: Callable[..., Any]
) -> None:
    batch = TiltedBatch(make_critic(tiny_policy))
    batch.update(5, [], [(at, None) for at in range(5)], [])
    batch.update(4, [4], [(2, TiltedRow(Tilt(torch.ones(2), 5, 1.0), [], PreemptedMemories()))], [])
    tilted = batch.apply(torch.randn(4, VOCABULARY), torch.randn(4, HIDDEN))
    assert tilted.isfinite().sum(dim=1).tolist() == [VOCABULARY, VOCABULARY, 5, VOCABULARY]


def test_a_batch_without_tilts_is_unchanged(tiny_policy: Any, make_critic: Callable[..., Any]) -> None:
    batch = TiltedBatch(make_critic(tiny_policy))
    batch.update(2, [], [(0, None), (1, None)], [])
    logits = torch.randn(2, VOCABULARY)
    before = logits.clone()
    assert not batch.any_tilted
    assert torch.equal(batch.apply(logits, torch.randn(2, HIDDEN)), before)


def test_a_request_that_returns_without_a_memory_is_an_error(tiny_policy: Any, make_critic: Callable[..., Any]) -> None:
    batch = TiltedBatch(make_critic(tiny_policy, memory=4))
    stranger = TiltedRow(Tilt(torch.ones(2), 5, 1.0), [3, 4], PreemptedMemories())
    with pytest.raises(DecodingError, match="joins the batch with 2 output tokens, but its memory has read 0"):
        batch.update(1, [], [(0, stranger)], [])


@dataclass
class Request:
    """One request: the states that its response is drawn from, and the tokens drawn so far."""

    tilt: Tilt | None
    states: Tensor
    preempted: PreemptedMemories
    prompt: list[int]
    drawn: list[int] = field(default_factory=list)
    prefill_steps: int = 0

    @property
    def row(self) -> TiltedRow | None:
        return TiltedRow(self.tilt, self.drawn, self.preempted, self.prompt) if self.tilt else None


def simulate(critic: Any, seed: int, check: Callable[[Request, Tensor, Tensor], None]) -> tuple[int, int]:
    """Simulate an engine: requests join, are preempted, wait, prefill in chunks and end, and the batch closes its gaps.

    Updates are reported as by vLLM: a row that is refilled at once is not listed among the removed ones.

    Returns:
        How often a request returned, and how often a token was discarded.
    """
    dice, generator = Random(seed), torch.Generator().manual_seed(seed)
    lam = [[1.0, 0.5], [-1.0, 2.0], [0.3, 0.0]]
    shared = PreemptedMemories()

    def new(number: int) -> Request:
        tilted = bool(number % 4) == bool(seed % 2)  # some batches are mostly tilted, others mostly or wholly plain
        tilt = Tilt(torch.tensor(lam[number % 3]), [None, 5, 9][number % 3], 1.0) if tilted else None
        steps = dice.randint(1, 8)
        preempted = shared if number % 5 == 0 else PreemptedMemories()  # as children of one request (n > 1) do
        prompt = [dice.randrange(1, VOCABULARY) for _ in range(dice.randint(1, 12))]
        return Request(
            tilt, torch.randn(steps, HIDDEN, generator=generator), preempted, prompt, prefill_steps=dice.randint(0, 2)
        )

    waiting = [new(number) for number in range(24)]
    slots: list[Request | None] = []
    batch, returned, discarded = TiltedBatch(critic, capacity=(5, 20)), 0, 0
    while waiting or any(slots):
        batch.advance()
        left, added, moved = [], [], []
        for at, one in enumerate(slots):
            if one and (len(one.drawn) == len(one.states) or dice.random() < 0.15):
                slots[at] = None
                left.append(at)
                if len(one.drawn) < len(one.states):  # preempted: it will recompute what it had read
                    one.prefill_steps = dice.randint(0, 2)
                    waiting.insert(dice.randint(0, len(waiting)), one)
        removed = sorted(left)
        while waiting and sum(one is not None for one in slots) < 5 and dice.random() < 0.8:
            one = waiting.pop(0)
            returned += bool(one.drawn)
            at = removed.pop(0) if removed else len(slots)
            slots[at : at + 1] = [one]
            added.append((at, one.row))
        while removed and removed[0] < len(slots) - 1:
            if slots[-1] is None:
                removed.remove(len(slots) - 1)
                slots.pop()
                continue
            at = removed.pop(0)
            moved.append((len(slots) - 1, at, False))
            slots[at] = slots.pop()
        slots = [one for one in slots if one is not None]
        if len(slots) > 1 and dice.random() < 0.3:
            one, two = dice.sample(range(len(slots)), 2)
            moved.append((one, two, True))
            slots[one], slots[two] = slots[two], slots[one]
        if left or added or moved:
            batch.update(len(slots), [at for at in left if at >= len(slots)], added, moved)
        if not slots:
            continue
        running = [one for one in slots if one is not None]
        noise = torch.randn(len(running), HIDDEN, generator=generator)
        states = torch.stack(
            [z if one.prefill_steps else one.states[len(one.drawn)] for one, z in zip(running, noise, strict=True)]
        )
        logits = torch.randn(len(running), VOCABULARY, generator=generator)
        tilted = batch.apply(logits.clone(), states)
        for at, one in enumerate(running):
            if one.prefill_steps:  # it is prefilling, so the engine discards its token
                one.prefill_steps -= 1
                discarded += 1
            else:
                check(one, logits[at], tilted[at])
                one.drawn.append(dice.randrange(1, VOCABULARY))
    assert batch.size == 0
    assert batch.tilted == []
    return returned, discarded


@pytest.mark.parametrize("memory", [0, 4])
@pytest.mark.parametrize("seed", range(8))
def test_rows_keep_their_tilt_and_memory_through_every_move(
    tiny_policy: Any, make_critic: Callable[..., Any], seed: int, memory: int
) -> None:
    critic = make_critic(tiny_policy, memory=memory)

    def check(one: Request, logits: Tensor, tilted: Tensor) -> None:
        if one.tilt is None:
            assert torch.equal(tilted, logits)
            return
        step = len(one.drawn)
        inputs = critic.response_inputs(one.states[None, : step + 1])[0, -1]
        close(torch.log_softmax(tilted, 0), expected(critic, logits, inputs, one.tilt))

    returned, discarded = simulate(critic, seed, check)
    assert returned > 0
    assert discarded > 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_value_model_reads_every_prefix_as_if_alone(
    tiny_policy: Any, make_critic: Callable[..., Any], family: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seed:  # prompts are prefilled in many chunks, few at a time
        monkeypatch.setattr("mavis.vllm.value_model_runner._MAX_CHUNK", 4)
        monkeypatch.setattr("mavis.vllm.value_model_runner._MAX_PREFILL_TOKENS", 8)
        monkeypatch.setattr("mavis.vllm.value_model_runner._MAX_SCORES", 40)
    if seed == 2:  # rows of different lengths are read separately
        monkeypatch.setattr("mavis.vllm.value_model_runner._MAX_LENGTH_RATIO", 1)
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
        inputs = critic.rollout_inputs(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, 1, 0))[0, 0]
        torch.testing.assert_close(
            torch.log_softmax(tilted, 0), expected(critic, logits, inputs, one.tilt), atol=1e-4, rtol=1e-4
        )
        checked += len(one.drawn) > 0

    returned, discarded = simulate(critic, seed, check)
    assert min(returned, discarded, checked) > 0


def test_a_value_model_reads_more_requests_than_each_has_tokens(
    tiny_policy: Any, make_critic: Callable[..., Any]
) -> None:
    critic = make_critic(tiny_policy, backbone=FAMILIES["Llama"]().config)
    batch, tilt = TiltedBatch(critic, capacity=(9, 3)), Tilt(torch.ones(2), 5, 1.0)
    rows = [(at, TiltedRow(tilt, [], PreemptedMemories(), [3 + at, 7])) for at in range(9)]
    batch.update(9, [], rows, [])
    logits, states = torch.randn(9, VOCABULARY), torch.randn(9, HIDDEN)
    batched = batch.apply(logits.clone(), states)
    for at, (_, row) in enumerate(rows):
        alone = TiltedBatch(critic, capacity=(1, 3))
        alone.update(1, [], [(0, row)], [])
        close(alone.apply(logits[at : at + 1].clone(), states[at : at + 1])[0], batched[at])


def test_a_value_model_with_fewer_positions_than_the_engine_takes_is_refused(
    tiny_policy: Any, make_critic: Callable[..., Any]
) -> None:
    critic = make_critic(tiny_policy, backbone=FAMILIES["GPT-2"]().config)
    TiltedBatch(critic, capacity=(2, 200))
    with pytest.raises(CriticError, match="up to 201 tokens, but .* has learnt 200 positions.*--max-model-len 200"):
        TiltedBatch(critic, capacity=(2, 201))


def test_a_value_model_without_memory_for_its_requests_is_refused(
    tiny_policy: Any, make_critic: Callable[..., Any]
) -> None:
    critic = make_critic(tiny_policy, backbone=FAMILIES["Llama"]().config)
    with pytest.raises(
        CriticError,
        match="keys and values for 1000000 requests of up to 1000000 tokens .* GiB.*max_num_seqs",
    ):
        TiltedBatch(critic, capacity=(10**6, 10**6))


def test_a_saved_memory_is_freed_with_its_request(tiny_policy: Any, make_critic: Callable[..., Any]) -> None:
    import weakref

    batch = TiltedBatch(make_critic(tiny_policy, memory=4))
    drawn: list[int] = []
    preempted = PreemptedMemories()
    reference = weakref.ref(preempted)
    batch.update(1, [], [(0, TiltedRow(Tilt(torch.ones(2), 5, 1.0), drawn, preempted))], [])
    batch.apply(torch.randn(1, VOCABULARY), torch.randn(1, HIDDEN))
    drawn.append(1)
    batch.advance()
    batch.update(0, [0], [], [])
    del preempted
    assert reference() is None
