"""Fitting a value model: its trunk learns with its heads, from tokens alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mavis.critics import ValueModelCritic
from mavis.errors import ConfigError
from mavis.policies.fingerprint import Fingerprint
from mavis.training.improvement.features import Features
from mavis.training.improvement.fit import FitSettings, fit
from tests.factories import llama_config

TOKENS, STEPS = 5, 4
EMBEDDINGS = torch.eye(TOKENS)
TRUNK = llama_config(vocab_size=TOKENS, intermediate_size=32, max_position_embeddings=16)
SETTINGS = FitSettings(epochs=8, batch_size=32, learning_rate=1e-2, trunk_rate=0.5, weight_decay=0.0)


def make_critic(readout: Any, **options: Any) -> ValueModelCritic:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        critic = ValueModelCritic(
            ("count",),
            Fingerprint("world", 1, TOKENS, "none"),
            TRUNK.to_dict(),
            readout,
            TOKENS,
            **({"hidden": 16, "rank": TOKENS} | options),
        )
    critic.refresh_token_table(EMBEDDINGS)
    return critic.eval()


def make_features(rollouts: int, seed: int = 0) -> Features:
    """Responses of tokens 0 to 3 to prompts of one or two tokens 4; the reward is how often token 0 was drawn."""
    source = torch.Generator().manual_seed(seed)
    actions = torch.randint(TOKENS - 1, (rollouts, STEPS), generator=source)
    is_prompt = torch.ones(rollouts, 2, dtype=torch.bool)
    is_prompt[::2, 0] = False
    return Features(
        prompt_ids=(TOKENS - 1) * is_prompt.long(),
        is_prompt=is_prompt,
        states=torch.zeros(rollouts, STEPS, 0),
        action_ids=actions,
        expected=torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0]).expand(rollouts, STEPS, -1),
        kl=torch.zeros(rollouts, STEPS),
        is_response=torch.ones(rollouts, STEPS, dtype=torch.bool),
        rewards=(actions == 0).sum(1, keepdim=True).float(),
        lam=torch.zeros(rollouts, 1),
        is_evaluated=torch.ones(rollouts, 1, dtype=torch.bool),
    )


def taken_values(critic: ValueModelCritic, features: Features) -> Tensor:
    """(N, T) what the critic predicts for the tokens that were taken."""
    ids = torch.cat([features.prompt_ids, features.action_ids], dim=1)
    is_token = torch.cat([features.is_prompt, features.is_response], dim=1)
    with torch.no_grad():
        inputs = critic.rollout_inputs(ids, is_token, features.states)
        values = critic.values_from_inputs(inputs.flatten(0, 1), features.action_ids.flatten()[:, None])
    return values.view(len(features), STEPS)


def true_values(features: Features) -> Tensor:
    so_far = (features.action_ids == 0).cumsum(1).float()
    return so_far + (STEPS - 1 - torch.arange(STEPS)) / 4


@pytest.mark.parametrize(
    ("readout", "target", "hidden"),
    [("token", "decomposition", 16), ("token", "monte_carlo", 16), ("candidates", "monte_carlo", 0)],
)
def test_trunk_and_heads_recover_the_values(readout: Any, target: Any, hidden: int) -> None:
    critic = make_critic(readout, hidden=hidden)
    fit(critic, make_features(1_500), EMBEDDINGS, 0.0, replace(SETTINGS, target=target), seed=0)
    unseen = make_features(200, seed=9)
    error = taken_values(critic, unseen) - true_values(unseen)
    # The values' own variance is 0.47; plain returns carry the noise of what is still to come.
    assert float(error.square().mean()) < (1e-3 if target == "decomposition" else 0.02)


def test_the_trunk_learns_at_its_own_rate() -> None:
    moved = {}
    for rate in (1e-6, 0.5):
        critic = make_critic("token")
        before = [parameter.detach().clone() for parameter in critic.trunk_parameters()]
        fit(critic, make_features(100), EMBEDDINGS, 0.0, replace(SETTINGS, epochs=1, trunk_rate=rate), seed=0)
        after = [parameter.detach() for parameter in critic.trunk_parameters()]
        moved[rate] = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
        assert not critic.training
    assert moved[1e-6] < 1e-5 < moved[0.5]


def test_of_a_trunk_with_adapters_these_alone_are_trained() -> None:
    """With a strong weight decay, which would move whatever the optimiser is given."""
    pytest.importorskip("peft")
    critic = make_critic("token", lora_rank=4)
    before = {name: parameter.detach().clone() for name, parameter in critic.named_parameters()}
    report = fit(critic, make_features(500), EMBEDDINGS, 0.0, replace(SETTINGS, weight_decay=0.5), seed=0)
    moved = {name for name, parameter in critic.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora_" in name or not name.startswith("trunk.")}
    assert min(report.losses) < 0.5 * report.losses[0]


def test_the_best_epoch_is_kept_of_the_adapters_too() -> None:
    pytest.importorskip("peft")
    critic = make_critic("token", lora_rank=4)
    before = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    far = replace(SETTINGS, epochs=1, learning_rate=100.0)
    assert fit(critic, make_features(100), EMBEDDINGS, 0.0, far, seed=0).epoch == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in critic.state_dict().items())


def test_decomposition_with_the_readout_candidates_is_refused() -> None:
    with pytest.raises(ConfigError, match="target is 'decomposition', but the readout 'candidates' would have to read"):
        fit(make_critic("candidates"), make_features(10), EMBEDDINGS, 0.0, SETTINGS, seed=0)
