"""The memories of an engine's requests: one row each while they are in the batch, set aside while they are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mavis.errors import DecodingError


class Parked:
    """Memories of requests that have left the batch, kept where they end together with the request.

    The engine does not tell one that is done from one that has been preempted and comes back; so what is set aside
    hangs on the request's own parameters, which only a request that can come back keeps alive. Requests that share
    their parameters are told apart by their lists of drawn tokens.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Sequence[int], int, Tensor]] = {}

    def put(self, outputs: Sequence[int], memory: Tensor) -> None:
        """Set a memory (D,) aside for the request that has drawn these tokens."""
        self._kept[id(outputs)] = outputs, len(outputs), memory

    def take(self, outputs: Sequence[int]) -> Tensor:
        """Take the memory (D,) of a request that comes back.

        Raises:
            DecodingError: if there is none, or the request has drawn other tokens since.
        """
        kept, drawn, memory = self._kept.pop(id(outputs), (None, 0, None))
        if kept is not outputs or drawn != len(outputs) or memory is None:
            raise DecodingError(
                f"a request joins the batch with {len(outputs)} tokens drawn, but its memory has read {drawn}.",
                "report this: the engine hands requests on in a way that a critic with a memory cannot follow.",
            )
        return memory


class HasMemory(Protocol):
    """A request as this module sees it."""

    outputs: Sequence[int]
    parked: Parked


class RequestMemories:
    """The memories of the tilted rows of a batch.

        m_t = GRU(z_t, m_{t−1}),   one step for every token that is drawn

    A row that still reads its prompt, or reads again what it had read before it was preempted, gives logits as well,
    from which no token is kept: its memory stays where it is until its first token has been drawn.

    Args:
        size: D.
        device: of the memories.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.now = torch.zeros(0, size, device=device)
        """(R, D), of the states before this step's."""
        self.after: Tensor | None = None
        """(R, D), with this step's; None until it has been computed."""
        self._reading: list[tuple[int, Sequence[int], int]] = []
        """Rows that have not drawn a token since they joined: where, what they have drawn, how many at that time."""

    def raise_pending(self) -> None:
        """Go on to the memories of the last step, except for rows whose token has not been kept."""
        if self.after is None:
            return
        after = self.after
        if self._reading:
            self._reading = [row for row in self._reading if len(row[1]) == row[2]]
            still = [place for place, _, _ in self._reading]
            if still:
                places = torch.tensor(still, device=after.device)
                after = after.index_copy(0, places, self.now.index_select(0, places))
        self.now, self.after = after, None

    def change(self, before: Sequence[HasMemory], rows: Sequence[HasMemory]) -> None:
        """Let rows leave, come and change places.

        Args:
            before: the rows until now, in the order of `now`.
            rows: those of the next step.

        Raises:
            DecodingError: if a request comes back whose memory is not known.
        """
        was = {id(row): at for at, row in enumerate(before)}
        stay = {id(row) for row in rows}
        for at, row in enumerate(before):
            if id(row) not in stay and len(row.outputs):  # before the first token there is nothing to remember
                row.parked.put(row.outputs, self.now[at].clone())
        reading = {place for place, _, _ in self._reading}
        now = self.now.new_zeros(len(rows), self.now.shape[1])
        here = [(at, was[id(row)]) for at, row in enumerate(rows) if id(row) in was]
        if here:
            targets, sources = torch.tensor(here, device=now.device).T
            now = now.index_copy(0, targets, self.now.index_select(0, sources))
        self._reading = []
        for at, row in enumerate(rows):
            if id(row) in was and was[id(row)] not in reading:
                continue
            self._reading.append((at, row.outputs, len(row.outputs)))
            if id(row) not in was and len(row.outputs):
                now[at] = row.parked.take(row.outputs)
        self.now = now
