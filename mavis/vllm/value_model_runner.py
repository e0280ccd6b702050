"""Runs a value model over the requests of an engine, with preallocated keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mavis.critics.trunk.kv_cache import additive_mask, causal_mask
from mavis.critics.trunk.reader import PrefixReader
from mavis.errors import CriticError

_MAX_PREFILL_TOKENS, _MAX_CHUNK, _MAX_SCORES = 4096, 512, 1 << 24
"""Limits of one prefill pass: tokens, positions per row, and attention scores."""
_MAX_LENGTH_RATIO = 4
"""How many times longer the longest row of one decoding pass may be than the shortest."""


class RequestWithPrefix(Protocol):
    """The parts of a request that this module reads."""

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A prefill pass over the positions from `start` of some rows, whose earlier positions have been read."""

    rows: Tensor
    start: int

    def write(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Write keys or values (N, heads, S, D) and return those of all positions up to the last of them."""
        end = self.start + new.shape[2]
        buffer[self.rows, :, self.start : end] = new.to(buffer.dtype)
        return buffer[:, :, :end].index_select(0, self.rows) if self.start else new


@dataclass(frozen=True, slots=True)
class _Step:
    """A decoding pass over the last position (R,) of some rows (R,).

    Args:
        rows: (R,) integer.
        positions: (R,) integer.
        end: the length of the longest row.
        leading: whether the rows are the first R of the buffer.
    """

    rows: Tensor
    positions: Tensor
    end: int
    leading: bool

    def write(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Write keys or values (R, heads, 1, D) and return those of all positions up to the last."""
        buffer[self.rows, :, self.positions] = new[:, :, 0].to(buffer.dtype)
        visible = buffer[:, :, : self.end]
        return visible[: len(new)] if self.leading else visible.index_select(0, self.rows)


@dataclass(slots=True)
class _CacheState:
    """The size of the buffers and the pass in progress, shared by all layers."""

    rows: int
    length: int
    current: _Chunk | _Step


class _Layer(CacheLayerMixin):
    """The keys and values of one layer: a row per request, whose first token is at position 0."""

    is_sliding = False  # the masks hide what is outside a window

    def __init__(self, state: _CacheState) -> None:
        super().__init__()
        self.state = state

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers, with zeros: masked positions are still multiplied by 0, which NaN would survive."""
        rows, length = self.state.rows, self.state.length
        self.keys, self.values = (
            one.new_zeros(rows, one.shape[1], length, one.shape[3]) for one in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of the current pass, and return all that it attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        current = self.state.current
        return current.write(self.keys, key_states), current.write(self.values, value_states)

    def move(self, targets: Tensor, sources: Tensor, end: int) -> None:
        """Copy rows to other rows, up to a position."""
        for buffer in (self.keys, self.values):
            buffer[targets, :, :end] = buffer[sources, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return placeholder sizes: masks are passed in, so no trunk asks for them."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: positions are passed in."""
        return 0

    def get_max_length(self) -> int:
        """Return the number of positions in the buffers."""
        return self.state.length


class ValueModelRunner:
    """Reads every token of the tilted requests once, however the batch changes.

    A request that joins, or returns after preemption, is prefilled from its beginning; afterwards it is read one token
    a step. The last token is read again in every step, so a step whose token the engine discards, such as one of a
    chunked prefill, needs no special case.

    Args:
        trunk: of a value model, on its device; see `PrefixReader` for its requirements. Its weights must not change.
        rows: the most requests in a batch.
        length: the most tokens of a request.

    Raises:
        CriticError: if the trunk's states cannot be computed step by step, it has learnt fewer positions, or the
            buffers do not fit in memory.
    """

    def __init__(self, trunk: Any, rows: int, length: int) -> None:
        self._reader = reader = PrefixReader(trunk)  # checks the trunk, and finds out which masks it takes
        if reader.max_positions is not None and reader.max_positions < length:
            raise CriticError(
                f"the engine takes requests of up to {length} tokens, but the value model has learnt "
                f"{reader.max_positions} positions.",
                f"pass --max-model-len {reader.max_positions}, or serve a value model with rotary positions.",
            )
        weight = trunk.get_input_embeddings().weight
        self._device, self._dtype = weight.device, weight.dtype
        self._columns = torch.arange(length, device=self._device)
        self._row_indices = torch.arange(rows, device=self._device)
        self._state = _CacheState(rows, length, _Chunk(self._row_indices[:1], 0))
        self._cache = Cache(layer_class_to_replicate=partial(_Layer, self._state))
        self._read_lengths: list[int] = []
        """How many tokens of each row have been read."""
        self._allocate()

    def _allocate(self) -> None:
        """Allocate the buffers; a pass over one token tells how large they will be."""
        rows, length = self._state.rows, self._state.length
        self._state.rows = self._state.length = 1
        self._forward(torch.zeros(1, 1, dtype=torch.long), self._state.current)
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers) * rows * length
        self._state.rows, self._state.length = rows, length
        try:
            if self._device.type == "cpu" and size > psutil.virtual_memory().available:
                raise MemoryError  # Linux overcommits, and would fail only when the pages are written
            for layer in self._cache.layers:
                layer.lazy_initialization(layer.keys, layer.values)
        except (RuntimeError, MemoryError) as error:
            raise CriticError(
                f"a value model's keys and values for {rows} requests of up to {length} tokens need "
                f"{size / 2**30:.1f} GiB, which are not available.",
                "lower the engine's max_num_seqs or max_model_len.",
            ) from error

    def update(self, before: Sequence[RequestWithPrefix], rows: Sequence[RequestWithPrefix]) -> None:
        """Reorder the buffers after rows were removed, added or moved.

        Args:
            before: the previous rows, in the order of the buffers.
            rows: those of the next step.
        """
        previous = {id(row): index for index, row in enumerate(before)}
        lengths = [self._read_lengths[previous[id(row)]] if id(row) in previous else 0 for row in rows]
        moved = [(index, previous[id(row)]) for index, row in enumerate(rows) if previous.get(id(row), index) != index]
        if moved:
            targets, sources = torch.tensor(moved, device=self._device).T
            end = max(lengths[index] for index, _ in moved)
            with torch.inference_mode():
                for layer in self._cache.layers:
                    layer.move(targets, sources, end)
        self._read_lengths = lengths

    def read(self, rows: Sequence[RequestWithPrefix]) -> Tensor:
        """Compute the trunk's last hidden states at the ends of all prefixes.

        Args:
            rows: those of the last update; the engine appends to their output tokens, on the host.

        Returns:
            (R, H) float32.
        """
        lengths = [len(row.prompt_ids) + len(row.output_ids) for row in rows]
        behind = [index for index, length in enumerate(lengths) if self._read_lengths[index] < length - 1]
        if behind:
            self._prefill([(index, [*rows[index].prompt_ids, *rows[index].output_ids][:-1]) for index in behind])
        last = [row.output_ids[-1] if len(row.output_ids) else row.prompt_ids[-1] for row in rows]
        tokens, positions = torch.tensor([last, [length - 1 for length in lengths]], device=self._device)
        self._read_lengths = lengths
        if max(lengths) <= _MAX_LENGTH_RATIO * max(min(lengths), _MAX_CHUNK):
            step = _Step(self._row_indices[: len(rows)], positions, max(lengths), True)
            return self._forward(tokens[:, None], step)[:, 0].float()
        # Every row is padded to the longest, so rows of similar length are read together.
        parts, remaining = [], sorted(range(len(rows)), key=lengths.__getitem__)
        order = torch.tensor(remaining, device=self._device)
        while remaining:
            longest = _MAX_LENGTH_RATIO * max(lengths[remaining[0]], _MAX_CHUNK)
            similar = [index for index in remaining if lengths[index] <= longest]
            remaining = remaining[len(similar) :]
            indices = torch.tensor(similar, device=self._device)
            step = _Step(indices, positions[indices], lengths[similar[-1]], False)
            parts.append(self._forward(tokens[indices, None], step)[:, 0].float())
        states = torch.cat(parts)
        return torch.empty_like(states).index_copy_(0, order, states)

    def _prefill(self, prefixes: list[tuple[int, list[int]]]) -> None:
        """Read prefixes (row, tokens) from their beginnings, those of similar length together."""
        prefixes = sorted(prefixes, key=lambda one: len(one[1]))
        while prefixes:
            length = len(prefixes[-1][1])
            longest = prefixes[-max(1, _MAX_PREFILL_TOKENS // min(length, _MAX_CHUNK)) :]
            prefixes = prefixes[: -len(longest)]
            chunk = max(1, min(_MAX_CHUNK, _MAX_SCORES // (length * len(longest))))
            # The padding after a shorter prefix is invisible to its tokens, and overwritten as it grows.
            table = torch.tensor([ids + [0] * (length - len(ids)) for _, ids in longest], device=self._device)
            rows = torch.tensor([row for row, _ in longest], device=self._device)
            for start in range(0, length, chunk):
                self._forward(table[:, start : start + chunk], _Chunk(rows, start))

    def _forward(self, ids: Tensor, current: _Chunk | _Step) -> Tensor:
        """Run the trunk on tokens (N, S) of one pass and return its states (N, S, H)."""
        if isinstance(current, _Step):
            positions, end = current.positions[:, None], current.end
        else:
            end = current.start + ids.shape[1]
            positions = self._columns[None, current.start : end].expand(len(ids), -1)
        columns = self._columns[:end]
        masks = {
            kind: additive_mask(causal_mask(positions, columns, window), self._dtype)[:, None]
            for kind, window in self._reader.windows.items()
        }
        self._state.current = current
        with torch.inference_mode():
            return self._reader.forward(ids.to(self._device), masks, positions, self._cache, end)
