"""The fused forward pass computes the same states as the trunk's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mavis.critics.trunk.fused import FusedTrunk
from mavis.critics.trunk.kv_cache import PrefixCache, prefix_mask
from mavis.critics.trunk.lora import add_lora

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


def masks_of(trunk: Any, is_token: Tensor, new: int, candidates: int, dtype: torch.dtype) -> dict[str, Tensor]:
    window = getattr(trunk.config, "sliding_window", None)
    kinds = getattr(trunk.config, "layer_types", None)
    windows = {kind: window if kind == MIXED[0] else None for kind in kinds} if kinds else {"": window}
    return {kind: prefix_mask(is_token, new, candidates, some, dtype) for kind, some in windows.items()}


def inputs(at: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids of two prefixes and of candidates after them, which are tokens (the second begins later), and positions."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (2, LENGTH + CANDIDATES), generator=generator)
    is_token = torch.arange(LENGTH) >= torch.tensor([[0], [2]])
    places = (is_token.cumsum(1) - 1).clamp(min=0)
    ends = (places[:, -1:] + 1).expand(-1, CANDIDATES)
    return ids, is_token, torch.cat([places, ends], dim=1) + at


CLOSE = {"rtol": 0, "atol": 2e-5}  # norms and angles are in single precision in the trunk's own
ForwardPass = Callable[[Tensor, dict[str, Tensor], Tensor, Any, int], Tensor]


def own(trunk: Any) -> ForwardPass:
    """The trunk's own forward pass."""
    return lambda ids, masks, positions, cache, end: trunk(
        input_ids=ids, attention_mask=masks.get("", masks), position_ids=positions, past_key_values=cache
    )[0]


@torch.no_grad()
def states(trunk: Any, forward: ForwardPass, at: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Read a beginning, then a token, then the rest together with candidates, from some position on."""
    ids, is_token, positions = inputs(at)
    cache, read = PrefixCache(), []
    for start, end in ((0, 4), (4, 5), (5, LENGTH)):
        candidates = CANDIDATES if end == LENGTH else 0
        last = end + candidates
        masks = masks_of(trunk, is_token[:, :end], end - start, candidates, dtype)
        read.append(forward(ids[:, start:last], masks, positions[:, start:last], cache, at + LENGTH + 1))
        cache.set_length(end)
    return torch.cat(read, dim=1)


@pytest.mark.parametrize("name", TRUNKS)
def test_states_equal_those_of_the_trunks_own_forward_pass(name: str) -> None:
    trunk = TRUNKS[name]()
    before = {name: (weight, weight.detach().clone(), weight.stride()) for name, weight in trunk.named_parameters()}
    expected = states(trunk, own(trunk))
    assert float(expected.std()) > 0.1
    assert FusedTrunk.supports(trunk)
    torch.testing.assert_close(states(trunk, FusedTrunk(trunk)), expected, **CLOSE)
    for weight, (same, values, stride) in zip(trunk.parameters(), before.values(), strict=True):
        assert weight is same
        assert torch.equal(weight, values)
        assert weight.stride() == stride


class Operations(TorchDispatchMode):
    """Counts operations, without views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TRUNKS)
def test_a_step_takes_less_than_half_the_operations(name: str) -> None:
    trunk = TRUNKS[name]()
    counts = []
    for forward in (FusedTrunk(trunk), own(trunk)):
        states(trunk, forward)  # fills the table of angles
        cache, masks = PrefixCache(), masks_of(trunk, torch.ones(2, 1, dtype=torch.bool), 1, 0, torch.float64)
        with torch.inference_mode(), Operations() as operations:
            forward(inputs()[0][:, :1], masks, torch.zeros(2, 1, dtype=torch.long), cache, 1)
        counts.append(operations.count)
    assert counts[0] < counts[1] / 2


@pytest.mark.parametrize("name", ["Llama", "Llama, angles of Llama 3", "Llama, angles of YaRN"])
def test_table_of_angles_grows_with_the_sequence(name: str) -> None:
    trunk = TRUNKS[name]()
    fused = FusedTrunk(trunk)
    for at in (0, 1000, 20, 3000):
        torch.testing.assert_close(states(trunk, fused, at), states(trunk, own(trunk), at), **CLOSE)


def test_number_of_layers_follows_the_config() -> None:
    trunk = build("Llama")
    whole = states(trunk, own(trunk))
    trunk.config.num_hidden_layers = 1
    expected = states(trunk, own(trunk))
    assert not torch.allclose(expected, whole)
    torch.testing.assert_close(states(trunk, FusedTrunk(trunk)), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_in_low_precision_is_that_of_the_trunk(dtype: torch.dtype) -> None:
    exact = states(build("Qwen3"), own(build("Qwen3")))
    trunk = build("Qwen3").to(dtype)

    def error(forward: ForwardPass) -> float:
        return float((states(trunk, forward, dtype=dtype) - exact).square().mean())

    assert error(FusedTrunk(trunk)) < 2 * error(own(trunk))


class Other(nn.Linear):
    """A linear layer of another class."""


def with_a_hook(trunk: Any) -> None:
    trunk.layers[0].register_forward_hook(lambda *_: None)


def with_another_forward(trunk: Any) -> None:
    trunk.layers[1].mlp.forward = lambda states: states


def with_another_layer(trunk: Any) -> None:
    trunk.layers[1].mlp.up_proj = Other(24, 20).double()


def with_another_part(trunk: Any) -> None:
    trunk.layers[1].mlp = nn.Linear(24, 24).double()


def with_another_norm(trunk: Any) -> None:
    trunk.norm = nn.LayerNorm(24).double()


def with_another_activation(trunk: Any) -> None:
    trunk.layers[0].mlp.act_fn = nn.GELU()


def with_a_bound_on_its_embedding(trunk: Any) -> None:
    trunk.embed_tokens.max_norm = 1.0


def with_a_bias_for_queries_alone(trunk: Any) -> None:
    trunk.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.zeros(24).double())


def with_another_precision(trunk: Any) -> None:
    trunk.layers[0].mlp.float()


def with_an_adapter(trunk: Any) -> None:
    pytest.importorskip("peft")
    add_lora(trunk, 2)


@pytest.mark.parametrize(
    "change",
    [
        with_a_hook, with_another_forward, with_another_layer, with_another_part, with_another_norm,
        with_another_activation, with_a_bound_on_its_embedding, with_a_bias_for_queries_alone, with_another_precision,
        with_an_adapter,
    ],
)  # fmt: skip
def test_modified_trunks_are_not_supported(change: Callable[[Any], Any]) -> None:
    trunk = build("Llama")
    assert FusedTrunk.supports(trunk)
    change(trunk)
    assert not FusedTrunk.supports(trunk)


class LlamaModel(transformers.LlamaModel):
    """A Llama by its name only."""


STRANGERS: dict[str, Callable[[], Any]] = {
    "another family": lambda: build("Gemma2"),
    "a subclass": lambda: LlamaModel(build("Llama").config),
    "another activation": lambda: build("Llama", hidden_act="gelu"),
    "biases after attention": lambda: build("Llama", attention_bias=True),
    "biases in the feed-forward part": lambda: build("Llama", mlp_bias=True),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_other_architectures_are_not_supported(name: str) -> None:
    assert not FusedTrunk.supports(STRANGERS[name]())


def test_large_trunks_are_not_supported() -> None:
    config = build("Llama").config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 1024, 4096, 11
    with torch.device("meta"):
        assert not FusedTrunk.supports(transformers.LlamaModel(config))
        config.num_hidden_layers = 10
        assert FusedTrunk.supports(transformers.LlamaModel(config))
