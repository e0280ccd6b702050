"""The prefixes of an engine's requests as a value model reads them, with its keys and values in room set aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mavis.critics.trunk.kv_cache import added, seen_from
from mavis.critics.trunk.reader import PrefixReader
from mavis.errors import CriticError

_TOKENS_AT_ONCE, _POSITIONS_AT_ONCE, _SCORES_AT_ONCE = 4096, 512, 1 << 24
"""How much of prefixes that are new is read in one pass: tokens, positions of each, and what all of these see."""
_ALIKE = 4
"""How many times as long the longest of prefixes may be that are read on side by side."""


class HasPrefix(Protocol):
    """A request as this module sees it."""

    prompt: Sequence[int]
    outputs: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Positions from `start` on of some rows, which have been read up to there."""

    rows: Tensor
    start: int

    def write(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Write keys or values (N, heads, S, D) and return those of all positions up to the last of them."""
        end = self.start + new.shape[2]
        buffer[self.rows, :, self.start : end] = new.to(buffer.dtype)
        return buffer[:, :, :end].index_select(0, self.rows) if self.start else new


@dataclass(frozen=True, slots=True)
class _Step:
    """The last positions (R,) of some rows (R,), the end of the longest, and whether they are the first R of all."""

    rows: Tensor
    positions: Tensor
    end: int
    first: bool

    def write(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Write keys or values (R, heads, 1, D) and return those of all positions up to the last."""
        buffer[self.rows, :, self.positions] = new[:, :, 0].to(buffer.dtype)
        all_of_them = buffer[:, :, : self.end]
        return all_of_them[: len(new)] if self.first else all_of_them.index_select(0, self.rows)


@dataclass(slots=True)
class _Room:
    """How much there is room for, and what is read now, for all layers."""

    rows: int
    length: int
    now: _Piece | _Step


class _Layer(CacheLayerMixin):
    """The keys and values of one layer, a row for each request, whose first token stands at position 0."""

    is_sliding = False  # the masks say what a window hides

    def __init__(self, room: _Room) -> None:
        super().__init__()
        self.room = room

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set the room aside."""
        rows, length = self.room.rows, self.room.length
        self.keys, self.values = (  # numbers, for what is hidden is still multiplied, by 0
            one.new_zeros(rows, one.shape[1], length, one.shape[3]) for one in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write what is read now, and return all that it sees."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        now = self.room.now
        return now.write(self.keys, key_states), now.write(self.values, value_states)

    def move(self, targets: Tensor, sources: Tensor, end: int) -> None:
        """Let rows be what others are now, up to a position."""
        for buffer in (self.keys, self.values):
            buffer[targets, :, :end] = buffer[sources, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return what no trunk asks, whose masks are given: positions that attention will see, and the first."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: positions are given."""
        return 0

    def get_max_length(self) -> int:
        """Return the positions that there is room for."""
        return self.room.length


class ServedPrefixes:
    """Reads every token of the tilted requests once with a value model's trunk, whatever becomes of the batch.

    A request that joins, or comes back after it was preempted, is read from its beginning; from then on a token a step.
    The last token is read in every step, so that one for which no token was kept, while a long prompt is still being
    read by the policy, costs nothing but that.

    Args:
        trunk: of a value model, on its device; see `PrefixReader` for what it has to be. Its weights stay as they are.
        rows: the most requests in a batch.
        length: the most tokens of a request.

    Raises:
        CriticError: if the trunk's states cannot be computed step by step, it has learnt fewer positions, or there is
            no memory for so many.
    """

    def __init__(self, trunk: Any, rows: int, length: int) -> None:
        self._reader = reader = PrefixReader(trunk)  # tries the trunk, and finds out which masks it takes
        if reader.positions is not None and reader.positions < length:
            raise CriticError(
                f"the engine takes requests of up to {length} tokens, but the value model has learnt "
                f"{reader.positions} positions.",
                f"pass --max-model-len {reader.positions}, or serve a value model with rotary positions.",
            )
        weight = trunk.get_input_embeddings().weight
        self._device, self._dtype = weight.device, weight.dtype
        self._columns = torch.arange(length, device=self._device)
        self._places = torch.arange(rows, device=self._device)
        self._room = _Room(rows, length, _Piece(self._places[:1], 0))
        self._cache = Cache(layer_class_to_replicate=partial(_Layer, self._room))
        self._read: list[int] = []
        """How many tokens of each row have been read."""
        self._set_aside()

    def _set_aside(self) -> None:
        """Make the buffers, after a look at how large they would be."""
        rows, length = self._room.rows, self._room.length
        self._room.rows = self._room.length = 1
        self._pass(torch.zeros(1, 1, dtype=torch.long), self._room.now)
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers) * rows * length
        self._room.rows, self._room.length = rows, length
        try:
            if self._device.type == "cpu" and size > psutil.virtual_memory().available:
                raise MemoryError  # which the system would find out too late
            for layer in self._cache.layers:
                layer.lazy_initialization(layer.keys, layer.values)
        except (RuntimeError, MemoryError) as error:
            raise CriticError(
                f"there is no memory for {size / 2**30:.1f} GiB, a value model's keys and values of {rows} requests of "
                f"up to {length} tokens.",
                "lower the engine's max_num_seqs or max_model_len.",
            ) from error

    def change(self, before: Sequence[HasPrefix], rows: Sequence[HasPrefix]) -> None:
        """Let rows leave, come and change places.

        Args:
            before: the rows until now, in the order in which they are kept.
            rows: those of the next step.
        """
        was = {id(row): at for at, row in enumerate(before)}
        read = [self._read[was[id(row)]] if id(row) in was else 0 for row in rows]
        moved = [(at, was[id(row)]) for at, row in enumerate(rows) if was.get(id(row), at) != at]
        if moved:
            targets, sources = torch.tensor(moved, device=self._device).T
            end = max(read[at] for at, _ in moved)
            with torch.inference_mode():
                for layer in self._cache.layers:
                    layer.move(targets, sources, end)
        self._read = read

    def read(self, rows: Sequence[HasPrefix]) -> Tensor:
        """Compute the trunk's last hidden states at the ends of all prefixes.

        Args:
            rows: those of the last change; the engine lets their drawn tokens grow, on the host.

        Returns:
            (R, H) float32.
        """
        lengths = [len(row.prompt) + len(row.outputs) for row in rows]
        behind = [at for at, length in enumerate(lengths) if self._read[at] < length - 1]
        if behind:
            self._catch_up([(at, [*rows[at].prompt, *rows[at].outputs][:-1]) for at in behind])
        last = [row.outputs[-1] if len(row.outputs) else row.prompt[-1] for row in rows]
        tokens, positions = torch.tensor([last, [length - 1 for length in lengths]], device=self._device)
        self._read = lengths
        if max(lengths) <= _ALIKE * max(min(lengths), _POSITIONS_AT_ONCE):
            step = _Step(self._places[: len(rows)], positions, max(lengths), True)
            return self._pass(tokens[:, None], step)[:, 0].float()
        # All positions of the longest are worked on for each row, so few long ones must not make many short ones wait.
        parts, left = [], sorted(range(len(rows)), key=lengths.__getitem__)
        order = torch.tensor(left, device=self._device)
        while left:
            most = _ALIKE * max(lengths[left[0]], _POSITIONS_AT_ONCE)
            alike = [at for at in left if lengths[at] <= most]
            left = left[len(alike) :]
            places = torch.tensor(alike, device=self._device)
            step = _Step(places, positions[places], lengths[alike[-1]], False)
            parts.append(self._pass(tokens[places, None], step)[:, 0].float())
        states = torch.cat(parts)
        return torch.empty_like(states).index_copy_(0, order, states)

    def _catch_up(self, new: list[tuple[int, list[int]]]) -> None:
        """Read prefixes (row, tokens) from their beginnings; those of like length side by side."""
        new = sorted(new, key=lambda one: len(one[1]))
        while new:
            length = len(new[-1][1])
            some = new[-max(1, _TOKENS_AT_ONCE // min(length, _POSITIONS_AT_ONCE)) :]
            new = new[: -len(some)]
            piece = max(1, min(_POSITIONS_AT_ONCE, _SCORES_AT_ONCE // (length * len(some))))
            # What stands after a shorter one is seen by no token of it, and written over as it grows.
            table = torch.tensor([ids + [0] * (length - len(ids)) for _, ids in some], device=self._device)
            places = torch.tensor([at for at, _ in some], device=self._device)
            for start in range(0, length, piece):
                self._pass(table[:, start : start + piece], _Piece(places, start))

    def _pass(self, ids: Tensor, now: _Piece | _Step) -> Tensor:
        """Read tokens (N, S) where `now` says: (N, S, H)."""
        if isinstance(now, _Step):
            positions, end = now.positions[:, None], now.end
        else:
            end = now.start + ids.shape[1]
            positions = self._columns[None, now.start : end].expand(len(ids), -1)
        columns = self._columns[:end]
        masks = {
            kind: added(seen_from(positions, columns, window), self._dtype)[:, None]
            for kind, window in self._reader.windows.items()
        }
        self._room.now = now
        with torch.inference_mode():
            return self._reader.forward(ids.to(self._device), masks, positions, self._cache, end)
