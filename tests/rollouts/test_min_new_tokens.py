"""Responses that may not end before their n-th token: the reference policy is the one that cannot, everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mavis
from mavis.critics import HiddenStateCritic
from mavis.errors import ConfigError, DecodingError
from mavis.evaluation import EvaluationSettings, evaluate
from mavis.policies.token_embeddings import token_embeddings
from mavis.rollouts import RolloutPlan, RolloutSettings, collect
from mavis.rollouts.replay import Sequences, forward_sequences, replay
from mavis.rollouts.sampler import GENERATE_SAMPLER, GenerateSampler
from mavis.training.improvement.features import extract

PROMPTS = ["once upon a time", "the dog", "he was", "she said"] * 4
ENDS = list(range(2, 40))
"""So many of the 61 tokens end a response that most end at once."""
LAM = torch.tensor([[1.0, 0.5], [0.0, 2.0], [2.0, 0.0], [-1.0, 1.0]] * 4, dtype=torch.float64)
SETTINGS = [
    RolloutSettings(max_new_tokens=6, top_k=12, min_new_tokens=3),
    RolloutSettings(max_new_tokens=6, top_k=None, min_new_tokens=2, temperature=1.3),
]


@pytest.fixture
def policy(make_other_policy: Any) -> Any:
    policy = make_other_policy()
    policy.generation_config.eos_token_id = ENDS
    return policy


@pytest.fixture
def critic(policy: Any) -> HiddenStateCritic:
    critic = HiddenStateCritic.for_policy(policy, ["good", "brevity"], hidden=4, rank=2, composition="independent")
    with torch.no_grad():
        critic.heads.bias.normal_(generator=torch.Generator().manual_seed(0))
    return critic


def shortest(responses: list[list[int]]) -> int:
    return min(next((at for at, token in enumerate(row, 1) if token in ENDS), 99) for row in responses)


@pytest.mark.parametrize("tilted", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_no_response_ends_before(
    policy: Any, tiny_tokenizer: Any, critic: Any, settings: RolloutSettings, tilted: bool
) -> None:
    options: Any = {"critic": critic, "lam": LAM} if tilted else {"top_k": settings.top_k}
    at_once = RolloutSettings(max_new_tokens=6, top_k=settings.top_k)
    assert shortest(GENERATE_SAMPLER.draw(policy, tiny_tokenizer, PROMPTS, at_once, 0, **options).response_ids) == 1
    drawn = GENERATE_SAMPLER.draw(policy, tiny_tokenizer, PROMPTS, settings, 0, **options)
    assert shortest(drawn.response_ids) == settings.min_new_tokens + 1  # which is the first that may


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_replay_finds_the_recorded_kl_and_the_candidates_that_were_left(
    policy: Any, tiny_tokenizer: Any, critic: Any, settings: RolloutSettings
) -> None:
    drawn = GenerateSampler(log_ratios=True).draw(policy, tiny_tokenizer, PROMPTS, settings, 0, critic=critic, lam=LAM)
    sequences = Sequences.pack(drawn.prompt_ids, drawn.response_ids)
    options: dict[str, Any] = {"top_k": settings.top_k, "temperature": settings.temperature}
    n = settings.min_new_tokens
    steps = replay(policy, sequences, torch.eye(61), critic=critic, lam=LAM.float(), min_new_tokens=n, **options)
    real = steps.is_response
    assert drawn.kl is not None
    torch.testing.assert_close(steps.kl[real], drawn.kl[:, : real.shape[1]][real], atol=1e-5, rtol=0)
    assert not steps.expected[:, :n, ENDS].any()  # the distribution itself, for the table is one-hot
    assert steps.expected[:, n:, ENDS][real[:, n:]].sum() > 0
    torch.testing.assert_close(steps.expected[real].sum(-1), torch.ones(int(real.sum())))
    assert drawn.log_ratio is not None
    assert drawn.log_ratio.isfinite().all()
    plain = replay(policy, sequences, torch.eye(61), critic=critic, lam=LAM.float(), **options)
    assert not torch.allclose(plain.kl[:, :n], steps.kl[:, :n], atol=1e-3)
    torch.testing.assert_close(plain.kl[:, n:], steps.kl[:, n:])


def test_the_reference_policy_is_the_one_that_cannot_stop(policy: Any) -> None:
    sequences = Sequences.pack([[5, 9], [7]], [[45, 50, 41], [60, 3]])
    steps = replay(policy, sequences, torch.zeros(61, 1), top_k=10, min_new_tokens=1)
    logits = forward_sequences(policy, sequences)[1].double()
    for row, response in enumerate(([45, 50, 41], [60, 3])):
        for step, token in enumerate(response):
            scores = logits[row, step].clone()
            if step < 1:
                scores[ENDS] = -torch.inf
            reference = torch.log_softmax(scores, dim=-1)
            assert float(steps.reference_logprobs[row, step]) == pytest.approx(float(reference[token]), abs=1e-5)
            kept = reference.exp().topk(10).values.sum()
            assert float(steps.kl[row, step]) == pytest.approx(-float(kept.log()), abs=1e-5)


def test_rollouts_and_what_is_learnt_from_them_agree(
    policy: Any, tiny_tokenizer: Any, critic: Any, tiny_objectives: Any, tmp_path: Path
) -> None:
    weights = torch.eye(2, dtype=torch.float64).repeat(8, 1)
    plan = RolloutPlan(PROMPTS, weights, torch.full((16,), 2.0, dtype=torch.float64))
    settings = SETTINGS[0]
    shards = list(collect(policy, tiny_tokenizer, tiny_objectives, plan, tmp_path, settings, critic=critic))
    recorded = [kl for shard in shards for row in shard["kl"] for kl in row]
    found = extract(policy, shards, token_embeddings(policy), critic, settings, tilted=True).local_rollouts
    assert found.kl[found.is_response].tolist() == pytest.approx(recorded, abs=1e-5)


def test_truncation_costs_what_it_costs_the_policy_that_cannot_stop(
    policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, tmp_path: Path
) -> None:
    plan, settings = RolloutPlan.reference(PROMPTS, 2), SETTINGS[0]
    (shard,) = collect(policy, tiny_tokenizer, tiny_objectives, plan, tmp_path, settings, truncate_reference=True)
    sequences = Sequences.pack(shard["prompt_ids"], shard["response_ids"])
    scores = forward_sequences(policy, sequences)[1].double()
    scores[:, : settings.min_new_tokens, ENDS] = -torch.inf
    mass = scores.softmax(-1).topk(12).values.sum(-1).log().neg()
    for row, kl in enumerate(shard["kl"]):
        assert kl == pytest.approx(mass[row, : len(kl)].tolist(), abs=1e-5)


def test_an_evaluation_measures_the_policy_that_cannot_stop(
    policy: Any, tiny_tokenizer: Any, critic: Any, tiny_objectives: Any, tmp_path: Path
) -> None:
    settings = EvaluationSettings(
        divisions=1, betas=(1.0,), samples=4, reference_samples=6, speed_repeats=0, sampling=SETTINGS[0]
    )
    report = evaluate(policy, tiny_tokenizer, critic, tiny_objectives, ["the dog"], tmp_path, settings)
    assert report is not None
    assert all(row.length > SETTINGS[0].min_new_tokens for row in report.rows)
    assert report.settings["sampling"]["min_new_tokens"] == 3


def test_respond_does_not_end_before_either(policy: Any, tiny_tokenizer: Any, critic: Any) -> None:
    options: dict[str, Any] = {"critic": critic, "weights": [1.0, 0.0], "beta": 1.0, "max_new_tokens": 6}
    torch.manual_seed(0)
    found = mavis.respond(policy, tiny_tokenizer, PROMPTS, **options, min_new_tokens=3)
    assert shortest([response.token_ids for (response,) in found]) == 4
    with pytest.raises(DecodingError, match="min_new_tokens is 7, but max_new_tokens 6. Hint"):
        mavis.respond(policy, tiny_tokenizer, PROMPTS, **options, min_new_tokens=7)


@pytest.mark.parametrize(
    ("value", "message"), [(-1, "min_new_tokens is -1"), (1.5, "min_new_tokens is 1.5"), (65, "but max_new_tokens 64")]
)
def test_lengths_that_cannot_be_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RolloutSettings(min_new_tokens=value)
