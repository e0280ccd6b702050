"""A trunk's forward pass in few operations is the trunk's own forward pass, weight for weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from mavis.critics.fused_trunk import FusedTrunk, side_by_side
from mavis.critics.lora import add_lora
from mavis.critics.prefix_cache import PrefixCache, prefix_mask

VOCABULARY, LENGTH, CANDIDATES = 31, 7, 3
MIXED = ["sliding_attention", "full_attention"]


def build(family: str, **settings: Any) -> Any:
    """Build a trunk in double precision in which every weight matters, norms and biases among them."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **{"num_key_value_heads": 2, "head_dim": 6} | settings,
    )  # fmt: skip
    trunk = getattr(transformers, f"{family}Model")(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in trunk.named_parameters():
        weight.data.normal_(generator=generator).mul_(0.5).add_("norm" in name)
    return trunk


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **settings}}


TRUNKS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: build("Llama"),
    "Llama, keys of every head": lambda: build("Llama", num_key_value_heads=4),
    "Llama, keys of one head": lambda: build("Llama", num_key_value_heads=1),
    "Llama, heads wider than the state": lambda: build("Llama", head_dim=10),
    "Llama, linear angles": lambda: build("Llama", **rope("linear", factor=4.0)),
    "Llama, angles of Llama 3": lambda: build(
        "Llama", **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                        original_max_position_embeddings=64),
    ),
    "Llama, angles of YaRN": lambda: build(
        "Llama", **rope("yarn", factor=4.0, original_max_position_embeddings=64)
    ),
    "Mistral": lambda: build("Mistral", sliding_window=None),
    "Mistral with a window": lambda: build("Mistral", sliding_window=3),
    "Qwen2": lambda: build("Qwen2"),
    "Qwen2, one layer with a window": lambda: build(
        "Qwen2", use_sliding_window=True, sliding_window=3, layer_types=MIXED
    ),
    "Qwen3": lambda: build("Qwen3"),
}  # fmt: skip


def masks_of(trunk: Any, is_token: Tensor, new: int, candidates: int) -> dict[str, Tensor]:
    window = getattr(trunk.config, "sliding_window", None)
    kinds = getattr(trunk.config, "layer_types", None)
    windows = {kind: window if kind == MIXED[0] else None for kind in kinds} if kinds else {"": window}
    return {kind: prefix_mask(is_token, new, candidates, some, torch.float64) for kind, some in windows.items()}


def inputs(at: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two prefixes, the second padded by two, with candidates, whose tokens and positions come last."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (2, LENGTH + CANDIDATES), generator=generator)
    is_token = torch.arange(LENGTH) >= torch.tensor([[0], [2]])
    places = (is_token.cumsum(1) - 1).clamp(min=0)
    ends = (places[:, -1:] + 1).expand(-1, CANDIDATES)
    return ids, is_token, torch.cat([places, ends], dim=1) + at, places[:, -1:]


Forward = Callable[[Tensor, dict[str, Tensor], Tensor, Any, int], Tensor]


def own(trunk: Any) -> Forward:
    """The trunk's own forward pass."""
    return lambda ids, masks, positions, cache, end: trunk(
        input_ids=ids, attention_mask=masks.get("", masks), position_ids=positions, past_key_values=cache
    )[0]


@torch.no_grad()
def states(trunk: Any, forward: Forward, at: int = 0) -> Tensor:
    """Read a beginning, then a token, then the rest together with candidates, from some position on."""
    ids, is_token, positions, _ = inputs(at)
    cache, read = PrefixCache(), []
    for start, end in ((0, 4), (4, 5), (5, LENGTH)):
        candidates = CANDIDATES if end == LENGTH else 0
        last = end + candidates
        masks = masks_of(trunk, is_token[:, :end], end - start, candidates)
        read.append(forward(ids[:, start:last], masks, positions[:, start:last], cache, at + LENGTH + 1))
        cache.keep(end)
    return torch.cat(read, dim=1)


@pytest.mark.parametrize("name", TRUNKS)
def test_its_states_are_those_of_the_trunks_own_forward_pass(name: str) -> None:
    trunk = TRUNKS[name]()
    expected = states(trunk, own(trunk))
    assert FusedTrunk.understands(trunk)
    fused = FusedTrunk(trunk)
    actual = states(trunk, fused)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)  # angles are single precision in both
    torch.testing.assert_close(states(trunk, own(trunk)), expected, rtol=0, atol=1e-12)  # the trunk is what it was
    again = FusedTrunk(trunk)
    assert again.stands()
    assert fused.stands()  # nothing was laid out anew
    assert torch.equal(states(trunk, again), actual)


def test_angles_are_found_however_far_a_sequence_goes() -> None:
    trunk = build("Llama")
    fused = FusedTrunk(trunk)
    for at in (0, 300, 20, 1000):
        torch.testing.assert_close(states(trunk, fused, at), states(trunk, own(trunk), at), rtol=0, atol=1e-5)


def test_weights_stay_the_trunks_own_and_are_followed_when_they_change_in_place() -> None:
    trunk = build("Qwen3", attention_bias=False)
    before = {name: (weight, weight.detach().clone()) for name, weight in trunk.named_parameters()}
    fused = FusedTrunk(trunk)
    for name, weight in trunk.named_parameters():
        assert weight is before[name][0]
        assert torch.equal(weight, before[name][1])
    with torch.no_grad():
        for weight in trunk.parameters():
            weight.mul_(1.1)
    assert fused.stands()
    torch.testing.assert_close(states(trunk, fused), states(trunk, own(trunk)), rtol=0, atol=1e-5)


def test_it_learns_as_it_would_have() -> None:
    """Gradients of weights that are parts of one matrix are those of weights that are not."""
    plain, laid_out = build("Qwen2"), build("Qwen2")
    FusedTrunk(laid_out)
    for trunk in (plain, laid_out):
        trunk(input_ids=inputs()[0]).last_hidden_state.square().sum().backward()
    for one, other in zip(plain.parameters(), laid_out.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def with_data_moved(trunk: Any) -> None:
    weight = trunk.layers[1].mlp.up_proj.weight
    weight.data = weight.data.clone()


def with_another_parameter(trunk: Any) -> None:
    trunk.layers[0].input_layernorm.weight = nn.Parameter(trunk.norm.weight.detach().clone())


@pytest.mark.parametrize("change", [with_data_moved, with_another_parameter, lambda trunk: trunk.float()])
def test_it_tells_when_weights_have_been_replaced(change: Callable[[Any], Any]) -> None:
    trunk = build("Llama")
    fused = FusedTrunk(trunk)
    assert fused.stands()
    change(trunk)
    assert not fused.stands()
    assert FusedTrunk(trunk).stands()


class Other(nn.Linear):
    """A linear layer of another class."""


def with_a_hook(trunk: Any) -> None:
    trunk.layers[0].register_forward_hook(lambda *_: None)


def with_another_forward(trunk: Any) -> None:
    trunk.layers[1].mlp.forward = lambda states: states


def with_another_layer(trunk: Any) -> None:
    trunk.layers[1].mlp.up_proj = Other(24, 20)


STRANGERS: dict[str, Callable[[], Any]] = {
    "another family": lambda: build("Gemma2"),
    "a class of one's own": lambda: type("LlamaModel", (type(build("Llama")),), {})(build("Llama").config),
    "another activation": lambda: build("Llama", hidden_act="gelu"),
    "biases after attention": lambda: build("Llama", attention_bias=True),
    "biases in the feed-forward part": lambda: build("Llama", mlp_bias=True),
}
CHANGES = [with_a_hook, with_another_forward, with_another_layer, lambda trunk: add_lora(trunk, 2)]


@pytest.mark.parametrize("name", STRANGERS)
def test_it_does_not_understand_other_architectures(name: str) -> None:
    assert not FusedTrunk.understands(STRANGERS[name]())


@pytest.mark.parametrize("change", CHANGES)
def test_it_does_not_understand_what_has_been_changed(change: Callable[[Any], Any]) -> None:
    if change is CHANGES[-1]:
        pytest.importorskip("peft")
    trunk = build("Llama")
    change(trunk)
    assert not FusedTrunk.understands(trunk)


def test_tensors_become_parts_of_one_without_a_change() -> None:
    weights = [nn.Parameter(torch.randn(size, 5)) for size in (3, 4, 2)]
    expected = torch.cat([weight.detach() for weight in weights])
    whole = side_by_side(weights)
    assert torch.equal(whole, expected)
    assert torch.equal(torch.cat(list(weights)), expected)
    assert whole.t().is_contiguous()  # input by input
    assert side_by_side(weights).data_ptr() == whole.data_ptr()  # the second time nothing is moved
    with torch.no_grad():
        weights[1].zero_()
    assert torch.equal(whole[3:7], torch.zeros(4, 5))
    biases = [nn.Parameter(torch.randn(size)) for size in (3, 1)]
    expected = torch.cat([bias.detach() for bias in biases])
    assert torch.equal(side_by_side(biases), expected)


def test_parts_in_another_order_are_not_taken_for_the_whole() -> None:
    weights = [nn.Parameter(torch.randn(3, 5)) for _ in range(2)]
    side_by_side(weights)
    expected = torch.cat([weight.detach() for weight in weights[::-1]])
    assert torch.equal(side_by_side(weights[::-1]), expected)


def test_it_is_made_for_training_too_where_inference_mode_is_on() -> None:
    trunk = build("Llama")
    with torch.inference_mode():
        FusedTrunk(trunk)
    trunk(input_ids=inputs()[0]).last_hidden_state.sum().backward()
    assert all(weight.grad is not None for weight in trunk.parameters())
