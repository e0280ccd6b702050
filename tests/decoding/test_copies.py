"""Copies and pickles of what is attached: they work, and are not attached."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mavis
from mavis.errors import CriticError
from tests.decoding.steps import KINDS, Inputs, tilt_for


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: list[Callable[[Any], Any]] = [copy.deepcopy, pickled, saved]


@pytest.fixture(params=WAYS, ids=["deepcopy", "pickle", "torch.save"])
def copied(request: pytest.FixtureRequest) -> Any:
    return request.param


def greedy(policy: Any, inputs: Inputs) -> torch.Tensor:
    ids: torch.Tensor = policy.generate(**inputs, do_sample=False, max_new_tokens=6)
    return ids


def test_a_copy_of_an_attached_policy_generates_plainly_and_the_original_is_still_steered(
    copied: Any, llama: Any, make_critic: Any, prompts: Inputs, kind: dict[str, Any]
) -> None:
    plain = greedy(llama, prompts)
    critic = make_critic(llama, **kind)
    weights: dict[str, Any] = {"weights": [1.0, 0.4], "beta": 1.5, "do_sample": False, "max_new_tokens": 6}
    with critic.attach(llama):
        steered = mavis.generate(llama, prompts, **weights)
        other = copied(llama)
        assert torch.equal(greedy(other, prompts), plain)
        with pytest.raises(CriticError, match="no critic is attached"):
            mavis.generate(other, prompts, **weights)
        assert torch.equal(mavis.generate(llama, prompts, **weights), steered)


def test_a_copy_of_an_attached_critic_is_detached_and_tilts_alike(
    copied: Any, llama: Any, make_critic: Any, prompts: Inputs, kind: dict[str, Any]
) -> None:
    critic = make_critic(llama, **kind)
    weights: dict[str, Any] = {"weights": [1.0, 0.4], "beta": 1.5, "do_sample": False, "max_new_tokens": 6}
    with critic.attach(llama):
        expected = mavis.generate(llama, prompts, **weights)
        other = copied(critic)
        assert critic.attached_policy is llama
    assert other.attached_policy is None
    assert torch.equal(mavis.generate(llama, prompts, critic=other, **weights), expected)


def test_a_copy_of_a_group_is_detached(copied: Any, llama: Any, make_critic: Any, prompts: Inputs) -> None:
    group = mavis.CriticGroup([make_critic(llama, ("a",)), make_critic(llama, ("b",), memory=4)])
    with group.attach(llama):
        expected = mavis.generate(llama, prompts, weights=[1.0, 0.4], critic=group, beta=1.5, do_sample=False)
        other = copied(group)
    assert other.attached_policy is None
    assert torch.equal(
        mavis.generate(llama, prompts, weights=[1.0, 0.4], critic=other, beta=1.5, do_sample=False), expected
    )


def test_a_copy_of_a_tilt_tilts_alike_once_its_critic_is_attached(
    copied: Any, llama: Any, make_critic: Any, prompts: Inputs
) -> None:
    critic = make_critic(llama, **KINDS["memory"])
    tilt = tilt_for(critic, record_kl=True)
    arguments: dict[str, Any] = {**prompts, "do_sample": False, "top_k": 0, "max_new_tokens": 6}
    with critic.attach(llama):
        expected = llama.generate(**arguments, logits_processor=tilt)
        other = copied(tilt)
    with pytest.raises(CriticError, match="not attached"):
        llama.generate(**arguments, logits_processor=other)
    with other.critic.attach(llama):
        assert torch.equal(llama.generate(**arguments, logits_processor=other), expected)
    assert torch.equal(other.kl, tilt.kl)
