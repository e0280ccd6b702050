"""A prefix reader notices changes of its trunk's weights, and fuses what it can."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mavis.critics.trunk import reader as prefix_reader
from mavis.critics.trunk.reader import PrefixReader
from tests.critics.trunk.reading import (
    FAMILIES,
    assert_same,
    build,
    candidates_for,
    fresh_reader,
    longer,
    prompts,
    read_from_scratch,
)


@pytest.mark.parametrize("family", ["Llama", "GPT-NeoX"])
def test_weights_are_transposed_in_memory_and_keep_values_and_identity(family: str) -> None:
    trunk = FAMILIES[family]()
    before = {name: (weight, weight.clone()) for name, weight in trunk.named_parameters()}
    PrefixReader(trunk)
    for name, weight in trunk.named_parameters():
        same, values = before[name]
        assert weight is same
        assert torch.equal(weight, values)
        assert weight.dim() < 2 or weight.t().is_contiguous() == ("embed" not in name), name


@pytest.mark.parametrize("family", FAMILIES)
def test_known_families_are_fused(family: str) -> None:
    known = family.startswith(("Llama", "Qwen", "Mistral")) and family != "Llama, every layer with biases"
    assert (fresh_reader(family)._fused is not None) == known


def test_patched_trunk_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk, call = build("Llama"), prompts(0, 3)
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda norm, states: 2 * norm.weight * states)
    reader = PrefixReader(trunk)
    assert reader._fused is None
    assert_same(reader.read(*call), read_from_scratch(trunk, *call, candidates_for(call))[0])
    assert reader._fused is None


def one_weights_data(trunk: Any) -> None:
    weight = trunk.layers[1].self_attn.k_proj.weight
    weight.data = weight.data * 1.5


def one_parameter(trunk: Any) -> None:
    attention = trunk.layers[1].self_attn
    attention.k_proj.weight = nn.Parameter(attention.k_proj.weight.detach() * 1.5)


def every_parameter(trunk: Any) -> None:
    trunk.load_state_dict(build("Llama", seed=1).state_dict(), assign=True)


def precision(trunk: Any) -> None:
    trunk.double()


@pytest.mark.parametrize("change", [one_weights_data, one_parameter, every_parameter, precision])
def test_replaced_weights_are_used(change: Callable[[Any], None]) -> None:
    reader, call = PrefixReader(build("Llama")), prompts(0, 3)
    trunk = reader._trunk
    reader.read(*call)
    change(trunk)
    for _ in range(2):
        call = longer(call)
        expected = read_from_scratch(trunk, *call, candidates_for(call))
        assert_same(reader.read(*call), expected[0])
        assert_same(reader.read(*call, candidates_for(call)), expected[1])
        assert reader._fused is not None
        with torch.no_grad():
            trunk.layers[0].mlp.gate_proj.weight.mul_(1.1)


def test_hooks_on_a_trunk_take_effect_with_the_next_prefixes() -> None:
    reader, fired = PrefixReader(build("Llama")), []
    reader.read(*prompts(0, 3))
    hook = reader._trunk.layers[0].register_forward_hook(lambda *_: fired.append(True))
    for fused in (False, True):
        reader.release()
        reader.read(*prompts(0, 3))
        assert (reader._fused is not None) == fused
        assert len(fired) == 1
        hook.remove()


def test_threads_that_find_new_weights_concurrently_use_them() -> None:
    reader, calls = PrefixReader(build("Llama")), [prompts(0, n % 4, seed=n) for n in range(8)]
    for change in (1.1, 0.9, 1.2):
        with torch.no_grad():
            for weight in reader._trunk.parameters():
                weight.data = weight.data * change
        with ThreadPoolExecutor(max_workers=8) as threads:
            states = list(threads.map(lambda call: reader.read(*call), calls))
        for call, ends in zip(calls, states, strict=True):
            assert_same(ends, read_from_scratch(reader._trunk, *call, candidates_for(call))[0])


def test_trunk_in_use_can_be_saved_and_trained(tmp_path: Path) -> None:
    trunk, call = build("Qwen2"), prompts(0, 3)
    with torch.inference_mode():
        PrefixReader(trunk).read(*call)
    trunk.save_pretrained(tmp_path)
    stored = transformers.Qwen2Model.from_pretrained(tmp_path)
    for one, other in zip(trunk.parameters(), stored.parameters(), strict=True):
        assert torch.equal(one, other)
    for model in (trunk, stored):
        model(input_ids=call[0]).last_hidden_state.square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1, fused=True).step()  # iterates over memory
    for one, other in zip(trunk.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_uses_the_trunks_own_forward_pass() -> None:
    reader, call = PrefixReader(build("Llama")), prompts(0, 3)
    own = PrefixReader(build("Llama"))
    own._allow_fused = False
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reader.read(*call), own.read(*call))
    assert (reader._fused is None, own._fused is None) == (False, True)


def test_out_of_memory_falls_back_to_the_trunks_own_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(prefix_reader.FusedTrunk, "__init__", full)
    reader, call = PrefixReader(build("Llama")), prompts(0, 3)
    assert_same(reader.read(*call), read_from_scratch(reader._trunk, *call, candidates_for(call))[0])
    assert reader._fused is None


def test_writes_through_data_take_effect_once_the_cache_is_released() -> None:
    reader, call = PrefixReader(build("Llama")), prompts(0, 3)
    reader.read(*call)
    for weight in reader._trunk.parameters():
        weight.data.mul_(1.1)
    reader.release()
    assert_same(reader.read(*call), read_from_scratch(reader._trunk, *call, candidates_for(call))[0])


def test_trunk_of_inference_mode_uses_its_current_weights() -> None:
    with torch.inference_mode():
        reader, call = PrefixReader(build("Llama")), prompts(0, 3)
        for seed in (0, 1):
            reader._trunk.load_state_dict(build("Llama", seed=seed).state_dict())
            reader.release()
            assert_same(reader.read(*call), read_from_scratch(reader._trunk, *call, candidates_for(call))[0])
    assert reader._fused is None
