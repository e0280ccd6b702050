"""Heads recover values that are known: a small world that counts a token, with every state a one-hot vector.

Responses of T tokens are drawn uniformly from V tokens, the state holds the step and how often token 0 has come so far,
and the reward is how often it comes in the whole response. So Q(s_t, a) = count + [a = 0] + (T − 1 − t) / V, exactly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mavis.critics import HiddenStateCritic
from mavis.errors import ConfigError
from mavis.policies.fingerprint import Fingerprint
from mavis.training.improvement.features import Features
from mavis.training.improvement.fit import FitSettings, fit
from mavis.training.rollout_tensors import concatenate_rollouts

STEPS, TOKENS = 3, 3
STATES = STEPS * STEPS
EMBEDDINGS = torch.eye(TOKENS)
SETTINGS = FitSettings(epochs=12, batch_size=25, learning_rate=2e-2, weight_decay=0.0)


def make_critic(*objectives: str, seed: int = 0) -> HiddenStateCritic:
    names = objectives or ("count",)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = HiddenStateCritic(
            names, Fingerprint("world", STATES, TOKENS, "none"), embedding_size=TOKENS, hidden=16, rank=TOKENS
        )
    critic.refresh_token_table(EMBEDDINGS)
    return critic


def make_features(rollouts: int = 400, objectives: int = 1, *, kl: float = 0.0, seed: int = 0) -> Features:
    """Draw responses; every objective counts the same token, and every step costs the same KL."""
    actions = torch.randint(TOKENS, (rollouts, STEPS), generator=torch.Generator().manual_seed(seed))
    hits = (actions == 0).long()
    before = hits.cumsum(1) - hits
    states = F.one_hot(torch.arange(STEPS) * STEPS + before, STATES).float()
    return Features(
        prompt_ids=torch.zeros(rollouts, 1, dtype=torch.long),
        is_prompt=torch.ones(rollouts, 1, dtype=torch.bool),
        states=states,
        action_ids=actions,
        expected=torch.full((rollouts, STEPS, TOKENS), 1 / TOKENS),
        kl=torch.full((rollouts, STEPS), kl),
        is_response=torch.ones(rollouts, STEPS, dtype=torch.bool),
        rewards=hits.sum(1, keepdim=True).float().expand(-1, objectives).contiguous(),
        lam=torch.zeros(rollouts, objectives),
        is_evaluated=torch.ones(rollouts, objectives, dtype=torch.bool),
    )


def true_values(features: Features) -> Tensor:
    """(N, T, V) value of every token at every state that was met."""
    hits = (features.action_ids == 0).float()
    before = hits.cumsum(1) - hits
    to_come = (STEPS - 1 - torch.arange(STEPS)) / TOKENS
    return (before + to_come)[:, :, None] + EMBEDDINGS[0]


@torch.no_grad()
def values(critic: HiddenStateCritic, features: Features) -> Tensor:
    """(N, T, V, M) what the critic predicts there."""
    flat = critic.values_from_inputs(critic.response_inputs(features.states).flatten(0, 1), None)
    return flat.unflatten(0, features.states.shape[:2])


def test_the_heads_recover_the_values() -> None:
    critic, features = make_critic(), make_features()
    report = fit(critic, features, EMBEDDINGS, 0.0, SETTINGS, seed=0)
    torch.testing.assert_close(values(critic, features)[..., 0], true_values(features), atol=0.1, rtol=0)
    assert report.losses[-1] < 1e-3


def test_plain_returns_have_the_same_values_in_expectation_and_more_noise() -> None:
    unseen = make_features(200, seed=9)
    truth = true_values(unseen)[:, :, 0]  # of token 0, which carries the advantage
    errors: dict[str, list[Tensor]] = {"decomposition": [], "monte_carlo": []}
    for seed in range(3):
        features = make_features(400, seed=seed)
        for target, found in errors.items():
            critic = make_critic(seed=seed)
            fit(critic, features, EMBEDDINGS, 0.0, replace(SETTINGS, target=target), seed=seed)  # type: ignore[arg-type]
            found.append(values(critic, unseen)[:, :, 0, 0] - truth)
    mean_squares = {target: torch.stack(found).square().mean() for target, found in errors.items()}
    assert mean_squares["decomposition"] < mean_squares["monte_carlo"] / 4
    # What is still to come has a standard deviation of at most sqrt(2 · 2/9) = 0.67, over hundreds of rollouts.
    assert abs(float(torch.stack(errors["monte_carlo"]).mean())) < 0.15
    assert abs(float(torch.stack(errors["decomposition"]).mean())) < 0.05


def test_decomposition_explains_returns_that_plain_values_cannot() -> None:
    features = make_features()
    reports = {
        target: fit(make_critic(), features, EMBEDDINGS, 0.0, replace(SETTINGS, target=target), seed=0)  # type: ignore[arg-type]
        for target in ("decomposition", "monte_carlo")
    }
    # The held-out rollouts are the same, for the seed is. What the tokens to come will bring no value can know: of a
    # return's three equal parts of variance, those of later tokens: (2 + 1 + 0) of (3 + 3 + 3), a third on average.
    assert reports["decomposition"].explained["count"] == pytest.approx(2 / 3, abs=0.15)
    assert reports["monte_carlo"].explained["count"] == pytest.approx(2 / 3, abs=0.2)
    assert min(reports["decomposition"].losses) < min(reports["monte_carlo"].losses) / 10


def test_a_constant_in_the_rewards_is_a_constant_in_the_values_and_nothing_else() -> None:
    features = make_features()
    shifted = replace(features, rewards=features.rewards + 1.5)
    critics = [make_critic(), make_critic()]
    for critic, data in zip(critics, (features, shifted), strict=True):
        fit(critic, data, EMBEDDINGS, 0.0, SETTINGS, seed=0)
    plain, moved = (values(critic, features)[..., 0] for critic in critics)
    torch.testing.assert_close(moved, plain + 1.5, atol=0.1, rtol=0)
    advantages = [v - v.mean(-1, keepdim=True) for v in (plain, moved)]
    torch.testing.assert_close(advantages[0], advantages[1], atol=0.1, rtol=0)


def test_kl_is_subtracted_for_later_steps_only() -> None:
    features = make_features(kl=0.5)
    free, priced = make_critic(), make_critic()
    fit(free, features, EMBEDDINGS, 0.0, SETTINGS, seed=0)
    fit(priced, features, EMBEDDINGS, 0.8, SETTINGS, seed=0)
    still_to_pay = 0.8 * 0.5 * (STEPS - 1 - torch.arange(STEPS))
    torch.testing.assert_close(values(free, features)[..., 0], true_values(features), atol=0.1, rtol=0)
    expected = true_values(features) - still_to_pay[:, None]
    torch.testing.assert_close(values(priced, features)[..., 0], expected, atol=0.1, rtol=0)


def test_padding_after_a_response_does_not_count() -> None:
    features = make_features(100)
    ends = torch.arange(100) % STEPS + 1
    is_response = torch.arange(STEPS) < ends[:, None]
    features = replace(features, is_response=is_response, kl=features.kl + 0.1 * is_response)
    rubbish = replace(
        features,
        states=torch.where(is_response[..., None], features.states, 7.0 + torch.randn(100, STEPS, STATES)),
        action_ids=torch.where(is_response, features.action_ids, 1),
        expected=torch.where(is_response[..., None], features.expected, 2.0),
    )
    critics = [make_critic(), make_critic()]
    reports = [
        fit(critic, data, EMBEDDINGS, 0.5, replace(SETTINGS, epochs=3), seed=0)
        for critic, data in zip(critics, (features, rubbish), strict=True)
    ]
    assert reports[0] == reports[1]
    for one, other in zip(critics[0].state_dict().values(), critics[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_head_learns_only_from_rollouts_that_count_for_its_objective() -> None:
    features = make_features(200, 2)
    is_evaluated = torch.zeros(200, 2, dtype=torch.bool)
    is_evaluated[:, 1] = True
    critic = make_critic("first", "second")
    report = fit(critic, replace(features, is_evaluated=is_evaluated), EMBEDDINGS, 0.0, SETTINGS, seed=0)
    found = values(critic, features)
    assert not found[..., 0].any()
    torch.testing.assert_close(found[..., 1], true_values(features), atol=0.15, rtol=0)
    assert report.explained["second"] > 0.4
    assert report.losses[-1] < 0.1 * report.losses[0]


def test_two_objectives_are_fitted_at_once() -> None:
    features = make_features(400, 2)
    opposite = replace(features, rewards=features.rewards * torch.tensor([1.0, -1.0]))
    critic = make_critic("more", "less")
    fit(critic, opposite, EMBEDDINGS, 0.0, SETTINGS, seed=0)
    found = values(critic, features)
    torch.testing.assert_close(found[..., 0], true_values(features), atol=0.15, rtol=0)
    torch.testing.assert_close(found[..., 1], -true_values(features), atol=0.15, rtol=0)


def test_the_epoch_with_the_smallest_held_out_error_is_kept() -> None:
    reported: list[tuple[int, float]] = []
    critic, features = make_critic(), make_features(60)
    settings = replace(SETTINGS, epochs=12, learning_rate=0.1, target="monte_carlo")  # so bold that it goes up and down
    report = fit(
        critic,
        features,
        EMBEDDINGS,
        0.0,
        settings,
        seed=0,
        on_epoch=lambda *epoch_and_loss: reported.append(epoch_and_loss),
    )
    assert reported == list(enumerate(report.losses[1:], start=1))
    assert len(report.losses) == 13
    assert report.epoch == report.losses.index(min(report.losses))
    assert 0 < report.epoch < 12

    # Stopped there, with what follows never trained, the heads are the same but for the learning rate's schedule; so
    # the kept state is checked by its error on the rollouts that were held out.
    held_out = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:6]
    kept = features.rows(held_out)
    predicted = values(critic, kept)[..., 0].gather(2, kept.action_ids[..., None])[..., 0]
    assert float((predicted - kept.rewards).square().mean()) == pytest.approx(min(report.losses), rel=1e-4)


def test_a_fit_that_only_makes_things_worse_leaves_the_heads_as_they_were() -> None:
    critic, features = make_critic(), make_features(60)
    fit(critic, features, EMBEDDINGS, 0.0, SETTINGS, seed=0)
    before = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    report = fit(critic, features, EMBEDDINGS, 0.0, replace(SETTINGS, learning_rate=30.0, epochs=2), seed=0)
    assert report.epoch == 0
    for name, tensor in critic.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_token_table_is_the_projection_of_the_embeddings_afterwards() -> None:
    critic = make_critic()
    fit(critic, make_features(60), EMBEDDINGS, 0.0, replace(SETTINGS, epochs=2), seed=0)
    with torch.no_grad():
        torch.testing.assert_close(critic.token_table[:, :-1], critic.projection(EMBEDDINGS))
    assert critic.token_table[:, -1].tolist() == [1.0] * TOKENS


def test_a_seed_fixes_the_fit_and_another_one_changes_it() -> None:
    def fitted(seed: int) -> tuple[list[float], dict[str, Tensor]]:
        critic = make_critic()
        torch.rand(seed + 3)  # what the caller's generator has given does not matter
        report = fit(critic, make_features(60), EMBEDDINGS, 0.0, replace(SETTINGS, epochs=2), seed=seed)
        return report.losses, critic.state_dict()

    (losses, state), (same_losses, same_state), (other_losses, _) = fitted(0), fitted(0), fitted(1)
    assert losses == same_losses != other_losses
    for name, tensor in state.items():
        assert torch.equal(tensor, same_state[name]), name


def test_the_explained_share_counts_rollouts_of_the_evaluated_policies_only() -> None:
    """Relabelled rollouts, here of a policy that never hits, have other returns than the values predict."""
    own, again = make_features(200), make_features(200, seed=1)
    missed = again.action_ids.clamp_min(1)
    again = replace(again, action_ids=missed, rewards=torch.zeros_like(again.rewards))
    features = concatenate_rollouts([own, again])
    critic, held_out = make_critic(), torch.arange(400) % 4 == 0
    report = fit(critic, features, EMBEDDINGS, 0.0, SETTINGS, seed=0, held_out=held_out, on_policy=200)
    watched = own.rows(held_out[:200].nonzero()[:, 0])
    predicted = values(critic, watched)[..., 0].gather(2, watched.action_ids[:, :, None])[:, :, 0]
    error, variance = (predicted - watched.rewards).square().mean(), watched.rewards.var(correction=0)
    assert report.explained["count"] == pytest.approx(float(1 - error / variance), abs=1e-5)
    on_all = fit(make_critic(), features, EMBEDDINGS, 0.0, SETTINGS, seed=0, held_out=held_out)
    assert on_all.losses == report.losses
    assert on_all.explained["count"] != pytest.approx(report.explained["count"], abs=0.02)


def test_gradients_that_an_earlier_run_left_behind_do_not_count() -> None:
    clean, stale = make_critic(), make_critic()
    for parameter in stale.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    reports = [
        fit(critic, make_features(60), EMBEDDINGS, 0.0, replace(SETTINGS, epochs=2), seed=0)
        for critic in (clean, stale)
    ]
    assert reports[0] == reports[1]


def test_normalisation_is_left_alone() -> None:
    critic = make_critic()
    critic.reward_mean.fill_(3.0)
    critic.reward_std.fill_(2.0)
    fit(critic, make_features(60), EMBEDDINGS, 0.0, replace(SETTINGS, epochs=2), seed=0)
    assert critic.reward_mean.tolist() == [3.0]
    assert critic.reward_std.tolist() == [2.0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"target": "td"}, "target is 'td'. Hint: known: decomposition, monte_carlo"),
        ({"held_out": 0.0}, "held_out is 0.0"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FitSettings(**setting)


def test_a_handful_of_rollouts_is_refused() -> None:
    with pytest.raises(ConfigError, match="there are 3 rollouts to fit to"):
        fit(make_critic(), make_features(3), EMBEDDINGS, 0.0, SETTINGS, seed=0)


@pytest.mark.parametrize("held_out", [0.01, 0.99])
def test_some_rollouts_are_held_out_and_some_are_trained_on_whatever_the_share(held_out: float) -> None:
    features = replace(make_features(4), rewards=torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    report = fit(make_critic(), features, EMBEDDINGS, 0.0, replace(SETTINGS, epochs=3, held_out=held_out), seed=0)
    assert len(set(report.losses)) == 4


def test_no_share_is_reported_if_the_held_out_returns_are_equal() -> None:
    features = make_features(20)
    report = fit(
        make_critic(),
        replace(features, rewards=torch.ones(20, 1)),
        EMBEDDINGS,
        0.0,
        replace(SETTINGS, epochs=1),
        seed=0,
    )
    assert report.explained == {"count": None}


# Heads that read λ


def make_conditioned(seed: int = 0) -> HiddenStateCritic:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = HiddenStateCritic(
            ["count"],
            Fingerprint("world", STATES, TOKENS, "none"),
            embedding_size=TOKENS,
            hidden=16,
            rank=TOKENS,
            composition="conditioned",
        )
    critic.refresh_token_table(EMBEDDINGS)
    return critic


def tilted_features(rollouts: int, seed: int) -> Features:
    """Draw token 0 at every step with odds e^λ, λ a new one for every response; a step's KL is then known.

    So Q(s_t, a; λ) = count + [a = 0] + (T − 1 − t) · p(λ) and K(s_t, a; λ) = (T − 1 − t) · KL(λ), exactly.
    """
    source = torch.Generator().manual_seed(seed)
    lam = torch.rand(rollouts, 1, generator=source) * 3
    probs = torch.cat([lam, torch.zeros(rollouts, 2)], dim=1).softmax(1)
    actions = torch.multinomial(probs, STEPS, replacement=True, generator=source)
    hits = (actions == 0).long()
    states = F.one_hot(torch.arange(STEPS) * STEPS + hits.cumsum(1) - hits, STATES).float()
    return Features(
        prompt_ids=torch.zeros(rollouts, 1, dtype=torch.long),
        is_prompt=torch.ones(rollouts, 1, dtype=torch.bool),
        states=states,
        action_ids=actions,
        expected=probs[:, None, :].expand(-1, STEPS, -1).contiguous(),
        kl=_step_kl(lam).expand(-1, STEPS).contiguous(),
        is_response=torch.ones(rollouts, STEPS, dtype=torch.bool),
        rewards=hits.sum(1, keepdim=True).float(),
        lam=lam,
        is_evaluated=torch.ones(rollouts, 1, dtype=torch.bool),
    )


def _step_kl(lam: Tensor) -> Tensor:
    logprobs = torch.cat([lam, torch.zeros(len(lam), 2)], dim=1).log_softmax(1)
    return (logprobs.exp() * (logprobs + torch.tensor(3.0).log())).sum(1, keepdim=True)


def test_heads_that_read_lambda_recover_the_values_and_the_kl_to_come_of_every_strength() -> None:
    critic = make_conditioned()
    report = fit(critic, tilted_features(3_000, 0), EMBEDDINGS, 5.0, SETTINGS, seed=0)  # ζ is not for them
    states = torch.eye(STATES)[[0, 3, 4, 8]]  # (step, count): (0, 0), (1, 0), (1, 1), (2, 2)
    steps, counts = torch.tensor([0, 1, 1, 2]), torch.tensor([0.0, 0.0, 1.0, 2.0])
    for strength in (0.3, 1.0, 2.5):
        lam = torch.full((4, 1), strength)
        inputs = critic.response_inputs(states[:, None])[:, 0]
        with torch.no_grad():
            found = critic.values_from_inputs(inputs, None, lam)[..., 0]
            spent = critic.kl_to_come_from_inputs(inputs, None, lam)
        often = float(torch.tensor([strength, 0.0, 0.0]).softmax(0)[0])
        expected = (counts + (STEPS - 1 - steps) * often)[:, None] + EMBEDDINGS[0]
        torch.testing.assert_close(found, expected, atol=0.15, rtol=0)
        to_come = (STEPS - 1 - steps)[:, None] * _step_kl(lam)
        torch.testing.assert_close(spent, to_come.expand(-1, TOKENS), atol=0.1, rtol=0)
    assert list(report.explained) == ["count"]


def test_rollouts_at_lambda_zero_teach_no_kl() -> None:
    """The reference policy spends none, so its rollouts leave the head for it where it was: at 0."""
    features = replace(make_features(100), lam=torch.zeros(100, 1))
    critic = make_conditioned()
    fit(critic, features, EMBEDDINGS, 0.0, replace(SETTINGS, epochs=2), seed=0)
    inputs = critic.response_inputs(features.states)[:, 0]
    with torch.no_grad():
        assert (critic.kl_to_come_from_inputs(inputs, None, torch.ones(100, 1)).abs() < 1e-6).all()


def test_a_memory_is_trained_with_the_heads() -> None:
    """States that show the last token only: earlier ones must be remembered."""
    features = make_features(600)
    before = F.pad(features.action_ids[:, :-1] + 1, (1, 0))  # 0 at the first step
    steps = torch.arange(STEPS).expand_as(before)
    blind = torch.cat([F.one_hot(before, TOKENS + 1), F.one_hot(steps, STATES - TOKENS - 1)], dim=-1).float()
    features = replace(features, states=blind)
    errors = {}
    for memory in (0, 16):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            critic = HiddenStateCritic(
                ["count"], Fingerprint("world", STATES, TOKENS, "none"), TOKENS, hidden=16, rank=TOKENS, memory=memory
            )
        errors[memory] = min(fit(critic, features, EMBEDDINGS, 0.0, SETTINGS, seed=0).losses)
    assert errors[16] < errors[0] / 5
