"""Critics with random heads, of both compositions, with and without a memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mavis.critics import Calibration, HiddenStateCritic, ValueModelCritic


def build_critic(policy: Any, objectives: tuple[str, ...] = ("good", "brevity"), **options: Any) -> Any:
    """Build a critic whose tilts spread by about a nat at λ = 1; with a backbone it is a value model."""
    kind: Any = ValueModelCritic if "backbone" in options else HiddenStateCritic
    critic = kind.for_policy(policy, objectives, **({"hidden": 16, "rank": 8, "composition": "independent"} | options))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        critic.heads.outer.normal_(std=0.5)
        critic.heads.bias.normal_(std=0.2)
        if critic.heads.condition is not None:
            critic.heads.condition.normal_(std=0.5)
    return critic.eval().requires_grad_(False)


@pytest.fixture
def make_critic() -> Callable[..., Any]:
    """A function that builds a critic for a policy."""
    return build_critic


@pytest.fixture
def calibration() -> Calibration:
    """KL = β² / 2 along both objectives and their mean, measured with 5 candidates at T = 0.5."""
    betas = [0.5, 1.0, 2.0, 4.0]
    return Calibration(betas, [[beta**2 / 2 for beta in betas]] * 3, max_new_tokens=16, top_k=5, temperature=0.5)
