"""A recurrent memory of the response: one vector per sequence, found again by the ids that led to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mavis.math.position_hash import position_multipliers
from mavis.policies.forward_pass import ResponsePosition


class RecurrentMemory(nn.Module):
    """A recurrent network over the states of a response, begun at the prompt's last token.

        m_t = GRU(z_t, m_{t−1}),   m_{−1} = 0,   z_t the state from which the response's token t is drawn

    Args:
        input_size: H, size of a state.
        size: D, size of the memory.

    Source: GRU: Cho et al. (EMNLP 2014).
    """

    def __init__(self, input_size: int, size: int) -> None:
        super().__init__()
        self.network = nn.GRU(input_size, size, batch_first=True)

    def forward(self, states: Tensor) -> Tensor:
        """Remember whole responses: (B, T, H) float32 to (B, T, D)."""
        memories: Tensor = self.network(states)[0]
        return memories

    def step(self, states: Tensor, before: Tensor | None) -> Tensor:
        """Remember one more state of each row.

        Args:
            states: (B, H) float32.
            before: (B, D), or None at a response's first token.

        Returns:
            (B, D).
        """
        if before is None:
            before = states.new_zeros(len(states), self.network.hidden_size)
        cell: Any = self.network
        after: Tensor = torch.gru_cell(
            states, before, cell.weight_ih_l0, cell.weight_hh_l0, cell.bias_ih_l0, cell.bias_hh_l0
        )
        return after


class SequenceMemories:
    """The memories of the sequences that one policy is generating, per thread.

    Beams change places, so a row's memory is looked up by a key of the ids that led to it and of how many of them are
    tokens, for padding cannot be told from tokens by ids.
    """

    def __init__(self) -> None:
        self._thread = threading.local()
        self._factors = torch.empty(0, dtype=torch.long)

    def advance(
        self,
        memory: RecurrentMemory,
        prefix_ids: Tensor,
        states: Tensor,
        position: ResponsePosition,
        missing: Callable[[Tensor], None],
    ) -> Tensor:
        """Return the memory of every row after its latest state.

        Args:
            memory: the network.
            prefix_ids: (B, L) integer, the ids that led to the states.
            states: (B, H) float32.
            place: where in their responses the rows are.
            missing: told of a bool scalar that is True if a row that does not begin a response is not known; it raises,
                at once or when the answer has arrived from an accelerator.

        Returns:
            (B, D).
        """
        levels: dict[int, tuple[Tensor, Tensor]] = getattr(self._thread, "levels", {})
        length = prefix_ids.shape[1]
        factors = self._factors_for(length, prefix_ids.device)
        products = prefix_ids * factors[:length]
        now = products.sum(dim=1) + position.lengths.to(prefix_ids.device) * _OF_LENGTH
        asked_before = levels.get(length)
        if asked_before is not None and not position.starts_response and _equal(asked_before[0], now):
            return asked_before[1]
        before = None
        if not position.starts_response:
            earlier = now - products[:, -1] - _OF_LENGTH
            before = self._find(levels.get(length - 1), earlier, position.starts_response, missing)
        after = memory.step(states, before)
        kept = (
            {}
            if position.starts_response
            else {past: level for past, level in levels.items() if past >= position.shortest_resumable}
        )
        self._thread.levels = kept | {length: (now, after)}
        return after

    def _find(
        self,
        known: tuple[Tensor, Tensor] | None,
        keys: Tensor,
        starts_response: bool | None,
        missing: Callable[[Tensor], None],
    ) -> Tensor | None:
        if known is None:
            if starts_response is False:
                missing(torch.tensor(True))
            return None
        known_keys, memories = known
        if _equal(known_keys, keys):
            return memories
        same = keys[:, None] == known_keys
        lost = ~same.any(dim=1).all()
        if starts_response is None and bool(lost):
            return None
        missing(lost)
        return memories[same.int().argmax(dim=1)]

    def _factors_for(self, length: int, device: torch.device) -> Tensor:
        """Give a number for each position, at least `length` of them."""
        kept = self._factors
        if len(kept) < length or kept.device != device:
            kept = self._factors = position_multipliers(torch.arange(max(1_024, 2 * length))).to(device)
        return kept


_OF_LENGTH = int(position_multipliers(torch.tensor(-1)))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two sets of keys are the same in order; on an accelerator it is not known without waiting."""
    return one.device.type == "cpu" and torch.equal(one, other)
