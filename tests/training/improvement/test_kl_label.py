"""What ζ is the price of: the KL to come, or the log-ratio of the whole response, as in the paper's code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from mavis.critics import HiddenStateCritic
from mavis.errors import ConfigError
from mavis.rollouts import RolloutSettings
from mavis.training import FitSettings, ImprovementSettings, improve
from mavis.training.improvement import stages

PROMPTS = ["once upon a time", "the dog", "she said", "the little old man ran", "he was"]
PAPER = ImprovementSettings(
    composition="independent",
    iterations=2,
    rollouts=24,
    reuse=False,
    beta=1.5,
    zeta=0.3,
    kl_label="whole_response",
    calibration_samples=0,
    sampling=RolloutSettings(max_new_tokens=8, top_k=20, shard_size=16),
    fit=FitSettings(epochs=1, batch_size=8, target="monte_carlo"),
)


@pytest.fixture
def critic(tiny_policy: Any) -> HiddenStateCritic:
    return HiddenStateCritic.for_policy(
        tiny_policy, ("good", "brevity"), hidden=8, rank=4, composition="independent", seed=0
    )


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, float]]:
    """The features and the ζ of every fit."""
    seen: list[tuple[Any, float]] = []
    original = stages.fit

    def watch(critic: Any, features: Any, embeddings: Any, zeta: float, *args: Any, **options: Any) -> Any:
        seen.append((features.local_rollouts, zeta))
        return original(critic, features, embeddings, zeta, *args, **options)

    monkeypatch.setattr(stages, "fit", watch)
    return seen


def test_labels_of_whole_responses_are_rewards_less_the_price_of_their_log_ratios(
    tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, critic: Any, fitted: Any, tmp_path: Path
) -> None:
    list(improve(tiny_policy, tiny_tokenizer, critic, tiny_objectives, PROMPTS, tmp_path, PAPER))
    for iteration, (features, zeta) in enumerate(fitted):
        folder = tmp_path / f"iteration-{iteration}" / "rollouts"
        shards = [datasets.load_from_disk(str(path)) for path in sorted(folder.glob("shard-*"))]
        assert ("log_ratio" in shards[0].column_names) is (iteration > 0)
        rewards = critic.normalise(torch.tensor([row for shard in shards for row in shard["rewards"]]).double())
        if iteration:  # no KL in the first, as in the paper's code
            log_ratio = torch.tensor([ratio for shard in shards for ratio in shard["log_ratio"]])
            assert float(log_ratio.abs().max()) > 0.1
            rewards = rewards - 0.3 * log_ratio[:, None]
        torch.testing.assert_close(features.rewards, rewards.float(), rtol=1e-5, atol=1e-5)
        assert zeta == 0.0  # so that the KL still to come is not counted in addition


def test_labels_are_of_the_kl_to_come_by_default(
    tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, critic: Any, fitted: Any, tmp_path: Path
) -> None:
    settings = replace(PAPER, kl_label="to_come", zeta=None)
    list(improve(tiny_policy, tiny_tokenizer, critic, tiny_objectives, PROMPTS, tmp_path, settings))
    assert [zeta for _, zeta in fitted] == [1 / 1.5] * 2


class Other:
    """A sampler that records no log-ratios."""

    name = "other"

    def check(self, policy: Any, critic: Any) -> None:
        pass


def test_a_sampler_that_records_no_log_ratios_is_refused_before_sampling(
    tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, critic: Any, tmp_path: Path
) -> None:
    steps = improve(
        *(tiny_policy, tiny_tokenizer, critic, tiny_objectives, PROMPTS, tmp_path, PAPER),
        sampler=Other(),  # type: ignore[arg-type]
    )
    with pytest.raises(ConfigError, match="'whole_response', but the sampler 'other' does not record log-ratios. Hint"):
        next(steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_label": "whole"}, "kl_label is 'whole'. Hint: known: to_come, whole_response"),
        ({"composition": "conditioned", "zeta": None}, "'whole_response', but composition is 'conditioned'"),
        ({"fit": FitSettings()}, "the fit's target 'decomposition'. Hint: choose independent and monte_carlo"),
        ({"zeta": None}, "zeta is None, expected a number below 1/beta = 0.666667. Hint: the paper's code takes"),
        ({"zeta": 1 / 1.5}, "zeta is 0.66.*, expected a number below 1/beta"),
    ],
)
def test_labels_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(PAPER, **changes)
