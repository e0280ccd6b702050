"""Can a trunk be read step by step, and with which masks? What it is says part of that, a trial the rest."""

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
"""How many positions each kind of layer sees, None for all; of the kind "" if layers are all alike."""

_SUITABLE = "take a decoder of plain attention that reads position_ids, such as a Llama, Qwen2, Gemma or GPT-2."
_SLIDING = "sliding_attention"
_SHORT_WINDOW = 3
"""The window with which a trunk is tried, so that a few tokens show which of its layers have one."""
_UNDERSTOOD_WINDOWS = {
    *("sliding_window", "use_sliding_window", "max_window_layers"),
    *("sliding_window_pattern", "_sliding_window_pattern"),
}
_MOST_WRONG, _MOST_WRONG_ON_ACCELERATORS, _MOST_WRONG_IN_HALF_PRECISION = 1e-4, 5e-3, 0.05
"""How much of their size a trunk's states may be off when it is tried; accelerators may round products to ten bits."""


def check_suitable(trunk: Any) -> None:
    """Refuse a trunk that need not even be tried: what a few tokens would not show.

    Raises:
        CriticError: if it is none of transformers' decoders without output embedding, or has masks, layers or positions
            that are not understood.
    """
    if reason := _unsuitable(trunk):
        raise _refusal(trunk, reason)


def find_windows(trunk: Any, read: Callable[..., Tensor], use: Callable[[Windows], None]) -> None:
    """Set a trunk's attention to one that takes the masks of candidates, and find out by trial which windows it has.

    Args:
        trunk: that `check_suitable` has let pass.
        read: what is tried, see `PrefixReader.read`.
        use: makes it read with other windows, and with the attention that the trunk has by then; called last with those
            that have been found.

    Raises:
        CriticError: if with none of them states are equal to those of whole prefixes; the trunk's attention is then
            what it was.
    """
    config, weight = trunk.config, trunk.get_input_embeddings().weight
    before, window = config._attn_implementation, getattr(config, "sliding_window", None)
    options: list[Windows] = [{"": None}] + ([{"": window}] if window else [])
    if kinds := getattr(config, "layer_types", None):
        options.append({kind: window if kind == _SLIDING else None for kind in kinds})
    most = _MOST_WRONG if weight.device.type == "cpu" else _MOST_WRONG_ON_ACCELERATORS
    most = most if weight.dtype.itemsize >= 4 else _MOST_WRONG_IN_HALF_PRECISION
    reason = ""
    # Under autocast a trunk is read by its own forward pass, which would be compared with itself.
    with _in_evaluation_mode(trunk), torch.autocast(weight.device.type, enabled=False):
        for attention in ("sdpa", "eager"):
            tried = []
            for windows in options:
                try:
                    trunk.set_attn_implementation(attention)
                    tried.append((_error(trunk, read, use, windows), windows))
                except Exception as failure:  # what a trunk of another kind raises, nobody knows
                    reason = reason or f"which raises {type(failure).__name__}: {failure}"
            error, best = min(tried, key=lambda one: one[0], default=(float("inf"), {}))
            use(best)
            if error <= most:
                return
            if tried:
                reason = f"whose states step by step differ from those of whole prefixes by {error:.1g} of their size"
    trunk.set_attn_implementation(before)
    raise _refusal(trunk, reason)


def _refusal(trunk: Any, reason: str) -> CriticError:
    return CriticError(f"trunk is a {type(trunk).__name__}, {reason}.", _SUITABLE)


def _error(trunk: Any, read: Callable[..., Tensor], use: Callable[[Windows], None], windows: Windows) -> float:
    """Read random prefixes step by step, with windows that are short, and say how wrong the states are.

    Returns:
        The root mean square of the difference from whole prefixes without cache and padding, as a share of theirs.
    """
    with _short_window(trunk.config):
        use({kind: _SHORT_WINDOW if window else None for kind, window in windows.items()})
        weight, generator = trunk.get_input_embeddings().weight, torch.Generator().manual_seed(0)
        ids = torch.randint(len(weight), (2, 9), generator=generator).to(weight.device)
        candidates = torch.randint(len(weight), (2, 4), generator=generator).to(weight.device)
        padding = (0, 3)
        is_token = torch.arange(9, device=weight.device) >= torch.tensor(padding, device=weight.device)[:, None]
        found, whole = [], []
        for length, some in ((4, 2), (5, 2), (6, 2), (6, 4), (8, 4), (9, 1)):
            prefixes, offered = ids[:, :length], candidates[:, :some]
            if length < 9:  # the last token is read alone
                found.append(read(prefixes, is_token[:, :length], offered))
            found.append(read(prefixes, is_token[:, :length])[:, None])
            states = [_whole(trunk, prefixes[row, padding[row] :], offered[row]) for row in range(2)]
            whole += [torch.stack([one[:, -1] for one in states])] if length < 9 else []
            whole.append(torch.stack([one[:1, -2] for one in states]))
        expected = torch.cat(whole, dim=1)
        return float((torch.cat(found, dim=1) - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@torch.no_grad()
def _whole(trunk: Any, prefix: Tensor, candidates: Tensor) -> Tensor:
    """Read a prefix (L,) and each of its candidates (K,) anew and without cache: (K, L + 1, H) float32."""
    ids = torch.cat([prefix.expand(len(candidates), -1), candidates[:, None]], dim=1)
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    states: Tensor = trunk(**inputs, use_cache=False)[0]
    return states.float()


def _unsuitable(trunk: Any) -> str:
    """Say why a trunk need not even be tried, or nothing: what a few tokens would not show is refused here."""
    if not isinstance(trunk, PreTrainedModel):
        return "which is no model of transformers"
    if any(weight.is_meta for weight in trunk.parameters()):
        return "whose weights are on the meta device"
    if trunk.get_output_embeddings() is not None:
        return "which has an output embedding, unlike its base model"
    if any(getattr(module, "is_causal", True) is False for module in trunk.modules()):
        return "whose attention is not causal"
    takes = inspect.signature(trunk.forward).parameters
    if missing := {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"} - set(takes):
        return f"whose forward does not take {', '.join(sorted(missing))}"
    config = trunk.config.to_dict()
    if unknown := set(config.get("layer_types") or ()) - {"full_attention", _SLIDING}:
        return f"which has layers of {', '.join(sorted(unknown))}"
    for name, value in config.items():
        if value and ("window" in name or "attention_chunk" in name) and name not in _UNDERSTOOD_WINDOWS:
            return f"whose {name} of {value} is not known to be a matter of its masks"
    rope = config.get("rope_parameters") or {}
    for kind in [rope.get("rope_type"), *(one.get("rope_type") for one in rope.values() if isinstance(one, dict))]:
        if kind in ("dynamic", "longrope"):
            return f"whose rotary frequencies ({kind}) change with the length, so that keys cannot be kept"
    return ""


@contextmanager
def _in_evaluation_mode(trunk: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in trunk.modules()]
    trunk.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _short_window(config: Any) -> Iterator[None]:
    """Shorten the window of a trunk, if it has one."""
    window = getattr(config, "sliding_window", None)
    if window:
        config.sliding_window = _SHORT_WINDOW
    try:
        yield
    finally:
        if window:
            config.sliding_window = window
