"""A tiny random policy, its tokenizer, objectives and critics, for every test that needs a causal LM."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: no test asks the hub, with or without a network

import pytest
import torch
from hypothesis import HealthCheck, settings

from mavis.critics import HiddenStateCritic
from tests.factories import word_policy, word_tokenizer

# So small a policy is slower with two threads, and one thread always adds in the same order.
torch.set_num_threads(1)
# A property is true or not on a busy machine too: no example has to be drawn or checked within some time.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Words of a small vocabulary, split at spaces; pads on the left and adds no token of its own."""
    return word_tokenizer()


@pytest.fixture(scope="session")
def tiny_policy() -> Iterator[Any]:
    """A random Llama; at the end of the run it must be what it was, with no hook left on it."""
    policy = word_policy()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    generation = policy.generation_config.to_dict()
    yield policy
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert policy.generation_config.to_dict() == generation
    assert not hooks_on(policy)


@pytest.fixture(scope="session")
def make_other_policy() -> Callable[[], Any]:
    """A function that builds a policy of the tiny policy's shape with other weights, to do with as one likes."""
    return lambda: word_policy(seed=1)


def hooks_on(policy: Any) -> list[Any]:
    """List the forward hooks that are on any module of a policy."""
    return [
        hook
        for module in policy.modules()
        for hook in [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    ]


@pytest.fixture(scope="session")
def tiny_folder(tiny_policy: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny policy and its tokenizer, in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("tiny") / "policy"
    tiny_policy.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_objectives() -> dict[str, Any]:
    """Two objectives on words: how often "good" is said, and how little is said."""

    def good(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float(response.split().count("good")) for response in responses]

    def brevity(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [-float(len(response.split())) for response in responses]

    # Other tests' functions that score the same resume the same runs.
    good.version = brevity.version = "tiny"  # type: ignore[attr-defined]
    return {"good": good, "brevity": brevity}


@pytest.fixture
def make_tiny_critic(tiny_policy: Any) -> Callable[..., HiddenStateCritic]:
    """A function that builds a critic of the tiny policy with random heads, whose values spread by about `scale`."""

    def make(*objectives: str, scale: float = 1.0, seed: int = 0) -> HiddenStateCritic:
        names = objectives or ("good", "brevity")
        critic = HiddenStateCritic.for_policy(
            tiny_policy, list(names), hidden=16, rank=8, composition="independent", seed=seed
        )
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            critic.heads.outer.normal_(std=0.4 * scale)
            critic.heads.bias.normal_(std=0.1 * scale)
        return critic.eval()

    return make
