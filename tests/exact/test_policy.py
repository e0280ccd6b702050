"""A world as a causal LM: what generates from it is what dynamic programming evaluates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mavis
from mavis.errors import CriticError
from mavis.exact import World, WorldObjective, WorldPolicy, evaluate_tilt, world_tokenizer
from tests.factories import llama_config


@pytest.fixture(scope="module")
def world() -> World:
    return World.random("conflicting", seed=2)


@pytest.fixture(scope="module")
def policy(world: World) -> WorldPolicy:
    return WorldPolicy.of(world)


@pytest.fixture(scope="module")
def critic(policy: WorldPolicy) -> mavis.HiddenStateCritic:
    """A critic with random heads, strong enough that what it does cannot be taken for chance."""
    critic = mavis.HiddenStateCritic.for_policy(
        policy, ["first", "second"], hidden=16, rank=8, composition="independent"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        critic.heads.outer.copy_(torch.randn(critic.heads.outer.shape, generator=generator))
    return critic


def counts_of(world: World, tokens: Tensor) -> Tensor:
    counts = torch.zeros(len(tokens), dtype=torch.long)
    for step in range(tokens.shape[1]):
        counts = world.next_counts[counts, tokens[:, step]]
    return counts


def test_its_logits_are_the_reference_logprobs(world: World, policy: WorldPolicy) -> None:
    ids = torch.randint(world.tokens, (3, 7))
    torch.testing.assert_close(policy(ids).logits.double(), world.logprobs[ids], atol=1e-6, rtol=0)


def test_a_state_is_the_token_the_step_and_the_counts(world: World, policy: WorldPolicy) -> None:
    ids = torch.randint(world.tokens, (4, 6))
    states, _ = mavis.policies.state_capture.forward_states(policy, input_ids=ids)
    grid = policy.state_grid()
    assert grid.shape == (world.steps, len(world.rewards), world.tokens, policy.config.hidden_size)
    for step in range(6):
        counts = counts_of(world, ids[:, 1 : step + 1])
        assert torch.equal(states[:, step], grid[step, counts, ids[:, step]])


def test_padding_on_the_left_and_a_cache_change_no_state(world: World, policy: WorldPolicy) -> None:
    ids = torch.randint(world.tokens, (2, 5))
    alone, _ = mavis.policies.state_capture.forward_states(policy, input_ids=ids)
    padded = torch.cat([torch.full((2, 3), world.tokens), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 5)], dim=1).long()
    together, _ = mavis.policies.state_capture.forward_states(policy, input_ids=padded, attention_mask=mask)
    assert torch.equal(together[:, 3:], alone)
    first = policy(input_ids=padded[:, :5], attention_mask=mask[:, :5])
    later, _ = mavis.policies.state_capture.forward_states(
        policy, input_ids=padded[:, 5:], attention_mask=mask, past_key_values=first.past_key_values
    )
    assert torch.equal(later, alone[:, 2:])


def test_beams_carry_their_own_counts(world: World, policy: WorldPolicy, critic: mavis.HiddenStateCritic) -> None:
    """The best of as many beams as there are responses is the most likely response under the tilt."""
    short = World(world.logprobs, world.counted, world.caps, world.rewards, 2)
    prompt = torch.tensor([[3]])
    with critic.attach(policy):
        found = policy.generate(
            prompt,
            num_beams=world.tokens,
            max_new_tokens=2,
            do_sample=False,
            logits_processor=mavis.MavisTilt([1.0, -0.5], critic, beta=2.0, top_k=None),
        )
    tilt = policy.tilts(critic, torch.tensor([2.0, -1.0]))
    first = torch.log_softmax(world.logprobs[3] + tilt[0, 0, 3], dim=-1)
    after = short.next_counts[0]
    second = torch.log_softmax(world.logprobs + tilt[1, after, torch.arange(world.tokens)], dim=-1)
    best = (first[:, None] + second).flatten().argmax().item()
    assert found[0, 1:].tolist() == [best // world.tokens, best % world.tokens]


def test_steered_responses_earn_and_spend_what_dynamic_programming_says(
    world: World, policy: WorldPolicy, critic: mavis.HiddenStateCritic
) -> None:
    """Two rewards and a KL within 4.5 standard errors: a false alarm in fewer than one of 10,000 runs."""
    lam = [1.5, -1.0]
    tilt = policy.tilts(critic, torch.tensor(lam))
    exact = evaluate_tilt(world, tilt)
    prompts = torch.arange(world.tokens).repeat_interleave(400)[:, None]
    torch.manual_seed(0)
    processor = mavis.MavisTilt(lam, critic, beta=1.0, top_k=None, record_kl=True)
    with critic.attach(policy):
        sampled = policy.generate(prompts, do_sample=True, top_k=0, logits_processor=processor)
    assert sampled.shape[1] == 1 + world.steps
    rewards = world.rewards[counts_of(world, sampled[:, 1:])]
    for found, truth in ((rewards[:, 0], exact.rewards[0]), (rewards[:, 1], exact.rewards[1])):
        assert abs(found.mean() - truth) <= 4.5 * found.std() / len(found) ** 0.5
    kl = processor.kl.double().sum(1)
    assert exact.kl > 1.0
    assert abs(kl.mean() - exact.kl) <= 4.5 * kl.std() / len(kl) ** 0.5


def test_a_value_model_with_a_backbone_of_its_own_steers_it(world: World, policy: WorldPolicy) -> None:
    backbone = llama_config(vocab_size=world.tokens + 1, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    torch.manual_seed(0)
    value_model = mavis.ValueModelCritic.for_policy(
        policy, ["first", "second"], backbone=backbone, composition="independent"
    )
    torch.nn.init.normal_(value_model.heads.outer)
    prompt = torch.zeros(1, 1, dtype=torch.long)
    with value_model.attached_to(policy):
        tilt = mavis.MavisTilt([1.0, -1.0], value_model, beta=2.0, top_k=None)
        chosen = policy.generate(prompt, do_sample=False, max_new_tokens=1, logits_processor=tilt)[0, 1]
        policy(prompt)
        values = value_model.values(prompt, None)[0].double()
    tilted = policy(prompt).logits[0, -1].double() + 2.0 * (values[:, 0] - values[:, 1])
    assert chosen == tilted[: world.tokens].argmax()


@pytest.mark.parametrize("kind", ["memory", "value model"])
def test_a_critic_that_reads_more_than_one_state_has_no_tilt_of_a_state(policy: WorldPolicy, kind: str) -> None:
    backbone = llama_config(vocab_size=policy.config.vocab_size, hidden_size=8, intermediate_size=8)
    critic: Any = (
        mavis.HiddenStateCritic.for_policy(policy, ["first"], memory=4)
        if kind == "memory"
        else mavis.ValueModelCritic.for_policy(policy, ["first"], backbone=backbone)
    )
    with pytest.raises(CriticError, match="reads more than one state"):
        policy.tilts(critic, torch.ones(1))


def test_its_text_is_scored_by_the_objectives(world: World) -> None:
    tokenizer = world_tokenizer(world)
    tokens = torch.randint(world.tokens, (6, world.steps))
    texts = tokenizer.batch_decode(tokens)
    for m in range(world.objectives):
        scores = WorldObjective(world, m)(["t0"] * 6, texts)
        assert scores == world.rewards[counts_of(world, tokens), m].tolist()
    assert tokenizer(texts)["input_ids"] == tokens.tolist()


def test_world_and_policy_take_another_size(world: World) -> None:
    small = World.random("product", seed=0, tokens=10, steps=5)
    policy = WorldPolicy.of(small)
    assert policy.generate(torch.tensor([[0], [4]]), do_sample=True).shape == (2, 6)
