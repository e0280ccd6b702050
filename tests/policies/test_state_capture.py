"""Hooks read the policy that they were put on, and no other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import mavis
from mavis.errors import DecodingError


@pytest.fixture
def policy() -> Any:
    return mavis.embedded.load()[0]


@pytest.fixture
def critic() -> mavis.Critic:
    return mavis.Critic.from_pretrained(mavis.embedded.critic_path())


IDS = torch.tensor([[1, 80, 90, 100]])


def changed_copy(policy: Any) -> Any:
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    return other


@torch.no_grad()
def test_the_passes_of_a_deep_copy_are_not_read(policy: Any, critic: mavis.Critic) -> None:
    tilt = mavis.MavisTilt({"positive": 1.0}, critic, beta=4.0)
    with critic.attach(policy):
        other = changed_copy(policy)
        scores = policy(IDS).logits[:, -1]
        expected = tilt(IDS, scores)
        other(IDS)  # with the copied hooks
        assert torch.equal(tilt(IDS, scores), expected)


@torch.no_grad()
def test_the_shared_output_embedding_of_a_copy_is_not_read_either(policy: Any, critic: mavis.Critic) -> None:
    tilt = mavis.MavisTilt({"positive": 1.0}, critic, beta=4.0)
    with critic.attach(policy):
        other = changed_copy(policy)
        scores = policy(IDS).logits[:, -1]
        expected = tilt(IDS, scores)
        other.get_output_embeddings()(torch.zeros(1, 4, policy.config.hidden_size))
        assert torch.equal(tilt(IDS, scores), expected)


def test_a_deep_copy_that_generates_under_the_tilt_is_refused(policy: Any, critic: mavis.Critic) -> None:
    tilt = mavis.MavisTilt({"positive": 1.0}, critic, beta=4.0)
    with critic.attach(policy):
        other = changed_copy(policy)
        with pytest.raises(DecodingError, match="no forward pass of its policy was captured in this thread"):
            other.generate(IDS, max_new_tokens=2, do_sample=False, logits_processor=tilt)
