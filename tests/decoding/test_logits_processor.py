"""What `MavisTilt` leaves alone, which critic and states it reads, and what it refuses at a step."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

import mavis
from mavis import MavisTilt
from mavis.errors import CriticError, DecodingError
from tests.decoding.steps import Ban, ByHand, Inputs, Keep, MakeCritic, follow


def test_rows_whose_lambda_is_zero_are_the_reference_bit_for_bit(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    with critic.attach(llama):
        llama(**prompts)
        scores = torch.randn(3, 40)
        mixed = MavisTilt([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]], critic, beta=2.0, top_k=5)
        out = mixed(prompts["input_ids"], scores)
        assert torch.equal(out[0], scores[0])
        assert torch.equal(out[2], scores[2])
        assert not torch.equal(out[1], scores[1])
        per_row = MavisTilt([1.0, 0.5], critic, beta=[0.0, 0.0, 3.0], top_k=5)(prompts["input_ids"], scores)
        assert torch.equal(per_row[:2], scores[:2])
        assert torch.equal(MavisTilt([1.0, 0.5], critic, beta=0.0)(prompts["input_ids"], scores), scores)


def test_beta_zero_generates_exactly_what_the_plain_policy_does(
    policy: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(policy)
    torch.manual_seed(5)
    plain = policy.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=10)
    torch.manual_seed(5)
    with critic.attach(policy):
        tilted = policy.generate(
            **prompts,
            do_sample=True,
            top_k=0,
            max_new_tokens=10,
            logits_processor=MavisTilt({"a": 1.0}, critic, beta=0.0, top_k=3),
        )
    assert torch.equal(plain, tilted)


def test_tokens_that_an_earlier_processor_banned_stay_banned_and_are_no_candidates(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, tilted_by_hand: ByHand
) -> None:
    critic = make_critic(llama)
    with critic.attach(llama):
        banned = tuple(range(0, 40, 2))
        keep = Keep()
        llama.generate(
            **prompts,
            do_sample=True,
            top_k=0,
            max_new_tokens=4,
            logits_processor=[Ban(*banned), MavisTilt([1.0, 1.0], critic, beta=2.0, top_k=8), keep],
        )
    for ids, logprobs in keep.seen:
        assert (logprobs[:, list(banned)] == -torch.inf).all()
        assert ((logprobs > -torch.inf).sum(1) == 8).all()
        mask = torch.cat([prompts["attention_mask"][1], torch.ones(ids.shape[1] - 5, dtype=torch.long)])
        expected = tilted_by_hand(llama, critic, ids[1], mask, [2.0, 2.0], 8, banned=banned)
        torch.testing.assert_close(logprobs[1].double(), expected, atol=1e-4, rtol=1e-4)


def test_fewer_allowed_tokens_than_candidates_leave_no_probability_on_the_others(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    with critic.attach(llama):
        llama(**prompts)
        scores = torch.full((3, 40), -torch.inf)
        scores[:, [4, 11]] = torch.randn(3, 2)
        out = MavisTilt([1.0, 1.0], critic, beta=2.0, top_k=8)(prompts["input_ids"], scores)
    assert torch.equal(out > -torch.inf, scores > -torch.inf)
    torch.testing.assert_close(out.exp().sum(-1), torch.ones(3))


def test_inputs_are_not_changed(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    critic = make_critic(llama)
    for top_k in (5, None):
        for weights in ([1.0, 0.5], [[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]):
            with critic.attach(llama):
                llama(**prompts)
                scores, ids = torch.randn(3, 40), prompts["input_ids"].clone()
                before = scores.clone()
                MavisTilt(weights, critic, beta=2.0, top_k=top_k, record_kl=True)(ids, scores)
                assert torch.equal(scores, before)
                assert torch.equal(ids, prompts["input_ids"])


def test_permuting_objectives_with_their_weights_changes_nothing(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama, ("a", "b", "c"))
    swapped = make_critic(llama, ("c", "a", "b"))
    order = [2, 0, 1]
    with torch.no_grad():
        swapped.heads.outer.copy_(critic.heads.outer[order])
        swapped.heads.bias.copy_(critic.heads.bias[order])
        swapped.heads.inner.copy_(critic.heads.inner.unflatten(1, (3, 16))[:, order].flatten(1))
        swapped.heads.inner_bias.copy_(critic.heads.inner_bias.view(3, 16)[order].reshape(48))
    swapped.token_table.copy_(critic.token_table)
    scores, outputs = torch.randn(3, 40), []
    for one, weights in (
        (critic, [0.2, 0.5, -0.3]),
        (swapped, [-0.3, 0.2, 0.5]),
        (swapped, {"a": 0.2, "b": 0.5, "c": -0.3}),
    ):
        with one.attach(llama):
            llama(**prompts)
            outputs.append(MavisTilt(weights, one, beta=2.0, top_k=6)(prompts["input_ids"], scores))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs[1], outputs[2])


def test_without_a_critic_it_takes_the_one_attached_to_the_policy_that_generates(
    make_critic: MakeCritic, llama: Any, prompts: Inputs
) -> None:

    other = copy.deepcopy(llama)
    mine, theirs = make_critic(llama, seed=1), make_critic(other, seed=2)
    with mine.attach(llama), theirs.attach(other):
        for policy, critic in ((llama, mine), (other, theirs), (llama, mine)):
            named = policy.generate(
                **prompts, do_sample=False, max_new_tokens=6, logits_processor=MavisTilt({"a": 1.0}, critic, beta=3.0)
            )
            found = policy.generate(
                **prompts, do_sample=False, max_new_tokens=6, logits_processor=MavisTilt({"a": 1.0}, beta=3.0)
            )
            assert torch.equal(named, found)


def test_one_tilt_serves_another_prompt_and_another_batch(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    critic = make_critic(llama)
    tilt = MavisTilt([1.0, 0.5], critic, beta=2.0)
    single = {name: tensor[1:2] for name, tensor in prompts.items()}
    with critic.attach(llama):
        for inputs in (prompts, single, prompts):
            fresh = MavisTilt([1.0, 0.5], critic, beta=2.0)
            used = llama.generate(**inputs, do_sample=False, max_new_tokens=5, logits_processor=tilt)
            assert torch.equal(
                used, llama.generate(**inputs, do_sample=False, max_new_tokens=5, logits_processor=fresh)
            )


def test_threads_on_one_policy_do_not_read_each_others_states(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    singles = [{name: tensor[row : row + 1] for name, tensor in prompts.items()} for row in range(3)]

    def run(row: int) -> torch.Tensor:
        tilt = MavisTilt([1.0, row / 2], critic, beta=2.0)
        return llama.generate(**singles[row], do_sample=False, max_new_tokens=24, logits_processor=tilt)

    with critic.attach(llama):
        expected = [run(row) for row in range(3)]
        results: dict[int, torch.Tensor] = {}
        threads = [
            threading.Thread(target=lambda r=row: results.__setitem__(r, run(r))) for row in range(3) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for row in range(3):
        assert torch.equal(results[row], expected[row])


def test_scores_that_no_caught_forward_pass_made_are_refused(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    tilt = MavisTilt([1.0, 0.5], critic, beta=2.0)
    scores, ids = torch.randn(3, 40), prompts["input_ids"]
    with critic.attach(llama):
        with pytest.raises(DecodingError, match="no forward pass of its policy was captured in this thread"):
            tilt(ids, scores)
        llama(**prompts)
        tilt(ids, scores)
        with pytest.raises(DecodingError, match="for 3 rows at position 5.* at positions 0 to 4"):
            tilt(torch.cat([ids, ids[:, :1]], 1), scores)
        with pytest.raises(DecodingError, match="for 2 rows at position 4"):
            tilt(ids[:2], scores[:2])
        with pytest.raises(DecodingError, match="not the ones that the latest forward pass"):
            tilt(ids.flip(0), scores)
        llama(inputs_embeds=torch.randn(3, 5, 32))
        with pytest.raises(DecodingError, match="no forward pass"):
            tilt(ids, scores)


def test_a_tilt_whose_critic_is_attached_to_no_policy_or_another_one_is_refused(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:

    critic = make_critic(llama)
    arguments = {"do_sample": False, "max_new_tokens": 3}
    with pytest.raises(CriticError, match="not attached to a policy.*Hint: call critic.attach"):
        llama.generate(**prompts, **arguments, logits_processor=MavisTilt([1.0, 0.5], critic, beta=2.0))
    with pytest.raises(CriticError, match="critic is None, and no critic is attached"):
        llama.generate(**prompts, **arguments, logits_processor=MavisTilt([1.0, 0.5], beta=2.0))
    other = copy.deepcopy(llama)
    with critic.attach(other):
        with pytest.raises(DecodingError, match="no forward pass of its policy"):
            llama.generate(**prompts, **arguments, logits_processor=MavisTilt([1.0, 0.5], critic, beta=2.0))
        with pytest.raises(CriticError, match="attached to another policy"):
            mavis.generate(llama, prompts, critic=critic, weights=[1.0, 0.5], beta=2.0, **arguments)
    with critic.attach(llama), make_critic(llama, seed=1).attach(llama):
        with pytest.raises(CriticError, match="2 critics are attached"):
            llama.generate(**prompts, **arguments, logits_processor=MavisTilt([1.0, 0.5], beta=2.0))


def test_more_candidates_than_tokens_are_refused_when_the_vocabulary_is_known(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    with critic.attach(llama), pytest.raises(DecodingError, match="top_k is 41, but the policy has 40 tokens"):
        follow(llama, prompts, MavisTilt([1.0, 0.5], critic, beta=1.0, top_k=41), do_sample=False)


def test_scores_of_another_vocabulary_are_refused(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    with pytest.raises(CriticError, match="critic has a vocabulary of 40 tokens, but scores has 41"):
        MavisTilt([1.0, 0.5], make_critic(llama), beta=1.0)(prompts["input_ids"], torch.randn(3, 41))


def test_a_processor_that_asks_the_output_embedding_itself_changes_nothing(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    class Lens(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            llama.lm_head(torch.randn(3, 1, 32))
            return scores

    critic = make_critic(llama)
    with critic.attach(llama):
        outputs = [
            llama.generate(
                **prompts,
                do_sample=False,
                max_new_tokens=6,
                logits_processor=[*before, MavisTilt([1.0, 0.5], critic, beta=2.0)],
            )
            for before in ([], [Lens()])
        ]
    assert torch.equal(outputs[0], outputs[1])
