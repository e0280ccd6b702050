"""Static caches and compilers: what is compiled is tilted as what is not, or refused."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from mavis.errors import DecodingError
from tests.decoding.steps import ByHand, Inputs, MakeCritic, Seen, expect_tilted, processed, tilt_for


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_a_static_cache_is_as_good_as_any(
    policy: Any,
    make_critic: MakeCritic,
    tilted_by_hand: ByHand,
    prompts: Inputs,
    either: dict[str, Any],
    arguments: dict[str, Any],
) -> None:
    critic = make_critic(policy, **either)
    one = {"input_ids": torch.tensor([[6]]), "attention_mask": torch.ones(1, 1).long()}
    with critic.attach(policy):
        for inputs in (prompts, one, prompts):
            seen = processed(policy, inputs, tilt_for(critic), cache_implementation="static", **arguments)
            expect_tilted(tilted_by_hand, policy, critic, seen, inputs)


def test_padding_is_told_by_a_static_caches_mask_too(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs
) -> None:
    critic = make_critic(llama, memory=8)
    ids = torch.tensor([[0, 4, 5], [0, 4, 5]])  # in the second row the first is padding
    alike = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    right = {name: tensor.flip(1) for name, tensor in prompts.items()}
    with critic.attach(llama):
        seen = processed(llama, alike, tilt_for(critic), cache_implementation="static", num_beams=3)
        expect_tilted(tilted_by_hand, llama, critic, seen, alike)
        with pytest.raises(DecodingError, match="padded on the right"):
            processed(llama, right, tilt_for(critic), cache_implementation="static")


@pytest.fixture
def compilers() -> Iterator[None]:
    """Compiled code that does not outlive a test."""
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers about themselves
        yield
    torch.compiler.reset()


def auto_compiled(policy: Any, **options: Any) -> dict[str, Any]:
    """What makes `generate` compile the decoding steps, as it does by itself with a static cache on an accelerator."""
    config = CompileConfig(backend="eager", mode=None, **options)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def compiled_in_place(policy: Any) -> dict[str, Any]:
    policy.compile(backend="eager")
    return {}


def compiled_forward(policy: Any) -> dict[str, Any]:
    policy.forward = torch.compile(policy.forward, backend="eager")
    return {}


def compiled_inside(policy: Any) -> dict[str, Any]:
    policy.model.compile(backend="eager")
    return {}


COMPILERS = [auto_compiled, compiled_in_place, compiled_forward, compiled_inside]


@pytest.mark.slow
@pytest.mark.usefixtures("compilers")
@pytest.mark.parametrize("compiled", COMPILERS)
def test_compiled_passes_are_seen_by_a_critic_that_was_attached_before(
    llama: Any,
    make_critic: MakeCritic,
    tilted_by_hand: ByHand,
    prompts: Inputs,
    compiled: Callable[..., dict[str, Any]],
) -> None:
    """Also in a thread that came after the compiler."""
    policy = copy.deepcopy(llama)
    critic = make_critic(policy, memory=8, composition="conditioned")
    with critic.attach(policy):
        arguments = compiled(policy)
        results: list[Seen] = []

        def run() -> None:
            results.append(processed(policy, prompts, tilt_for(critic), max_new_tokens=3, **arguments))

        run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(results) == 2
    for seen in results:
        expect_tilted(tilted_by_hand, llama, critic, seen, prompts)


@pytest.mark.slow
@pytest.mark.usefixtures("compilers")
@pytest.mark.parametrize("compiled", COMPILERS)
def test_compiled_passes_are_seen_or_refused_by_a_critic_that_is_attached_later(
    llama: Any,
    make_critic: MakeCritic,
    tilted_by_hand: ByHand,
    prompts: Inputs,
    compiled: Callable[..., dict[str, Any]],
) -> None:
    """Also one whose forerunner's hooks were compiled in."""
    policy = copy.deepcopy(llama)
    arguments = compiled(policy)
    policy.generate(**prompts, do_sample=False, max_new_tokens=4, **arguments)
    refusals = []
    for seed in range(2):
        critic = make_critic(policy, seed=seed)
        with critic.attach(policy):
            try:
                seen = processed(policy, prompts, tilt_for(critic), max_new_tokens=3, **arguments)
            except DecodingError as error:
                refusals.append(str(error))
            else:
                expect_tilted(tilted_by_hand, llama, critic, seen, prompts)
    assert all("before" in refusal and "compil" in refusal for refusal in refusals)


@pytest.mark.usefixtures("compilers")
def test_a_compiled_wrapper_is_the_policy_inside(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs
) -> None:
    policy = torch.compile(copy.deepcopy(llama), backend="eager")
    critic = make_critic(policy, memory=8)
    with critic.attach(policy):
        expect_tilted(tilted_by_hand, llama, critic, processed(policy, prompts, tilt_for(critic)), prompts)


@pytest.mark.usefixtures("compilers")
def test_a_graph_that_may_not_be_broken_is_refused(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    policy = copy.deepcopy(llama)
    critic = make_critic(policy)
    with critic.attach(policy), pytest.raises(Exception, match="reads the hidden states.*compile with fullgraph=False"):
        processed(policy, prompts, tilt_for(critic), **auto_compiled(policy, fullgraph=True))
