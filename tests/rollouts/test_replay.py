"""One forward pass over a finished response sees what decoding saw step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from mavis.critics import HiddenStateCritic
from mavis.decoding import MavisTilt
from mavis.policies.token_embeddings import token_embeddings
from mavis.rollouts.replay import ReplayedSteps, Sequences, replay

MakeCritic = Callable[..., HiddenStateCritic]

PROMPTS = ["once upon a time", "the dog", "she said", "the little old man ran and ran"] * 2
LAM = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 1.0], [0.5, 0.5]]).repeat_interleave(2, dim=0)
STEPS = 20


@dataclass
class Decoded:
    """A tilted generation and what was seen while it ran."""

    prompts: list[list[int]]
    responses: list[list[int]]
    kl: Tensor
    states: Tensor

    @property
    def sequences(self) -> Sequences:
        return Sequences.pack(self.prompts, self.responses)


@pytest.fixture
def decode(tiny_policy: Any, tiny_tokenizer: Any) -> Callable[..., Decoded]:
    """A function that decodes the prompts, each row under its own λ, and records KL and states at every step."""

    def run(critic: HiddenStateCritic, top_k: int | None, temperature: float) -> Decoded:
        inputs = tiny_tokenizer(PROMPTS, return_tensors="pt", padding=True)
        tilt = MavisTilt(LAM, critic, beta=1.0, top_k=top_k, temperature=temperature, record_kl=True)
        read: list[Tensor] = []
        normed = critic._normed

        def spy(states: Tensor) -> Tensor:
            read.append(states.clone())
            return normed(states)

        critic._normed = spy  # type: ignore[method-assign]
        torch.manual_seed(0)
        with critic.attach(tiny_policy):
            output = tiny_policy.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                top_k=0,
                temperature=temperature,
                max_new_tokens=STEPS,
                logits_processor=tilt,
            )
        del critic._normed
        prompts = [tiny_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        responses = []
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            end = row.index(tiny_tokenizer.eos_token_id) + 1 if tiny_tokenizer.eos_token_id in row else len(row)
            responses.append(row[:end])
        assert len({len(response) for response in responses}) > 1, "the rows should end at different steps"
        return Decoded(prompts, responses, tilt.kl, torch.stack(read, dim=1))

    return run


def reference_logprobs(policy: Any, prompt: list[int], response: list[int], temperature: float) -> Tensor:
    """(T, V) log π_ref at every step of one response, from the policy alone on the unpadded sequence."""
    with torch.no_grad():
        logits = policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double() / temperature, dim=-1)


def replayed(
    policy: Any,
    decoded: Decoded,
    critic: HiddenStateCritic | None,
    top_k: int | None,
    temperature: float,
    table: Tensor,
) -> ReplayedSteps:
    lam = None if critic is None else LAM
    return replay(policy, decoded.sequences, table, critic=critic, lam=lam, top_k=top_k, temperature=temperature)


CASES = pytest.mark.parametrize(("top_k", "temperature"), [(5, 1.0), (None, 1.0), (5, 0.7), (None, 1.6)])


@CASES
def test_kl_and_states_are_those_of_the_run_that_decoded(
    tiny_policy: Any, make_tiny_critic: MakeCritic, decode: Any, top_k: int | None, temperature: float
) -> None:
    critic = make_tiny_critic()
    decoded = decode(critic, top_k, temperature)
    steps = replayed(tiny_policy, decoded, critic, top_k, temperature, token_embeddings(tiny_policy))
    length = steps.kl.shape[1]
    assert length == max(map(len, decoded.responses))
    real = steps.is_response
    torch.testing.assert_close(steps.kl[real], decoded.kl[:, :length][real], atol=1e-5, rtol=0)
    torch.testing.assert_close(steps.states[real], decoded.states[:, :length][real], atol=1e-5, rtol=1e-5)
    assert float(steps.kl[real].max()) > 0.1
    assert not steps.kl[~real].any()


@CASES
@pytest.mark.parametrize("tilted", [True, False])
def test_kl_log_probabilities_and_expectations_are_the_sums_they_stand_for(
    tiny_policy: Any, make_tiny_critic: MakeCritic, decode: Any, top_k: int | None, temperature: float, tilted: bool
) -> None:
    critic = make_tiny_critic()
    decoded = decode(critic, top_k, temperature)
    table = torch.randn(61, 3, generator=torch.Generator().manual_seed(1))
    steps = replayed(tiny_policy, decoded, critic if tilted else None, top_k, temperature, table)
    for row, (prompt, response) in enumerate(zip(decoded.prompts, decoded.responses, strict=True)):
        reference = reference_logprobs(tiny_policy, prompt, response, temperature)
        length = len(response)
        taken = reference[torch.arange(length), torch.tensor(response)]
        torch.testing.assert_close(steps.reference_logprobs[row, :length].double(), taken, atol=1e-5, rtol=0)
        assert not steps.reference_logprobs[row, length:].any()
        assert steps.action_ids[row, :length].tolist() == response
        assert steps.is_response[row].tolist() == [True] * length + [False] * (len(steps.is_response[row]) - length)

        for step in range(length):
            kept = reference[step].topk(top_k or 61).indices
            tilt = torch.zeros(len(kept), dtype=torch.float64)
            if tilted:
                values = critic.values_from_inputs(
                    critic.response_inputs(steps.states[row][None, step : step + 1])[:, 0], kept[None]
                )[0].detach()
                tilt = (values.double() * LAM[row].double()).sum(-1)
            unnormalised = (reference[step, kept] + tilt).exp()
            probs = unnormalised / unnormalised.sum()
            kl = float((probs * (probs.log() - reference[step, kept])).sum())
            assert float(steps.kl[row, step]) == pytest.approx(kl, abs=1e-5)
            expected = (probs[:, None] * table[kept].double()).sum(0)
            torch.testing.assert_close(steps.expected[row, step].double(), expected, atol=1e-5, rtol=0)


def test_cutting_the_reference_policy_costs_the_mass_it_leaves_out(
    tiny_policy: Any, make_tiny_critic: MakeCritic, decode: Any
) -> None:
    decoded = decode(make_tiny_critic(), 5, 1.3)
    steps = replayed(tiny_policy, decoded, None, 5, 1.3, torch.zeros(61, 1))
    for row, (prompt, response) in enumerate(zip(decoded.prompts, decoded.responses, strict=True)):
        mass = reference_logprobs(tiny_policy, prompt, response, 1.3).exp().topk(5).values.sum(-1)
        torch.testing.assert_close(steps.kl[row, : len(response)].double(), -mass.log(), atol=1e-5, rtol=0)


def test_the_whole_reference_policy_costs_nothing(tiny_policy: Any, make_tiny_critic: MakeCritic, decode: Any) -> None:
    steps = replayed(tiny_policy, decode(make_tiny_critic(), None, 1.0), None, None, 1.0, torch.zeros(61, 1))
    assert float(steps.kl.abs().max()) < 1e-6


def test_a_row_is_the_same_alone_and_among_others_of_other_lengths(
    tiny_policy: Any, make_tiny_critic: MakeCritic, decode: Any
) -> None:
    critic = make_tiny_critic()
    decoded = decode(critic, 5, 1.0)
    table = token_embeddings(tiny_policy)
    together = replayed(tiny_policy, decoded, critic, 5, 1.0, table)
    for row, (prompt, response) in enumerate(zip(decoded.prompts, decoded.responses, strict=True)):
        pair = Sequences.pack([prompt], [response])
        alone = replay(tiny_policy, pair, table, critic=critic, lam=LAM[row : row + 1], top_k=5)
        for name, tensor in vars(alone).items():
            among = getattr(together, name)[row : row + 1, : len(response)]
            torch.testing.assert_close(among, tensor, atol=1e-5, rtol=1e-5)


def test_positions_are_counted_as_in_decoding_where_they_are_absolute(tiny_tokenizer: Any) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 40, "initializer_range": 0.5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = GPT2LMHeadModel(GPT2Config(vocab_size=61, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes))
    policy.eval().requires_grad_(False)
    critic = HiddenStateCritic.for_policy(policy, ["a", "b"], hidden=8, rank=4)
    with torch.no_grad():
        critic.heads.bias.normal_(generator=torch.Generator().manual_seed(0))
    inputs = tiny_tokenizer(PROMPTS, return_tensors="pt", padding=True)
    tilt = MavisTilt(LAM, critic, beta=1.0, top_k=5, record_kl=True)
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": 6, "logits_processor": tilt}
    torch.manual_seed(0)
    with critic.attach(policy):
        output = policy.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
    before = inputs["input_ids"].shape[1]
    responses = [[*row, 2][: [*row, 2].index(2) + 1][:6] for row in output[:, before:].tolist()]
    sequences = Sequences.pack([tiny_tokenizer(prompt)["input_ids"] for prompt in PROMPTS], responses)
    steps = replay(policy, sequences, torch.zeros(61, 1), critic=critic, lam=LAM, top_k=5)
    real = steps.is_response
    torch.testing.assert_close(steps.kl[real], tilt.kl[:, : real.shape[1]][real], atol=1e-5, rtol=0)


def test_packing_pads_prompts_on_the_left_and_responses_on_the_right() -> None:
    packed = Sequences.pack([[5, 6, 7], [8]], [[9], [10, 11]])
    assert packed.ids.tolist() == [[5, 6, 7, 9, 0], [0, 0, 8, 10, 11]]
    assert packed.is_token.tolist() == [[True, True, True, True, False], [False, False, True, True, True]]
    assert packed.is_response.tolist() == [[True, False], [True, True]]


def test_a_response_may_be_empty() -> None:
    packed = Sequences.pack([[5, 6]], [[]])
    assert packed.ids.tolist() == [[5, 6, 0]]
    assert packed.is_response.tolist() == [[False]]


def test_replaying_leaves_no_hook_and_keeps_its_inputs(
    tiny_policy: Any, make_tiny_critic: MakeCritic, decode: Any
) -> None:
    decoded = decode(make_tiny_critic(), 5, 1.0)
    sequences, table = decoded.sequences, torch.ones(61, 2)
    before = sequences.ids.clone()
    replay(tiny_policy, sequences, table, top_k=5)
    assert torch.equal(sequences.ids, before)
    assert torch.equal(table, torch.ones(61, 2))
    assert not tiny_policy.lm_head._forward_pre_hooks
