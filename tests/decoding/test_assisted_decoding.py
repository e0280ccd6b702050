"""Assisted decoding: drafts change no tilted score of a token that is taken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mavis
from mavis.errors import DecodingError
from tests.decoding.steps import REPETITIVE, ByHand, Inputs, MakeCritic, expect_tilted, tilt_for
from tests.factories import NEVER_ENDING, tiny_llama


def smaller(vocabulary: int = 40) -> Any:
    """A draft model that agrees with nobody for long."""
    return tiny_llama(3, vocab_size=vocabulary, num_hidden_layers=1, **NEVER_ENDING)


def noisy(policy: Any) -> Any:
    """A draft model that often agrees: some drafts are taken in full, some in part, some not at all."""
    torch.manual_seed(4)
    draft = copy.deepcopy(policy)
    with torch.no_grad():
        draft.get_output_embeddings().weight.add_(torch.randn_like(draft.get_output_embeddings().weight) * 0.4)
    return draft


ASSISTANCE: dict[str, Callable[[Any], dict[str, Any]]] = {
    "another model": lambda policy: {"assistant_model": smaller()},
    "a similar model": lambda policy: {"assistant_model": noisy(policy)},
    "the policy itself": lambda policy: {"assistant_model": policy},
    "its first layer": lambda policy: {"assistant_early_exit": 1},
    "prompt lookup": lambda policy: {"prompt_lookup_num_tokens": 3},
}


PADDED = {"input_ids": torch.tensor([[0, 0, 1, 7, 3, 9, 7, 3]]), "attention_mask": torch.tensor([[0, 0] + [1] * 6])}


@pytest.mark.parametrize("inputs", [REPETITIVE, PADDED], ids=["prompt", "padded prompt"])
@pytest.mark.parametrize("how", ASSISTANCE)
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
def test_drafts_change_no_score_of_a_token_that_is_taken(
    llama: Any,
    make_critic: MakeCritic,
    tilted_by_hand: ByHand,
    kind: dict[str, Any],
    how: str,
    do_sample: bool,
    inputs: Inputs,
) -> None:
    policy = copy.deepcopy(llama)
    critic = make_critic(policy, **kind)
    arguments = {"do_sample": do_sample, "max_new_tokens": 14, **({"top_k": 0} if do_sample else {})}
    torch.manual_seed(0)
    with critic.attach(policy):
        tilt = tilt_for(critic)
        plain = policy.generate(**inputs, **arguments, logits_processor=tilt)
        for _ in range(2):  # what the first has left behind does not reach the second
            out = policy.generate(
                **inputs,
                **arguments,
                **ASSISTANCE[how](policy),
                logits_processor=tilt,
                return_dict_in_generate=True,
                output_scores=True,
            )
            if not do_sample:
                assert torch.equal(out.sequences, plain)
            start = inputs["input_ids"].shape[1]
            assert len(out.scores) == out.sequences.shape[1] - start == 14
            seen = [(out.sequences[:, : start + step], scores) for step, scores in enumerate(out.scores)]
            expect_tilted(tilted_by_hand, policy, critic, seen, inputs)


def test_generate_passes_assistance_on(llama: Any, make_critic: MakeCritic) -> None:
    steer: dict[str, Any] = {"critic": make_critic(llama, memory=8), "weights": [1.0, 0.4], "beta": 1.5}
    steer |= {"do_sample": False, "max_new_tokens": 14}
    plain = mavis.generate(llama, REPETITIVE, **steer)
    for extra in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": smaller()}):
        assert torch.equal(mavis.generate(llama, REPETITIVE, **steer, **extra), plain)


@pytest.mark.parametrize("how", ASSISTANCE)
def test_the_kl_of_assisted_decoding_is_refused(llama: Any, make_critic: MakeCritic, how: str) -> None:
    policy = copy.deepcopy(llama)
    critic = make_critic(policy)
    tilt = tilt_for(critic, record_kl=True)
    with critic.attach(policy), pytest.raises(DecodingError, match="record_kl is True, but generate is assisted"):
        policy.generate(
            **REPETITIVE, do_sample=False, max_new_tokens=9, logits_processor=tilt, **ASSISTANCE[how](policy)
        )
