"""The KL that a tilt records of each generation, against sums over the vocabulary."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mavis import MavisTilt
from mavis.errors import DecodingError
from tests.decoding.steps import Ban, Inputs, Keep, MakeCritic


@pytest.mark.parametrize(("top_k", "temperature"), [(5, 1.0), (None, 1.0), (7, 1.4), (12, 0.6)])
def test_recorded_kl_is_the_brute_force_sum_with_bans_and_truncation(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, top_k: int | None, temperature: float
) -> None:
    critic = make_critic(llama)
    tilt = MavisTilt(
        [[0.5, 0.5], [0.0, 0.0], [1.0, -1.0]], critic, beta=1.5, top_k=top_k, temperature=temperature, record_kl=True
    )
    before, after = Keep(), Keep()
    with critic.attach(llama):
        llama.generate(
            **prompts,
            do_sample=True,
            top_k=0,
            temperature=temperature,
            max_new_tokens=4,
            logits_processor=[Ban(3, 17), before, tilt, after],
        )
    assert tilt.kl.shape == (3, 4)
    for step, ((_, received), (_, returned)) in enumerate(zip(before.seen, after.seen, strict=True)):
        reference = torch.log_softmax(received.double() / temperature, -1)
        ours = torch.log_softmax(returned.double() / temperature, -1)
        for row in range(3):
            terms = [
                (p.exp() * (p - q)).item() for p, q in zip(ours[row], reference[row], strict=True) if p > -torch.inf
            ]
            assert tilt.kl[row, step].item() == pytest.approx(sum(terms), abs=2e-5)
    assert torch.equal(tilt.kl[1], torch.zeros(4))


def test_kl_starts_anew_with_every_generation_and_is_refused_where_it_was_not_recorded(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    tilt = MavisTilt([1.0, 1.0], critic, beta=1.0, record_kl=True)
    with pytest.raises(DecodingError, match="nothing was generated"):
        _ = tilt.kl
    with critic.attach(llama):
        for steps in (3, 5, 5):
            llama.generate(**prompts, do_sample=False, max_new_tokens=steps, logits_processor=tilt)
            assert tilt.kl.shape == (3, steps)
    with pytest.raises(DecodingError, match="record_kl is False"):
        _ = MavisTilt([1.0, 1.0], critic, beta=1.0).kl


def test_steps_after_a_responses_end_spend_nothing(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:

    policy = copy.deepcopy(llama)
    critic = make_critic(policy)
    ends = [5, 9, 20, 30, 33]
    policy.generation_config.eos_token_id = ends
    tilt = MavisTilt([0.3, 0.1], critic, beta=0.3, top_k=None, record_kl=True)
    torch.manual_seed(2)
    with critic.attach(policy):
        inputs = {name: tensor.repeat_interleave(8, 0) for name, tensor in prompts.items()}
        out = policy.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=12, logits_processor=tilt)
    responses = out[:, prompts["input_ids"].shape[1] :]
    is_end = torch.isin(responses, torch.tensor(ends))
    after = (is_end.cumsum(1) - is_end.long()) > 0
    assert after.any()
    assert (tilt.kl[after] == 0).all()
    assert (tilt.kl[~after] > 0).all()


def test_feeding_a_response_back_is_a_new_generation(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    critic = make_critic(llama)
    tilt = MavisTilt([1.0, 0.5], critic, beta=1.0, record_kl=True)
    with critic.attach(llama):
        out = llama.generate(**prompts, do_sample=False, max_new_tokens=4, logits_processor=tilt)
        mask = torch.cat([prompts["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1)
        llama.generate(input_ids=out, attention_mask=mask, do_sample=False, max_new_tokens=3, logits_processor=tilt)
    assert tilt.kl.shape == (3, 3)
