"""Recurrent memories of an engine's requests: one row per request in the batch, saved while a request is preempted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mavis.errors import DecodingError


class PreemptedMemories:
    """Saves the memories of requests that leave the batch, for as long as those requests can return.

    The engine reports a finished and a preempted request in the same way. Each saved memory therefore hangs on the
    request's own sampling parameters, which only a request that can return keeps alive. Requests that share their
    parameters are distinguished by the identity of their lists of output tokens.
    """

    def __init__(self) -> None:
        self._saved: dict[int, tuple[Sequence[int], int, Tensor]] = {}

    def save(self, output_ids: Sequence[int], memory: Tensor) -> None:
        """Save the memory (D,) of the request with these output tokens."""
        self._saved[id(output_ids)] = output_ids, len(output_ids), memory

    def restore(self, output_ids: Sequence[int]) -> Tensor:
        """Remove and return the memory (D,) of a request that returns.

        Raises:
            DecodingError: if none was saved, or the request has drawn tokens since.
        """
        saved, length, memory = self._saved.pop(id(output_ids), (None, 0, None))
        if saved is not output_ids or length != len(output_ids) or memory is None:
            raise DecodingError(
                f"a request joins the batch with {len(output_ids)} output tokens, but its memory has read {length}.",
                "report this: the engine moves requests in a way that a critic with a memory cannot follow.",
            )
        return memory


class RequestWithMemory(Protocol):
    """The parts of a request that this module reads."""

    output_ids: Sequence[int]
    preempted: PreemptedMemories


class BatchMemory:
    """The memories of the tilted rows of a batch.

        m_t = GRU(z_t, m_{t−1}),   one step for every token that is drawn

    A row that is still prefilling its prompt, or recomputing after preemption, also produces logits, but the engine
    discards the token drawn from them. Its memory therefore stays as it is until its first token has been kept.

    Args:
        size: D.
        device: of the memories.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.current = torch.zeros(0, size, device=device)
        """(R, D), before this step's states."""
        self.after_step: Tensor | None = None
        """(R, D), including this step's states; None until they have been computed."""
        self._prefilling: list[tuple[int, Sequence[int], int]] = []
        """Rows without a token since they joined: index, output tokens, and how many of those there were at joining."""

    def advance(self) -> None:
        """Adopt the memories of the last step, except for rows whose token was discarded."""
        if self.after_step is None:
            return
        after = self.after_step
        if self._prefilling:
            self._prefilling = [row for row in self._prefilling if len(row[1]) == row[2]]
            waiting = [index for index, _, _ in self._prefilling]
            if waiting:
                indices = torch.tensor(waiting, device=after.device)
                after = after.index_copy(0, indices, self.current.index_select(0, indices))
        self.current, self.after_step = after, None

    def update(self, before: Sequence[RequestWithMemory], rows: Sequence[RequestWithMemory]) -> None:
        """Reorder the memories after rows were removed, added or moved.

        Args:
            before: the previous rows, in the order of `current`.
            rows: those of the next step.

        Raises:
            DecodingError: if a request returns whose memory was not saved.
        """
        previous = {id(row): index for index, row in enumerate(before)}
        remaining = {id(row) for row in rows}
        for index, row in enumerate(before):
            if id(row) not in remaining and len(row.output_ids):  # before the first token there is nothing to save
                row.preempted.save(row.output_ids, self.current[index].clone())
        prefilling = {index for index, _, _ in self._prefilling}
        current = self.current.new_zeros(len(rows), self.current.shape[1])
        kept = [(index, previous[id(row)]) for index, row in enumerate(rows) if id(row) in previous]
        if kept:
            targets, sources = torch.tensor(kept, device=current.device).T
            current = current.index_copy(0, targets, self.current.index_select(0, sources))
        self._prefilling = []
        for index, row in enumerate(rows):
            if id(row) in previous and previous[id(row)] not in prefilling:
                continue
            self._prefilling.append((index, row.output_ids, len(row.output_ids)))
            if id(row) not in previous and len(row.output_ids):
                current[index] = row.preempted.restore(row.output_ids)
        self.current = current
