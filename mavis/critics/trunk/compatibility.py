"""Checks whether a trunk can be read step by step, and with which attention windows, partly by trial."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mavis.errors import CriticError

Windows: TypeAlias = dict[str, int | None]
"""The attention window of each kind of layer, None for no window; the only kind is "" if all layers are alike."""

_HINT = "use a decoder with standard attention that takes position_ids, such as a Llama, Qwen2, Gemma or GPT-2."
_SLIDING = "sliding_attention"
_SHORT_WINDOW = 3
"""The window during a trial: short enough for a few tokens to show which layers have one."""
_KNOWN_WINDOW_SETTINGS = {
    *("sliding_window", "use_sliding_window", "max_window_layers"),
    *("sliding_window_pattern", "_sliding_window_pattern"),
}
_TOLERANCE, _TOLERANCE_ON_ACCELERATORS, _TOLERANCE_IN_HALF_PRECISION = 1e-4, 5e-3, 0.05
"""Relative errors of the states that a trial accepts; accelerators may round products to ten bits (TF32)."""


def check_supported(trunk: Any) -> None:
    """Check the properties of a trunk that a trial with a few tokens would not show.

    Raises:
        CriticError: if it is not a decoder of transformers without output embedding, or has masks, layers or positions
            that are not supported.
    """
    if reason := _unsupported_reason(trunk):
        raise _unsupported(trunk, reason)


def detect_windows(trunk: Any, read: Callable[..., Tensor], use_windows: Callable[[Windows], None]) -> None:
    """Set a trunk's attention to an implementation that accepts the masks of candidates, and find its windows by trial.

    Args:
        trunk: one that `check_supported` accepts.
        read: the function on trial, see `PrefixReader.read`.
        use_windows: makes `read` use other windows and the trunk's current attention; called last with the result.

    Raises:
        CriticError: if no windows reproduce the states of whole prefixes; the attention of the trunk is then restored.
    """
    config, weight = trunk.config, trunk.get_input_embeddings().weight
    before, window = config._attn_implementation, getattr(config, "sliding_window", None)
    options: list[Windows] = [{"": None}] + ([{"": window}] if window else [])
    if kinds := getattr(config, "layer_types", None):
        options.append({kind: window if kind == _SLIDING else None for kind in kinds})
    tolerance = _TOLERANCE if weight.device.type == "cpu" else _TOLERANCE_ON_ACCELERATORS
    tolerance = tolerance if weight.dtype.itemsize >= 4 else _TOLERANCE_IN_HALF_PRECISION
    reason = ""
    # Under autocast the trunk's own forward pass runs, which would be compared with itself.
    with _in_evaluation_mode(trunk), torch.autocast(weight.device.type, enabled=False):
        for attention in ("sdpa", "eager"):
            trials = []
            for windows in options:
                try:
                    trunk.set_attn_implementation(attention)
                    trials.append((_relative_error(trunk, read, use_windows, windows), windows))
                except Exception as failure:  # other kinds of trunks raise anything
                    reason = reason or f"which raises {type(failure).__name__}: {failure}"
            error, best = min(trials, key=lambda trial: trial[0], default=(float("inf"), {}))
            use_windows(best)
            if error <= tolerance:
                return
            if trials:
                reason = f"whose states step by step differ from those of whole prefixes by {error:.1g} of their size"
    trunk.set_attn_implementation(before)
    raise _unsupported(trunk, reason)


def _unsupported(trunk: Any, reason: str) -> CriticError:
    return CriticError(f"trunk is a {type(trunk).__name__}, {reason}.", _HINT)


def _relative_error(
    trunk: Any, read: Callable[..., Tensor], use_windows: Callable[[Windows], None], windows: Windows
) -> float:
    """Read random prefixes step by step with short windows, and compare the states with those of whole prefixes.

    Returns:
        The root mean square of the difference, relative to that of the states without cache and padding.
    """
    with _short_window(trunk.config):
        use_windows({kind: _SHORT_WINDOW if window else None for kind, window in windows.items()})
        weight, generator = trunk.get_input_embeddings().weight, torch.Generator().manual_seed(0)
        ids = torch.randint(len(weight), (2, 9), generator=generator).to(weight.device)
        candidates = torch.randint(len(weight), (2, 4), generator=generator).to(weight.device)
        padding = (0, 3)
        is_token = torch.arange(9, device=weight.device) >= torch.tensor(padding, device=weight.device)[:, None]
        actual, expected = [], []
        for length, some in ((4, 2), (5, 2), (6, 2), (6, 4), (8, 4), (9, 1)):
            prefixes, offered = ids[:, :length], candidates[:, :some]
            if length < 9:  # the last token is read alone
                actual.append(read(prefixes, is_token[:, :length], offered))
            actual.append(read(prefixes, is_token[:, :length])[:, None])
            states = [_read_whole(trunk, prefixes[row, padding[row] :], offered[row]) for row in range(2)]
            expected += [torch.stack([one[:, -1] for one in states])] if length < 9 else []
            expected.append(torch.stack([one[:1, -2] for one in states]))
        reference = torch.cat(expected, dim=1)
        difference = torch.cat(actual, dim=1) - reference
        return float(difference.square().mean().sqrt() / reference.square().mean().sqrt())


@torch.no_grad()
def _read_whole(trunk: Any, prefix: Tensor, candidates: Tensor) -> Tensor:
    """Read a prefix (L,) with each of its candidates (K,), without cache: (K, L + 1, H) float32."""
    ids = torch.cat([prefix.expand(len(candidates), -1), candidates[:, None]], dim=1)
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    states: Tensor = trunk(**inputs, use_cache=False)[0]
    return states.float()


def _unsupported_reason(trunk: Any) -> str:
    """Return why a trunk is not supported, or an empty string if a trial has to decide."""
    if not isinstance(trunk, PreTrainedModel):
        return "which is not a transformers model"
    if any(weight.is_meta for weight in trunk.parameters()):
        return "whose weights are on the meta device"
    if trunk.get_output_embeddings() is not None:
        return "which has an output embedding, unlike its base model"
    if any(getattr(module, "is_causal", True) is False for module in trunk.modules()):
        return "whose attention is not causal"
    parameters = inspect.signature(trunk.forward).parameters
    if missing := {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"} - set(parameters):
        return f"whose forward does not take {', '.join(sorted(missing))}"
    config = trunk.config.to_dict()
    if unknown := set(config.get("layer_types") or ()) - {"full_attention", _SLIDING}:
        return f"which has layers of {', '.join(sorted(unknown))}"
    for name, value in config.items():
        if value and ("window" in name or "attention_chunk" in name) and name not in _KNOWN_WINDOW_SETTINGS:
            return f"whose {name} of {value} may not be a matter of its attention mask alone"
    rope = config.get("rope_parameters") or {}
    for kind in [rope.get("rope_type"), *(one.get("rope_type") for one in rope.values() if isinstance(one, dict))]:
        if kind in ("dynamic", "longrope"):
            return f"whose rotary frequencies ({kind}) change with the length, so keys cannot be cached"
    return ""


@contextmanager
def _in_evaluation_mode(trunk: nn.Module) -> Iterator[None]:
    """Put a trunk into evaluation mode for the block."""
    modes = [(module, module.training) for module in trunk.modules()]
    trunk.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _short_window(config: Any) -> Iterator[None]:
    """Shorten a trunk's window for the block, if it has one."""
    window = getattr(config, "sliding_window", None)
    if window:
        config.sliding_window = _SHORT_WINDOW
    try:
        yield
    finally:
        if window:
            config.sliding_window = window
