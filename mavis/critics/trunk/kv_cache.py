"""What a reader of prefixes keeps of them: their ids, their keys and values, and the masks of what is read next."""

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
"""What stands for the id of padding."""
_UNKNOWN = -2
"""What stands for every id of a row that has turned out not to be known."""

_CHUNK = 64
"""By how many positions buffers grow at least; a multiple of what the attention of accelerators wants masks to be."""


class PrefixLayer(CacheLayerMixin):
    """One layer's keys and values: written after the first `length` positions, which alone are kept."""

    is_sliding = False  # its mask says what a window hides, so that a cropped prefix can be read on from anywhere

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty buffers for rows like these."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write after what is kept.

        Args:
            key_states: (B, heads, S, D).
            value_states: (B, heads, S, D').

        Returns:
            Keys and values of the kept positions and of these, (B, heads, length + S, ·), as views.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        written = key_states.shape[2]
        end = self.length + written
        if end > self.keys.shape[2]:
            self.keys = _grown(self.keys, self.length, end)
            self.values = _grown(self.values, self.length, end)
        self.keys.narrow(2, self.length, written).copy_(key_states)
        self.values.narrow(2, self.length, written).copy_(value_states)
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)

    def select(self, rows: Tensor) -> None:
        """Let row i be what row rows[i] is, as far as it is kept."""
        self.keys = _selected(self.keys, rows, self.length)
        self.values = _selected(self.values, rows, self.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of positions that attention will see and the first of them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of positions that are kept."""
        return self.length

    def get_max_length(self) -> int:
        """Return −1: there is no maximum."""
        return -1


class PrefixCache(Cache):
    """The keys and values of prefixes of one length, in every layer of a model."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=PrefixLayer)

    def keep(self, length: int) -> None:
        """Keep the first `length` positions, which have been written, and no more."""
        for layer in self.layers:
            layer.length = length

    def select(self, rows: Tensor) -> None:
        """Let every row i be what row rows[i] is now.

        Args:
            rows: (B',) integer, on the cache's device.
        """
        for layer in self.layers:
            layer.select(rows)


def prefix_mask(is_token: Tensor, new: int, candidates: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Build what is added to attention: 0 for what a position sees, the least number of its dtype for what it does not.

    The last `new` tokens of a prefix see its tokens up to themselves, candidates see its tokens and themselves; of
    these, a layer with a window sees the last W, itself among them. Padding sees itself, so that its softmax is over
    something.

    Args:
        is_token: (B, L) bool, False on padding.
        new: how many of the last positions are read.
        candidates: K, which are read after them.
        window: W, or None where everything is seen.
        dtype: floating.

    Returns:
        (B, 1, new + K, L + K).
    """
    length, device = is_token.shape[1], is_token.device
    columns = torch.arange(length, device=device)
    places = torch.arange(length - new, length + candidates, device=device).clamp_(max=length)
    seen = seen_from(places, columns, window)
    sees_itself = torch.ones(new + candidates, candidates, dtype=torch.bool, device=device).tril_(-new).triu_(-new)
    in_prefix = (seen & is_token[:, None, :]) | (columns == places[:, None])
    visible = torch.cat([in_prefix, sees_itself.expand(len(is_token), -1, -1)], dim=2)[:, None]
    return added(visible, dtype)


def seen_from(places: Tensor, columns: Tensor, window: int | None) -> Tensor:
    """Tell which columns (L,) stand before places (..., S) or there, within a window W if there is one: (..., S, L)."""
    places = places[..., None]
    seen = columns <= places
    return seen if window is None else seen & (columns > places - window)


def added(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn what is visible, bool, into what is added to attention, of the same shape: 0, or the least number."""
    hidden = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return hidden.masked_fill_(~visible, torch.finfo(dtype).min)


class StepMask:
    """The mask of a prefix's last token and K candidates, kept in a buffer while the prefix grows by a token a step.

    Args:
        window: how many positions are seen, or None for all.
    """

    def __init__(self, window: int | None) -> None:
        self._window = window
        self._buffer: Tensor | None = None
        self._length = -1

    def forget(self) -> None:
        """Build the next one anew, because the prefixes have been cut and may go on with other padding."""
        self._buffer = None

    def select(self, rows: Tensor) -> None:
        """Let every row i be what row rows[i] is now."""
        if self._buffer is not None:
            self._buffer = self._buffer.index_select(0, rows)

    def mask(self, is_token: Tensor, new: int, candidates: int, dtype: torch.dtype) -> Tensor:
        """Return what `prefix_mask` does, good until the next call.

        Args:
            is_token: (B, L) bool; the last of each row is a token.
            new: how many of the last positions are read.
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
            buffer = built.new_empty(*built.shape[:3], _roomy(end))
            buffer[..., :end] = built
            self._own = built[:1, :, :, length:].clone()
            self._least = torch.finfo(dtype).min
        elif length > self._length:
            self._extend(buffer, length, end)
        self._buffer, self._length = buffer, length
        return buffer[:, :, 1 - new :, :end]

    def _extend(self, buffer: Tensor, length: int, end: int) -> None:
        """Write the column of a new token, move those of the candidates on, and hide what leaves the window."""
        buffer[:, :, :, length - 1] = 0
        buffer[:, :, :, length:end] = self._own
        if self._window is not None and length >= self._window:
            buffer[:, :, 1:, length - self._window] = self._least
            if length > self._window:
                buffer[:, :, 0, length - self._window - 1] = self._least


@dataclass(slots=True)
class KeptPrefixes:
    """Prefixes that have been read.

    Args:
        ids: (B, L) integer, `PADDING` where there is some.
        masks: by kind of layer.
        weights: what tells whether the weights are still those that read them.
        cache: keys and values of the first `length` positions.
        length: L, but fewer while the prefixes are being read.
        state: (B, H) float32 at the last position, or None where it has not been computed.
    """

    ids: Tensor
    masks: dict[str, StepMask]
    weights: tuple[Any, ...]
    cache: PrefixCache = field(default_factory=PrefixCache)
    length: int = 0
    state: Tensor | None = None

    def go_on(self, ids: Tensor) -> bool:
        """Become the beginning of other prefixes: as they are, with rows in another order, or cut.

        Args:
            ids: (B', L') integer, `PADDING` where there is some.

        Returns:
            Whether they share a beginning with what is kept; else this is of no more use.
        """
        known, self.ids = self.ids, ids
        begins = ids[:, : self.length]
        if begins.shape == known.shape and torch.equal(begins, known):
            return True
        if begins.shape[1] == known.shape[1]:
            rows, found = _rows_alike(known, begins)
            if bool(found.all()):
                self._select(rows)
                return True
        rows, shared = _rows_sharing_most(known, ids)
        if shared:
            self.cut(shared)
            if len(rows) != len(known) or not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
                self._select(rows)
        return shared > 0

    def go_on_unseen(self, ids: Tensor, missing: Callable[[Tensor], None]) -> None:
        """Become the beginning of other prefixes of at least this length, without knowing on the host that it is one.

        Args:
            ids: (B', L') integer, L' ≥ L.
            missing: told of a bool scalar that is True if it is not, for some row.
        """
        known, begins = self.ids, ids[:, : self.length]
        if len(ids) == len(known) == 1:
            found = (begins == known).all(dim=1)
        else:
            rows, found = _rows_alike(known, begins)
            self._select(rows)
        found = found & (ids[:, -1] != PADDING)
        self.ids = torch.where(found[:, None], ids, _UNKNOWN)  # no later call shall go on from what was not found
        missing(~found.all())

    def cut(self, length: int) -> None:
        """Keep the first `length` positions only."""
        if length < self.length:
            self.cache.keep(length)
            for mask in self.masks.values():
                mask.forget()
            self.length, self.state = length, None

    def _select(self, rows: Tensor) -> None:
        """Let every row i be what row rows[i] is now."""
        self.cache.select(rows)
        for mask in self.masks.values():
            mask.select(rows)
        if self.state is not None:
            self.state = self.state.index_select(0, rows)


@functools.lru_cache(maxsize=4)
def _factors(length: int, device: torch.device) -> Tensor:
    """Give a number for each position."""
    return position_multipliers(torch.arange(length, device=device))


def _rows_alike(known: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Find the row of `known` (R, L) that each row of `wanted` (B, L) equals: its index (B,), and whether it does (B,).

    Rows are looked up by keys, so that not every two of them have to be compared.
    """
    length = known.shape[1]
    factors = _factors(_roomy(length), known.device)[:length]
    wanted_keys, known_keys = [((rows + 3) * factors).sum(dim=1) for rows in (wanted, known)]
    rows = (wanted_keys[:, None] == known_keys).int().argmax(dim=1)
    return rows, (known.index_select(0, rows) == wanted).all(dim=1)


def _rows_sharing_most(known: Tensor, wanted: Tensor) -> tuple[Tensor, int]:
    """Find the row of `known` (R, L) that each of `wanted` (B, L') begins like: its index (B,), and how far all do."""
    length = min(known.shape[1], wanted.shape[1])
    rows, shared = [], []
    for row in wanted[:, :length]:
        differs = known[:, :length] != row
        first = torch.where(differs.any(dim=1), differs.byte().argmax(dim=1), length)
        rows.append(first.argmax())
        shared.append(first.max())
    return torch.stack(rows), int(torch.stack(shared).min())


def _roomy(length: int) -> int:
    """Round a length up, with a quarter more, so that few steps have to grow a buffer."""
    return -(-(length + length // 4) // _CHUNK) * _CHUNK


def _grown(buffer: Tensor, length: int, end: int) -> Tensor:
    grown = buffer.new_empty(*buffer.shape[:2], _roomy(end), buffer.shape[3])
    grown[:, :, :length] = buffer[:, :, :length]
    return grown


def _selected(buffer: Tensor, rows: Tensor, length: int) -> Tensor:
    selected = buffer.new_empty(len(rows), *buffer.shape[1:])
    torch.index_select(buffer[:, :, :length], 0, rows, out=selected[:, :, :length])
    return selected
