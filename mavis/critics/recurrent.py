"""Recurrent memories of responses, one vector per sequence, looked up by the ids of the prefix."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mavis.math.position_hash import position_multipliers
from mavis.policies.forward_pass import ResponsePosition


class RecurrentMemory(nn.Module):
    """A recurrent network over the states of a response, beginning at the last token of the prompt.

        m_t = GRU(z_t, m_{t−1}),   m_{−1} = 0,   z_t the state from which token t of the response is drawn

    Args:
        input_size: H, size of a state.
        size: D, size of the memory.

    Source: GRU: Cho et al. (EMNLP 2014).
    """

    def __init__(self, input_size: int, size: int) -> None:
        super().__init__()
        self.network = nn.GRU(input_size, size, batch_first=True)

    def forward(self, states: Tensor) -> Tensor:
        """Compute the memories of whole responses: (B, T, H) float32 to (B, T, D)."""
        memories: Tensor = self.network(states)[0]
        return memories

    def step(self, states: Tensor, memories: Tensor | None) -> Tensor:
        """Update the memories by one state of each row.

        Args:
            states: (B, H) float32.
            memories: (B, D), or None at the first token of responses.

        Returns:
            (B, D).
        """
        if memories is None:
            memories = states.new_zeros(len(states), self.network.hidden_size)
        cell: Any = self.network
        updated: Tensor = torch.gru_cell(
            states, memories, cell.weight_ih_l0, cell.weight_hh_l0, cell.bias_ih_l0, cell.bias_hh_l0
        )
        return updated


class SequenceMemories:
    """The memories of the sequences that a policy is generating, per thread.

    Beam search reorders rows, so the memory of a row is looked up by a hash of its ids and of the number of tokens;
    the latter because ids alone do not distinguish padding from tokens. Requests inside vLLM keep theirs in
    `mavis/vllm/recurrent_memory.py`.
    """

    def __init__(self) -> None:
        self._thread = threading.local()
        self._multipliers = torch.empty(0, dtype=torch.long)

    def advance(
        self,
        memory: RecurrentMemory,
        prefix_ids: Tensor,
        states: Tensor,
        position: ResponsePosition,
        raise_if_unknown: Callable[[Tensor], None],
    ) -> Tensor:
        """Return the memory of every row after its latest state.

        Args:
            memory: the network.
            prefix_ids: (B, L) integer, the ids that led to the states.
            states: (B, H) float32.
            position: where in their responses the rows are.
            raise_if_unknown: called with a bool scalar that is True if a row that does not start a response is unknown;
                it raises, now or once the result has arrived from an accelerator.

        Returns:
            (B, D).
        """
        known: dict[int, tuple[Tensor, Tensor]] = getattr(self._thread, "known", {})
        length = prefix_ids.shape[1]
        multipliers = self._multipliers_for(length, prefix_ids.device)
        products = prefix_ids * multipliers[:length]
        keys = products.sum(dim=1) + position.lengths.to(prefix_ids.device) * _LENGTH_MULTIPLIER
        same_length = known.get(length)
        if same_length is not None and not position.starts_response and _equal(same_length[0], keys):
            return same_length[1]
        memories = None
        if not position.starts_response:
            parent_keys = keys - products[:, -1] - _LENGTH_MULTIPLIER
            memories = self._find(known.get(length - 1), parent_keys, position.starts_response, raise_if_unknown)
        memories = memory.step(states, memories)
        kept = (
            {}
            if position.starts_response
            else {shorter: entry for shorter, entry in known.items() if shorter >= position.shortest_resumable}
        )
        self._thread.known = kept | {length: (keys, memories)}
        return memories

    def _find(
        self,
        known: tuple[Tensor, Tensor] | None,
        keys: Tensor,
        starts_response: bool | None,
        raise_if_unknown: Callable[[Tensor], None],
    ) -> Tensor | None:
        """Return the memories of the rows with these keys, or None if the rows start responses."""
        if known is None:
            if starts_response is False:
                raise_if_unknown(torch.tensor(True))
            return None
        known_keys, memories = known
        if _equal(known_keys, keys):
            return memories
        same = keys[:, None] == known_keys
        unknown = ~same.any(dim=1).all()
        if starts_response is None and bool(unknown):
            return None
        raise_if_unknown(unknown)
        return memories[same.int().argmax(dim=1)]

    def _multipliers_for(self, length: int, device: torch.device) -> Tensor:
        """Return the hash multipliers of at least `length` positions."""
        multipliers = self._multipliers
        if len(multipliers) < length or multipliers.device != device:
            positions = torch.arange(max(1_024, 2 * length))
            multipliers = self._multipliers = position_multipliers(positions).to(device)
        return multipliers


_LENGTH_MULTIPLIER = int(position_multipliers(torch.tensor(-1)))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether keys are equal in order; False on an accelerator, where the host would have to wait."""
    return one.device.type == "cpu" and torch.equal(one, other)
