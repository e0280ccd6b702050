"""Policies of several families, small and random, and critics with something to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from mavis import HiddenStateCritic
from mavis.critics import ValueModelCritic
from mavis.policies.state_capture import forward_states
from tests.decoding.steps import EITHER, KINDS
from tests.factories import NEVER_ENDING, llama_config

VOCABULARY = 40
TRUNK = Qwen2Config(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    initializer_range=0.3,
)
"""Of the value models, which are small and of another family than most policies."""


def build(family: str) -> Any:
    torch.manual_seed(len(family))
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    configs = {
        "llama": lambda: llama_config(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes, **NEVER_ENDING),
        "qwen2": lambda: Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes, **NEVER_ENDING),
        "gpt2": lambda: GPT2Config(
            vocab_size=VOCABULARY, n_layer=2, n_embd=32, n_head=4, n_positions=128, **NEVER_ENDING
        ),
    }
    policy = AutoModelForCausalLM.from_config(configs[family]()).eval().requires_grad_(False)
    with torch.no_grad():  # freshly drawn models are nearly uniform; sharper ones tell right from wrong
        for parameter in policy.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return policy


_policies = {family: build(family) for family in ("llama", "gpt2", "qwen2")}


@pytest.fixture(params=["llama", "gpt2", "qwen2"])
def policy(request: pytest.FixtureRequest) -> Any:
    """Each family in turn."""
    return _policies[request.param]


@pytest.fixture
def llama() -> Any:
    """One family, where the family does not matter."""
    return _policies["llama"]


@pytest.fixture
def make_critic() -> Callable[..., Any]:
    """Build a critic whose heads differ from objective to objective and from state to state.

    With `readout` it is a value model, else it reads the policy's hidden states.
    """

    def make(policy: Any, objectives: tuple[str, ...] = ("a", "b"), seed: int = 0, **options: Any) -> Any:
        kind: Any = ValueModelCritic if "readout" in options else HiddenStateCritic
        if kind is ValueModelCritic:
            options = {"backbone": TRUNK} | options
        critic = kind.for_policy(
            policy, objectives, **({"hidden": 16, "rank": 8, "composition": "independent", "seed": seed} | options)
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            critic.heads.outer.copy_(torch.randn(critic.heads.outer.shape, generator=generator))
            critic.heads.bias.copy_(torch.randn(critic.heads.bias.shape, generator=generator) * 0.3)
            if critic.heads.condition is not None:
                critic.heads.condition.copy_(torch.randn(critic.heads.condition.shape, generator=generator) * 0.5)
        return critic.eval()

    return make


@pytest.fixture
def prompts() -> dict[str, torch.Tensor]:
    """Three prompts of different length, padded on the left."""
    ids = torch.tensor([[0, 0, 1, 5, 9], [1, 7, 3, 3, 20], [0, 1, 30, 12, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    return {"input_ids": ids, "attention_mask": mask}


def _tilted_by_hand(
    policy: Any,
    critic: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    lam: list[float],
    top_k: int | None,
    temperature: float = 1.0,
    banned: tuple[int, ...] = (),
    prompt: int | None = None,
    reference: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write the step out for one unpadded prefix, from a forward pass without cache: log π, (V,).

    A critic that remembers needs the number of tokens in the prompt; `reference` stands in for the policy's scores.
    """
    with torch.no_grad():
        states, logits = forward_states(policy, input_ids=ids[mask.bool()][None], use_cache=False)
        scores = (logits[0, -1] if reference is None else reference).double() / temperature
        if isinstance(critic, ValueModelCritic):
            values, spent = _read_by_hand(critic, ids[mask.bool()], torch.tensor([lam]))
        else:
            states = states[:, -1 if prompt is None else prompt - 1 :]
            inputs, rows = critic.response_inputs(states)[:, -1], torch.tensor([lam])
            values = critic.values_from_inputs(inputs, None, rows if critic.conditioned else None)[0].double()
            spent = torch.zeros(())
            if critic.conditioned:
                spent = critic.kl_to_come_from_inputs(inputs, None, rows)[0].double()
    scores[list(banned)] = -torch.inf
    keep = scores.topk(top_k).indices if top_k else torch.arange(len(scores))
    tilted = torch.full_like(scores, -torch.inf)
    tilt = (values * torch.tensor(lam, dtype=torch.float64)).sum(-1) - spent
    tilted[keep] = scores[keep] + tilt[keep]
    return torch.log_softmax(tilted, 0)


def _read_by_hand(critic: ValueModelCritic, ids: torch.Tensor, lam: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a value model says of every next token, values (V, M) and KL to come (V,), from whole prefixes."""
    vocabulary = critic.fingerprint.vocab_size
    every = torch.arange(vocabulary)
    whole = torch.cat([ids.expand(vocabulary, -1), every[:, None]], dim=1)
    inputs = critic.rollout_inputs(whole, torch.ones_like(whole, dtype=torch.bool), torch.zeros(vocabulary, 1, 0))
    inputs, rows = inputs[:, 0], lam.expand(vocabulary, -1)
    values = critic.values_from_inputs(inputs, every[:, None], rows if critic.conditioned else None)[:, 0].double()
    if not critic.conditioned:
        return values, torch.zeros(())
    return values, critic.kl_to_come_from_inputs(inputs, every[:, None], rows)[:, 0].double()


@pytest.fixture
def tilted_by_hand() -> Callable[..., torch.Tensor]:
    """The function that writes a step out."""
    return _tilted_by_hand


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each kind of critic in turn."""
    return request.param


@pytest.fixture(params=[KINDS[name] for name in EITHER], ids=EITHER)
def either(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The least and the most that a critic reads."""
    return request.param
