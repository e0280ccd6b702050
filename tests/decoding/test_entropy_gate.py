"""The entropy gate: steps at which the policy is sure are left as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import mavis
from mavis import MavisTilt
from mavis.critics.trunk.reader import PrefixReader
from mavis.errors import DecodingError

MakeCritic = Callable[..., Any]
ByHand = Callable[..., torch.Tensor]
Inputs = dict[str, torch.Tensor]
LAM = [1.5, 0.6]
KINDS = {
    "plain": {},
    "memory": {"memory": 8},
    "token": {"readout": "token"},
    "candidates": {"readout": "candidates"},
}


def generate(policy: Any, inputs: Inputs, tilt: MavisTilt, steps: int = 8) -> tuple[Any, list[torch.Tensor]]:
    """The output, and the scores after the tilt."""
    seen: list[torch.Tensor] = []

    def keep(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores)
        return scores

    torch.manual_seed(0)
    out = policy.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        max_new_tokens=steps,
        logits_processor=[tilt, keep],
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out, seen


def entropies(out: Any) -> torch.Tensor:
    """(steps, B) in nats."""
    return torch.stack([torch.distributions.Categorical(logits=logits).entropy() for logits in out.logits])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("together", [True, False], ids=["batch", "one prompt"])
def test_sure_steps_pass_untouched_and_the_others_are_tilted_as_ever(
    policy: Any,
    make_critic: MakeCritic,
    tilted_by_hand: ByHand,
    prompts: Inputs,
    kind: dict[str, Any],
    together: bool,
) -> None:
    """With one prompt whole steps are left out, after which the critic catches up."""
    inputs = prompts if together else {name: tensor[1:2] for name, tensor in prompts.items()}
    critic = make_critic(policy, **kind)
    with critic.attach(policy):
        out, _ = generate(policy, inputs, MavisTilt([1.0, 0.4], critic, beta=1.5, top_k=7, entropy_gate=0.0))
        gate = float(entropies(out).median()) + 1e-4  # no step is exactly there
        tilt = MavisTilt([1.0, 0.4], critic, beta=1.5, top_k=7, entropy_gate=gate, record_kl=True)
        out, seen = generate(policy, inputs, tilt)
    found = entropies(out)
    sure = found < gate
    assert bool(sure.any())
    assert not bool(sure.all())
    prompt = inputs["input_ids"].shape[1]
    for step, (logits, scores) in enumerate(zip(out.logits, seen, strict=True)):
        ids = out.sequences[:, : prompt + step]
        for row, asked in enumerate(inputs["attention_mask"]):
            if sure[step, row]:
                assert torch.equal(scores[row], logits[row])
                assert float(tilt.kl[row, step]) == 0.0
                continue
            mask = torch.cat([asked, torch.ones(step, dtype=torch.long)])
            expected = tilted_by_hand(policy, critic, ids[row], mask, LAM, 7, prompt=int(asked.sum()))
            torch.testing.assert_close(scores[row].double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tilt.steered, 1 - sure.float().mean(0))


def test_a_gate_of_zero_tilts_every_step(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    critic = make_critic(llama)
    with critic.attach(llama):
        tilt = MavisTilt([1.0, 0.4], critic, beta=1.5, top_k=7, entropy_gate=0.0)
        _, gated = generate(llama, prompts, tilt)
        _, free = generate(llama, prompts, MavisTilt([1.0, 0.4], critic, beta=1.5, top_k=7))
    assert all(torch.equal(one, other) for one, other in zip(gated, free, strict=True))
    assert tilt.steered.tolist() == [1.0, 1.0, 1.0]


def test_where_the_policy_is_always_sure_enough_a_value_model_reads_nothing(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = make_critic(llama, readout="candidates")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the trunk was asked")

    with critic.attach(llama):
        monkeypatch.setattr(PrefixReader, "read", never)
        tilt = MavisTilt([1.0, 0.4], critic, beta=1.5, top_k=7, entropy_gate=100.0)
        out, seen = generate(llama, prompts, tilt)
    assert all(torch.equal(one, other) for one, other in zip(out.logits, seen, strict=True))
    assert tilt.steered.tolist() == [0.0, 0.0, 0.0]


def test_steps_after_the_end_of_a_response_do_not_count(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = make_critic(llama)
    first = mavis.generate(
        llama, prompts, critic=critic, weights=[1.0, 0.4], beta=1.5, do_sample=False, max_new_tokens=3
    )
    end = int(first[0, -2])  # what the first row says second
    monkeypatch.setattr(llama.generation_config, "eos_token_id", end)
    tilt = MavisTilt([1.0, 0.4], critic, beta=1.5, entropy_gate=0.0)
    with critic.attach(llama):
        llama.generate(**prompts, do_sample=False, max_new_tokens=6, logits_processor=tilt)
    assert tilt.steered.tolist() == [1.0, 1.0, 1.0]  # with the steps of padding it would be less


def test_generate_takes_a_gate(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    critic, common = make_critic(llama), {"do_sample": False, "max_new_tokens": 5}
    plain = llama.generate(**prompts, **common)
    gated = mavis.generate(llama, prompts, critic=critic, weights=[1.0, 0.4], beta=5.0, entropy_gate=100.0, **common)
    assert torch.equal(gated, plain)


@pytest.mark.parametrize("gate", [-0.1, float("nan"), float("inf"), "0.1", True])
def test_a_gate_that_is_no_entropy_is_refused(llama: Any, make_critic: MakeCritic, gate: Any) -> None:
    with pytest.raises(DecodingError, match="entropy_gate is .*, expected a finite number ≥ 0.* None"):
        MavisTilt([1.0, 0.4], make_critic(llama), beta=1.0, entropy_gate=gate)


def test_without_a_gate_there_is_no_share(llama: Any, make_critic: MakeCritic) -> None:
    for gate in (None, 0.5):
        tilt = MavisTilt([1.0, 0.4], make_critic(llama), beta=1.0, entropy_gate=gate)
        with pytest.raises(DecodingError, match=f"steered is not available: entropy_gate is {gate}"):
            _ = tilt.steered
