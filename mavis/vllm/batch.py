"""The tilts of a batch whose rows come, go and change places, as tensors that stay until it changes again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mavis.critics import ValueModelCritic
from mavis.vllm.paged_prefixes import ServedPrefixes
from mavis.vllm.recurrent_rows import Parked, RequestMemories
from mavis.vllm.request_arguments import Tilt

_NARROW = 1024
"""The most candidates whose vectors are gathered for each row.

One row that asks for nearly all tokens would have them gathered for all rows; such rows are a group of their own, which
shares the vectors of all tokens."""


@dataclass(eq=False, slots=True)
class Row:
    """A tilted request's place in the batch.

    Args:
        tilt: how it is tilted.
        outputs: the tokens that it has drawn; the engine lets them grow.
        parked: where its memory waits while it has no place in the batch.
        prompt: its tokens, which a value model reads.
    """

    tilt: Tilt
    outputs: Sequence[int]
    parked: Parked
    prompt: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class _Group:
    """Tilted rows that choose among candidates, or among every token.

    Args:
        members: (G,) integer, which of the tilted rows; None for all of them.
        places: (G,) integer, their rows of the batch; None if they are the batch.
        top_k: the most candidates of any of them; None for every token.
        wide: whether these are so many that every token's tilt is computed, and theirs taken from it.
        beyond: (G, top_k) bool, True on ranks beyond a row's own K; None if all have the same.
        lam: (G, M) float32.
        temperature: (G, 1) float32, or None where all are 1.
    """

    members: Tensor | None
    places: Tensor | None
    top_k: int | None
    wide: bool
    beyond: Tensor | None
    lam: Tensor
    temperature: Tensor | None


@dataclass(frozen=True, slots=True)
class _Tensors:
    """What a step needs, made when the batch changes.

    Args:
        places: (R,) integer, the tilted rows of the batch; None if they are all.
        groups: of the tilted rows, one to three.
    """

    places: Tensor | None
    groups: list[_Group]


class TiltedBatch:
    """Which rows of an engine's batch are tilted, and how; tilts their logits in place.

        z_a + T · tilt_a  over the K candidates of each row, −inf elsewhere

    The engine's own division by T then gives the logits of π(a|s) ∝ π_ref(a|s)^{1/T} · exp(tilt_a), up to a constant
    that no softmax sees. Rows without a tilt stay as they are, bit for bit.

    Args:
        critic: of hidden states, or a value model in its `token` readout, on the device of the engine's states.
        room: the most rows of the batch, and the most tokens of each; for a value model.

    Source: MAVIS, arXiv 2508.13415.
    """

    def __init__(self, critic: Any, room: tuple[int, int] = (0, 0)) -> None:
        self.critic = critic
        self.device = critic.reward_mean.device
        self._rows: list[Row | None] = []
        self._tensors: _Tensors | None = None
        memory = getattr(critic, "memory", None)
        self._memories = RequestMemories(memory.network.hidden_size, self.device) if memory is not None else None
        self._prefixes = ServedPrefixes(critic.trunk, *room) if isinstance(critic, ValueModelCritic) else None

    @property
    def size(self) -> int:
        """How many rows the batch has."""
        return len(self._rows)

    @property
    def tilted(self) -> list[Row]:
        """The rows that are tilted, in the order of the batch."""
        return [row for row in self._rows if row is not None]

    @property
    def any_tilted(self) -> bool:
        """Whether any row is tilted."""
        return self._tensors is not None

    def step(self) -> None:
        """Take note that the tokens of the last step have been drawn, before the batch changes for the next one."""
        if self._memories is not None:
            self._memories.raise_pending()

    def change(
        self,
        size: int,
        removed: Sequence[int],
        added: Sequence[tuple[int, Row | None]],
        moved: Sequence[tuple[int, int, bool]],
    ) -> None:
        """Let rows leave, then others come, then change places.

        Args:
            size: number of rows afterwards.
            removed: places that are left.
            added: places and who takes them, None for a request without a tilt; who was there leaves.
            moved: from where, to where, and whether it is an exchange; else who was there leaves.
        """
        if self._tensors is None and all(row is None for _, row in added):
            self._rows = [None] * size  # a change among plain requests is nothing to us
            return
        rows, before = self._rows, self.tilted
        most = max([size, len(rows), *(at + 1 for at, _ in added), *(max(one, two) + 1 for one, two, _ in moved)])
        rows = rows + [None] * (most - len(rows))
        for at in removed:
            rows[at] = None
        for at, row in added:
            rows[at] = row
        for one, two, exchange in moved:
            rows[one], rows[two] = (rows[two] if exchange else None), rows[one]
        self._rows = rows[:size]
        if self._memories is not None:
            self._memories.change(before, self.tilted)
        if self._prefixes is not None:
            self._prefixes.change(before, self.tilted)
        self._tensors = self._build()

    def apply(self, logits: Tensor, states: Tensor) -> Tensor:
        """Tilt one step.

        Args:
            logits: (B, V) float32; changed in place.
            states: (B, H) floating, the hidden states that they were computed from.

        Returns:
            `logits`.
        """
        tensors = self._tensors
        if tensors is None:
            return logits
        inputs = self._inputs(states if tensors.places is None else states.index_select(0, tensors.places))
        for group in tensors.groups:
            own = inputs if group.members is None else inputs.index_select(0, group.members)
            _tilt(logits, own, group, self.critic)
        return logits

    def _inputs(self, states: Tensor) -> Tensor:
        """Compute what the heads read for the tilted rows, (R, I), from the policy's states (R, H) or without them."""
        if self._prefixes is not None:
            inputs: Tensor = self.critic.inputs_of_ends(self._prefixes.read(self.tilted))
            return inputs
        memories = self._memories
        inputs, after = self.critic.inputs_of_step(states, memories.now if memories is not None else None)
        if memories is not None:
            memories.after = after
        return inputs

    def _build(self) -> _Tensors | None:
        tilts = [row.tilt for row in self.tilted]
        if not tilts:
            return None
        places = [at for at, row in enumerate(self._rows) if row is not None]
        kinds: dict[str, list[int]] = {}
        for at, tilt in enumerate(tilts):
            kind = "every" if tilt.top_k is None else "wide" if tilt.top_k > _NARROW else "narrow"
            kinds.setdefault(kind, []).append(at)
        groups = [self._group(members, places, tilts) for members in kinds.values()]
        return _Tensors(self._integers(places) if len(places) < self.size else None, groups)

    def _group(self, members: list[int], places: list[int], tilts: list[Tilt]) -> _Group:
        own = [tilts[at] for at in members]
        counts = [tilt.top_k for tilt in own if tilt.top_k is not None]
        beyond = None
        if counts and min(counts) < max(counts):
            beyond = torch.arange(max(counts))[None] >= torch.tensor(counts)[:, None]
            beyond = beyond.to(self.device)
        warm = [tilt.temperature for tilt in own]
        return _Group(
            members=self._integers(members) if len(members) < len(tilts) else None,
            places=self._integers([places[at] for at in members]) if len(members) < self.size else None,
            top_k=max(counts) if counts else None,
            wide=bool(counts) and max(counts) > _NARROW,
            beyond=beyond,
            lam=torch.stack([tilt.lam for tilt in own]).to(self.device),
            temperature=torch.tensor(warm, device=self.device)[:, None] if set(warm) != {1.0} else None,
        )

    def _integers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def _tilt(logits: Tensor, inputs: Tensor, group: _Group, critic: Any) -> None:
    """Tilt the rows of one group in place."""
    places = group.places
    if group.top_k is None:
        tilt = critic.tilt_of_inputs(inputs, None, group.lam)
        tilt = tilt if group.temperature is None else tilt * group.temperature
        _ = logits.add_(tilt) if places is None else logits.index_add_(0, places, tilt)
        return
    own = logits if places is None else logits.index_select(0, places)
    # The ranks of different K have to be known; where K is the same, sorting would be for nothing.
    values, ids = own.topk(group.top_k, sorted=group.beyond is not None)
    tilt = critic.tilt_of_inputs(inputs, None if group.wide else ids, group.lam)
    tilt = tilt.gather(1, ids) if group.wide else tilt
    values += tilt if group.temperature is None else tilt * group.temperature
    if group.beyond is not None:
        values.masked_fill_(group.beyond, -torch.inf)
    if places is None:
        logits.fill_(-torch.inf).scatter_(1, ids, values)
    else:
        logits.index_fill_(0, places, -torch.inf)
        logits[places[:, None], ids] = values
