"""The cache of a prefix reader: ids, keys and values of the prefixes read so far, and the masks of the next pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mavis.math.position_hash import position_multipliers

PADDING = -1
"""Replaces the ids of padding."""
_UNKNOWN = -2
"""Replaces the ids of a row that turned out not to continue a known prefix."""

_GRANULARITY = 64
"""Buffers have a multiple of this many positions, which attention kernels on accelerators require of masks."""


class PrefixLayer(CacheLayerMixin):
    """The keys and values of one layer; new ones overwrite everything after the first `length` positions."""

    is_sliding = False  # the mask hides what is outside a window, so a truncated prefix can be continued anywhere

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate empty buffers for rows like these."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of new positions.

        Args:
            key_states: (B, heads, S, D).
            value_states: (B, heads, S, D').

        Returns:
            Views of the keys and values of the old and the new positions, (B, heads, length + S, ·).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        written = key_states.shape[2]
        end = self.length + written
        if end > self.keys.shape[2]:
            self.keys = _grow(self.keys, self.length, end)
            self.values = _grow(self.values, self.length, end)
        self.keys.narrow(2, self.length, written).copy_(key_states)
        self.values.narrow(2, self.length, written).copy_(value_states)
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)

    def select(self, rows: Tensor) -> None:
        """Replace row i by row rows[i]."""
        self.keys = _select_rows(self.keys, rows, self.length)
        self.values = _select_rows(self.values, rows, self.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of positions that attention covers, and the first of them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of valid positions."""
        return self.length

    def get_max_length(self) -> int:
        """Return −1: there is no maximum."""
        return -1


class PrefixCache(Cache):
    """The keys and values of prefixes of one length, in every layer of a model."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=PrefixLayer)

    def set_length(self, length: int) -> None:
        """Declare the first `length` positions valid, all of which have been written."""
        for layer in self.layers:
            layer.length = length

    def select(self, rows: Tensor) -> None:
        """Replace every row i by row rows[i].

        Args:
            rows: (B',) integer, on the cache's device.
        """
        for layer in self.layers:
            layer.select(rows)


def prefix_mask(is_token: Tensor, new: int, candidates: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Build the additive attention mask for the last tokens of prefixes and the candidates after them.

    Each of the last `new` tokens attends to the tokens up to itself, each candidate to the prefix and itself; with a
    window, only to the last W of these. Padding attends to itself, because a softmax over nothing is NaN.

    Args:
        is_token: (B, L) bool, False on padding.
        new: the number of last positions that are read.
        candidates: K, the number of candidates that are read after them.
        window: W, or None for no window.
        dtype: floating.

    Returns:
        (B, 1, new + K, L + K): 0 where attended to, else the minimum of the dtype.
    """
    length, device = is_token.shape[1], is_token.device
    columns = torch.arange(length, device=device)
    positions = torch.arange(length - new, length + candidates, device=device).clamp_(max=length)
    causal = causal_mask(positions, columns, window)
    itself = torch.ones(new + candidates, candidates, dtype=torch.bool, device=device).tril_(-new).triu_(-new)
    in_prefix = (causal & is_token[:, None, :]) | (columns == positions[:, None])
    visible = torch.cat([in_prefix, itself.expand(len(is_token), -1, -1)], dim=2)[:, None]
    return additive_mask(visible, dtype)


def causal_mask(positions: Tensor, columns: Tensor, window: int | None) -> Tensor:
    """Return which columns each position attends to: those up to itself, within its window.

    Args:
        positions: (..., S) integer.
        columns: (L,) integer.
        window: W, or None for no window.

    Returns:
        (..., S, L) bool.
    """
    positions = positions[..., None]
    causal = columns <= positions
    return causal if window is None else causal & (columns > positions - window)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a bool mask to an additive one of the same shape: 0 where True, else the minimum of the dtype."""
    hidden = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return hidden.masked_fill_(~visible, torch.finfo(dtype).min)


class StepMask:
    """The mask of a prefix's last token and K candidates, updated in place while prefixes grow by a token a step.

    Args:
        window: W, or None for no window.
    """

    def __init__(self, window: int | None) -> None:
        self._window = window
        self._buffer: Tensor | None = None
        self._length = -1

    def reset(self) -> None:
        """Discard the buffer: truncated prefixes may continue with other padding."""
        self._buffer = None

    def select(self, rows: Tensor) -> None:
        """Replace every row i by row rows[i]."""
        if self._buffer is not None:
            self._buffer = self._buffer.index_select(0, rows)

    def mask(self, is_token: Tensor, new: int, candidates: int, dtype: torch.dtype) -> Tensor:
        """Return the same as `prefix_mask`, valid until the next call.

        Args:
            is_token: (B, L) bool; the last of each row is a token.
            new: the number of last positions that are read.
            candidates: K.
            dtype: floating.

        Returns:
            (B, 1, new + K, L + K).
        """
        if new > 1:
            return prefix_mask(is_token, new, candidates, self._window, dtype)
        length = is_token.shape[1]
        end, buffer = length + candidates, self._buffer
        if (
            buffer is None
            or (buffer.shape[2], buffer.dtype) != (1 + candidates, dtype)
            or end > buffer.shape[3]
            or length - self._length not in (0, 1)
        ):
            built = prefix_mask(is_token, 1, candidates, self._window, dtype)
            buffer = built.new_empty(*built.shape[:3], _capacity(end))
            buffer[..., :end] = built
            self._candidate_columns = built[:1, :, :, length:].clone()
            self._min = torch.finfo(dtype).min
        elif length > self._length:
            self._extend(buffer, length, end)
        self._buffer, self._length = buffer, length
        return buffer[:, :, 1 - new :, :end]

    def _extend(self, buffer: Tensor, length: int, end: int) -> None:
        """Write the column of a new token, shift those of the candidates, and hide what leaves the window."""
        buffer[:, :, :, length - 1] = 0
        buffer[:, :, :, length:end] = self._candidate_columns
        if self._window is not None and length >= self._window:
            buffer[:, :, 1:, length - self._window] = self._min
            if length > self._window:
                buffer[:, :, 0, length - self._window - 1] = self._min


@dataclass(slots=True)
class KeptPrefixes:
    """Prefixes that have been read.

    Args:
        ids: (B, L) integer, `PADDING` on padding.
        masks: by kind of layer.
        weights: version of the weights that read them.
        cache: keys and values of the first `length` positions.
        length: L; smaller while the prefixes are being read.
        state: (B, H) float32 at the last position, or None if it has not been computed.
    """

    ids: Tensor
    masks: dict[str, StepMask]
    weights: tuple[Any, ...]
    cache: PrefixCache = field(default_factory=PrefixCache)
    length: int = 0
    state: Tensor | None = None

    def extend(self, ids: Tensor) -> bool:
        """Continue with new prefixes: reuse the longest beginning that each of them shares with a known row.

        Args:
            ids: (B', L') integer, `PADDING` on padding.

        Returns:
            Whether all of them share a beginning with known rows; if not, this object is of no further use.
        """
        known, self.ids = self.ids, ids
        beginnings = ids[:, : self.length]
        if beginnings.shape == known.shape and torch.equal(beginnings, known):
            return True
        if beginnings.shape[1] == known.shape[1]:
            rows, found = _match_rows(known, beginnings)
            if bool(found.all()):
                self._select(rows)
                return True
        rows, shared = _longest_shared_prefix(known, ids)
        if shared:
            self.truncate(shared)
            if len(rows) != len(known) or not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
                self._select(rows)
        return shared > 0

    def extend_without_sync(self, ids: Tensor, raise_if_unknown: Callable[[Tensor], None]) -> None:
        """Continue with longer prefixes that are assumed to begin with known rows, without waiting for the comparison.

        Args:
            ids: (B', L') integer, L' ≥ L.
            raise_if_unknown: called with a bool scalar that is True if some row does not begin with a known one.
        """
        known, beginnings = self.ids, ids[:, : self.length]
        if len(ids) == len(known) == 1:
            found = (beginnings == known).all(dim=1)
        else:
            rows, found = _match_rows(known, beginnings)
            self._select(rows)
        found = found & (ids[:, -1] != PADDING)
        self.ids = torch.where(found[:, None], ids, _UNKNOWN)  # no later call may continue a row that was not found
        raise_if_unknown(~found.all())

    def truncate(self, length: int) -> None:
        """Drop everything after the first `length` positions."""
        if length < self.length:
            self.cache.set_length(length)
            for mask in self.masks.values():
                mask.reset()
            self.length, self.state = length, None

    def _select(self, rows: Tensor) -> None:
        """Replace every row i by row rows[i]."""
        self.cache.select(rows)
        for mask in self.masks.values():
            mask.select(rows)
        if self.state is not None:
            self.state = self.state.index_select(0, rows)


@functools.lru_cache(maxsize=4)
def _multipliers(length: int, device: torch.device) -> Tensor:
    """Return the hash multiplier of each position."""
    return position_multipliers(torch.arange(length, device=device))


def _match_rows(known: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Find the row of `known` (R, L) that each row of `wanted` (B, L) equals: its index (B,), and whether it does (B,).

    Rows are looked up by hash, so that only one pair per row has to be compared.
    """
    length = known.shape[1]
    multipliers = _multipliers(_capacity(length), known.device)[:length]
    wanted_keys, known_keys = [((rows + 3) * multipliers).sum(dim=1) for rows in (wanted, known)]
    rows = (wanted_keys[:, None] == known_keys).int().argmax(dim=1)
    return rows, (known.index_select(0, rows) == wanted).all(dim=1)


def _longest_shared_prefix(known: Tensor, wanted: Tensor) -> tuple[Tensor, int]:
    """Find the row of `known` (R, L) with the longest common prefix for each row of `wanted` (B, L').

    Returns:
        Its index (B,), and the length of the shortest of these prefixes.
    """
    length = min(known.shape[1], wanted.shape[1])
    rows, shared = [], []
    for row in wanted[:, :length]:
        differs = known[:, :length] != row
        first = torch.where(differs.any(dim=1), differs.byte().argmax(dim=1), length)
        rows.append(first.argmax())
        shared.append(first.max())
    return torch.stack(rows), int(torch.stack(shared).min())


def _capacity(length: int) -> int:
    """Return the size of a buffer for a length: a quarter more, rounded up, so that few steps have to grow it."""
    return -(-(length + length // 4) // _GRANULARITY) * _GRANULARITY


def _grow(buffer: Tensor, length: int, end: int) -> Tensor:
    grown = buffer.new_empty(*buffer.shape[:2], _capacity(end), buffer.shape[3])
    grown[:, :, :length] = buffer[:, :, :length]
    return grown


def _select_rows(buffer: Tensor, rows: Tensor, length: int) -> Tensor:
    selected = buffer.new_empty(len(rows), *buffer.shape[1:])
    torch.index_select(buffer[:, :, :length], 0, rows, out=selected[:, :, :length])
    return selected
