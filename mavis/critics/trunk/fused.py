"""A fused forward pass for small Llama-like trunks, with half the operations per decoding step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation
from transformers.cache_utils import Cache

_FAMILIES = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
_TORCH_CLASSES = {nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU, SiLUActivation}
_QKV, _FEED_FORWARD = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
_MAX_BYTES = 1 << 29
"""Size of the largest trunk, without its embedding; a larger one is bound by arithmetic, not by call overhead."""
_ANGLE_BLOCK = 1024
"""The table of rotary angles grows by this many positions."""


class FusedTrunk:
    """Computes the same last hidden states as a Llama, Mistral, Qwen2 or Qwen3 with a cache, in fewer operations.

        x ← x + W_o attention(rope(W_qkv n(x) + b_qkv))
        x ← x + W_down (silu(g) ∘ u),  (g, u) = W_gate,up n(x)

    with n an RMS norm; Qwen3 normalises queries and keys before the rotation. At one position of a small model, call
    overhead dominates. So layers with the same input are computed as one product, from concatenated copies of their
    weights, and rotary angles are looked up in a table.

    Args:
        trunk: one for which `supports` is true. Its weights are copied, so the copies are stale once one of them
            changes, and gradients do not reach the trunk.
    """

    def __init__(self, trunk: Any) -> None:
        config, first = trunk.config, trunk.layers[0].self_attn
        self._rotary, self._embedding, self._norm = trunk.rotary_emb, trunk.embed_tokens.weight, _norm(trunk.norm)
        self._size, self._scale = first.head_dim, first.scaling
        self._queries, self._keys = config.num_attention_heads, config.num_key_value_heads
        self._kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
        self._angles = torch.empty(0)
        with torch.no_grad():
            self._layers = [_Layer(layer) for layer in trunk.layers[: config.num_hidden_layers]]

    @staticmethod
    def supports(trunk: Any) -> bool:
        """Return whether a trunk is small, of a known family, and without replaced, wrapped or hooked modules."""
        own = type(trunk).__module__
        if type(trunk).__name__ not in _FAMILIES or not own.startswith("transformers.models."):
            return False
        for module in trunk.modules():
            if type(module) not in _TORCH_CLASSES and type(module).__module__ != own:
                return False
            if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                return False
        if trunk.embed_tokens.max_norm is not None or not trunk.layers:
            return False
        weights = list(trunk.parameters())
        if len({(weight.dtype, weight.device, type(weight)) for weight in weights}) > 1:
            return False
        if sum(weight.nbytes for weight in weights) - trunk.embed_tokens.weight.nbytes > _MAX_BYTES:
            return False
        heads = trunk.config.num_attention_heads, *[trunk.config.num_key_value_heads] * 2
        return all(_is_standard(layer, heads) for layer in trunk.layers)

    def __call__(self, ids: Tensor, masks: Mapping[str, Tensor], positions: Tensor, cache: Cache, end: int) -> Tensor:
        """Read tokens after those in the cache.

        Args:
            ids: (B, S) integer.
            masks: additive, by kind of layer or one of kind "" for all: (B, 1, S, L + S).
            positions: (B, S) integer, ≥ 0.
            cache: stores the keys and values of every layer, and returns those to attend to.
            end: a bound above all positions, known on the host.

        Returns:
            (B, S, H) in the weights' dtype.
        """
        rows, new = ids.shape
        tokens, queries, keys, size = rows * new, self._queries, self._keys, self._size
        x = F.embedding(ids.reshape(tokens), self._embedding)
        angles = F.embedding(positions.reshape(tokens), self._angles_up_to(end)).view(tokens, 2, 1, size)
        cos, sin = angles[:, 0], angles[:, 1]
        for index, layer in enumerate(self._layers):
            qkv = _product(layer.norm(x), layer.qkv, layer.qkv_bias).view(tokens, -1, size)
            unrotated, value = qkv[:, : queries + keys], qkv[:, queries + keys :]
            if layer.head_norms is not None:
                parts = zip(layer.head_norms, unrotated.split([queries, keys], dim=1), strict=True)
                unrotated = torch.cat([norm(part) for norm, part in parts], dim=1)
            # (−x₂, x₁) sin = roll(x) (−sin, sin); the table holds the sign.
            rotated = torch.addcmul(unrotated * cos, unrotated.roll(size // 2, dims=-1), sin)
            key, value = (heads.view(rows, new, keys, size).transpose(1, 2) for heads in (rotated[:, queries:], value))
            key, value = cache.update(key, value, index)
            mask = masks[""] if "" in masks else masks[self._kinds[index]]
            attended = self._attend(rotated[:, :queries].view(rows, new, queries, size), key, value, mask)
            x = torch.addmm(x, attended.reshape(tokens, -1), layer.out)
            gate, up = torch.mm(layer.second_norm(x), layer.gate_up).chunk(2, dim=1)
            x = torch.addmm(x, F.silu(gate).mul_(up), layer.down)
        return self._norm(x).view(rows, new, -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Attend with queries (B, S, heads, D) to keys and values (B, heads', L, D): like the query."""
        rows, new, queries, size = query.shape
        shared = queries // self._keys
        if new == 1:  # heads that share a key take the place of positions, so nothing is copied
            query = query.view(rows, self._keys, shared, size)
            return F.scaled_dot_product_attention(query, key, value, mask, scale=self._scale)
        if shared > 1:
            key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, mask, scale=self._scale)
        return attended.transpose(1, 2)

    def _angles_up_to(self, end: int) -> Tensor:
        """Return cos and sin of all positions up to an end, sin with its first half negated: (≥ end, 2D)."""
        angles = self._angles
        if len(angles) < end:
            positions = -(-end // _ANGLE_BLOCK) * _ANGLE_BLOCK
            every = torch.arange(positions, device=self._embedding.device)
            cos, sin = (table[0] for table in self._rotary(self._embedding, every[None]))
            sin = torch.cat([-sin[:, : self._size // 2], sin[:, self._size // 2 :]], dim=1)
            self._angles = angles = torch.cat([cos, sin], dim=1)
        return angles


class _Layer:
    """The weights of one layer; those of linear layers as (inputs, outputs)."""

    def __init__(self, layer: Any) -> None:
        attention, feed_forward = layer.self_attn, layer.mlp
        readers = [getattr(attention, name) for name in _QKV]
        self.norm, self.second_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.qkv = torch.cat([one.weight.t() for one in readers], dim=1)
        self.qkv_bias = torch.cat([one.bias for one in readers]) if readers[0].bias is not None else None
        self.out = attention.o_proj.weight.detach().t()
        self.gate_up = torch.cat([one.weight.t() for one in (feed_forward.gate_proj, feed_forward.up_proj)], dim=1)
        self.down = feed_forward.down_proj.weight.detach().t()
        heads = hasattr(attention, "q_norm")
        self.head_norms = (_norm(attention.q_norm), _norm(attention.k_norm)) if heads else None


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    """Return the RMS norm of a transformers module as a single call."""
    weight, eps = module.weight, module.variance_epsilon
    return partial(F.rms_norm, normalized_shape=tuple(weight.shape), weight=weight, eps=eps)


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(inputs, weight) if bias is None else torch.addmm(bias, inputs, weight)


def _is_standard(layer: Any, heads: tuple[int, ...]) -> bool:
    """Return whether a layer consists of plain linear layers of the expected sizes, with biases only on q, k and v.

    Args:
        layer: a layer of a trunk.
        heads: the numbers of query, key and value heads.
    """
    attention, feed_forward = layer.self_attn, layer.mlp
    readers: list[Any] = [getattr(attention, name, None) for name in _QKV]
    others: list[Any] = [
        getattr(attention, "o_proj", None),
        *(getattr(feed_forward, name, None) for name in _FEED_FORWARD),
    ]
    return (
        all(map(is_plain_linear, [*readers, *others]))
        and all(one.bias is None for one in others)
        and len({one.bias is None for one in readers}) == 1
        and [one.out_features for one in readers] == [count * attention.head_dim for count in heads]
        and type(getattr(feed_forward, "act_fn", None)) in (nn.SiLU, SiLUActivation)
    )


def is_plain_linear(module: Any) -> TypeGuard[nn.Linear]:
    """Return whether a module is exactly a linear layer: no adapter, no quantised weights."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter
