"""The forward pass of a Llama-like trunk in a third of the operations, for a decoding step's few positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

_UNDERSTOOD = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}


class FusedTrunk:
    """Computes the last hidden states of a Llama, Mistral, Qwen2 or Qwen3 with a cache, as its own forward pass does.

        x ← x + W_o attention(rope(W_qkv n(x)))
        x ← x + W_down (silu(g) ∘ u),  (g, u) = W_gate,up n(x)

    with n an RMS norm. One position of a small model is so little work that each operation costs its call. So layers
    that read the same are one product: their weights stay the trunk's parameters, but become parts of one matrix, which
    is read input by input on the CPU; and angles are looked up.

    Args:
        trunk: for which `understands` is true.
    """

    def __init__(self, trunk: Any) -> None:
        config, first = trunk.config, trunk.layers[0].self_attn
        self._rotary = trunk.rotary_emb
        self._embedding, self._norm, self._eps = trunk.embed_tokens.weight, trunk.norm.weight, config.rms_norm_eps
        self._size, self._scale = first.head_dim, first.scaling
        self._queries, self._keys = config.num_attention_heads, config.num_key_value_heads
        self._angles = self._embedding.new_empty(0)
        self._kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
        # Tensors that outlive the call must be of no mode, or training could not use them.
        with torch.inference_mode(False), torch.no_grad():
            self._layers = [_Layer(layer) for layer in trunk.layers[: config.num_hidden_layers]]
        self._places = [
            (module._parameters, name, weight.data_ptr())
            for module in trunk.modules()
            for name, weight in module._parameters.items()
            if weight is not None
        ]

    @staticmethod
    def understands(trunk: Any) -> bool:
        """Tell whether a trunk is of a family that is known, and nothing in it has been wrapped, hooked or replaced."""
        if type(trunk).__name__ not in _UNDERSTOOD or not type(trunk).__module__.startswith("transformers.models."):
            return False
        if trunk.config.hidden_act != "silu" or type(trunk.embed_tokens) is not nn.Embedding:
            return False
        for module in trunk.modules():
            if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                return False
        return all(
            is_plain(linear := getattr(part, name)) and (linear.bias is None or name in _BIASED)
            for layer in trunk.layers
            for part, names in ((layer.self_attn, _ATTENTION), (layer.mlp, _FEED_FORWARD))
            for name in names
        )

    def stands(self) -> bool:
        """Tell whether the trunk's parameters are still where they were, so that these are its weights."""
        for parameters, name, place in self._places:
            weight = parameters.get(name)
            if weight is None or weight.data_ptr() != place:
                return False
        return True

    def __call__(self, ids: Tensor, masks: Mapping[str, Tensor], positions: Tensor, cache: Cache, end: int) -> Tensor:
        """Read tokens after those that the cache keeps.

        Args:
            ids: (B, S) integer.
            masks: by kind of layer, or one of the kind "" for all: (B, 1, S, L + S), what is added to attention.
            positions: (B, S) integer, ≥ 0.
            cache: takes every layer's keys and values, and gives those that are attended to.
            end: more than any position, known on the host.

        Returns:
            (B, S, H) in the weights' dtype.
        """
        rows, new = ids.shape
        every, queries, keys, size = rows * new, self._queries, self._keys, self._size
        x = F.embedding(ids.reshape(every), self._embedding)
        width = (x.shape[1],)
        angles = F.embedding(positions.reshape(every), self._angles_until(end)).view(every, 2, 1, size)
        cos, sin = angles[:, 0], angles[:, 1]
        for index, layer in enumerate(self._layers):
            read = _product(F.rms_norm(x, width, layer.norm, self._eps), layer.qkv, layer.qkv_bias).view(
                every, -1, size
            )
            turning, value = read[:, : queries + keys], read[:, queries + keys :]
            if layer.head_norms is not None:
                normed = zip(turning.split([queries, keys], dim=1), layer.head_norms, strict=True)
                turning = torch.cat([F.rms_norm(part, (size,), norm, self._eps) for part, norm in normed], dim=1)
            # (−x₂, x₁) sin = roll(x) (−sin, sin): the sign is in the table.
            turned = torch.addcmul(turning * cos, turning.roll(size // 2, dims=-1), sin)
            query = turned[:, :queries].view(rows, new, queries, size).transpose(1, 2)
            key, value = (heads.view(rows, new, keys, size).transpose(1, 2) for heads in (turned[:, queries:], value))
            key, value = cache.update(key, value, index)
            mask = masks[""] if "" in masks else masks[self._kinds[index]]
            seen = F.scaled_dot_product_attention(
                query, key, value, mask, scale=self._scale, enable_gqa=queries != keys
            )
            x = torch.addmm(x, seen.transpose(1, 2).reshape(every, -1), layer.out)
            gate, up = _product(F.rms_norm(x, width, layer.second_norm, self._eps), layer.gate_up).chunk(2, dim=1)
            x = torch.addmm(x, F.silu(gate).mul_(up), layer.down)
        return F.rms_norm(x, width, self._norm, self._eps).view(rows, new, -1)

    def _angles_until(self, end: int) -> Tensor:
        """Return cos and sin of positions up to an end, the latter with its first half negated: (≥ end, 2D)."""
        angles = self._angles
        if len(angles) < end:
            every = torch.arange(end + end // 2 + 64, device=self._embedding.device)
            cos, sin = (table[0] for table in self._rotary(self._embedding, every[None]))
            sin = torch.cat([-sin[:, : self._size // 2], sin[:, self._size // 2 :]], dim=1)
            self._angles = angles = torch.cat([cos, sin], dim=1)
        return angles


_ATTENTION, _FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_BIASED = _ATTENTION[:3]


class _Layer:
    """One layer's weights, those of linear layers as (inputs, outputs)."""

    def __init__(self, layer: Any) -> None:
        attention, feed_forward = layer.self_attn, layer.mlp
        readers = attention.q_proj, attention.k_proj, attention.v_proj
        self.norm, self.second_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.qkv = side_by_side([one.weight for one in readers]).t()
        self.qkv_bias = side_by_side([one.bias for one in readers]) if readers[0].bias is not None else None
        self.out = side_by_side([attention.o_proj.weight]).t()
        self.gate_up = side_by_side([feed_forward.gate_proj.weight, feed_forward.up_proj.weight]).t()
        self.down = side_by_side([feed_forward.down_proj.weight]).t()
        self.head_norms = [attention.q_norm.weight, attention.k_norm.weight] if hasattr(attention, "q_norm") else None


def is_plain(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer and nothing more: no adapter, no quantised weights."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def side_by_side(weights: Sequence[nn.Parameter]) -> Tensor:
    """Make weights parts of one tensor, without a change of what they are.

    Those of linear layers are laid out input by input on the CPU: a product with few rows reads every weight once, and
    is faster in the order in which it adds to all outputs at once.

    Args:
        weights: (O_i, I) or (O_i,) each.

    Returns:
        (Σ O_i, I) or (Σ O_i,), of which they are now views.
    """
    first, sizes = weights[0], [len(weight) for weight in weights]
    shape = (sum(sizes), *first.shape[1:])
    strides = (1, shape[0])[: first.ndim] if first.device.type == "cpu" else (*first.shape[1:], 1)
    starts = accumulate(sizes, initial=0)
    if not all(
        weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and weight.storage_offset() == first.storage_offset() + start * strides[0]
        and weight.stride() == strides
        for weight, start in zip(weights, starts, strict=False)
    ):
        whole = torch.empty_strided(shape, strides, dtype=first.dtype, device=first.device)
        for weight, part in zip(weights, whole.split(sizes), strict=True):
            part.copy_(weight.data)
            weight.data = part
    return first.data.as_strided(shape, strides)


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.mm(inputs, weight) if bias is None else torch.addmm(bias, inputs, weight)
