"""The tilted rows of an engine's batch, grouped into tensors that are rebuilt only when the batch changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mavis.critics import ValueModelCritic
from mavis.vllm.recurrent_memory import BatchMemory, PreemptedMemories
from mavis.vllm.request_arguments import Tilt
from mavis.vllm.value_model_runner import ValueModelRunner

_MAX_GATHERED = 1024
"""The most candidates whose token vectors are gathered row by row.

Gathering is padded to the largest K, so one request with nearly the whole vocabulary as candidates would inflate the
gather of every other row. Such requests form a group of their own, which computes the tilt of every token instead."""


@dataclass(eq=False, slots=True)
class TiltedRow:
    """A tilted request in the batch.

    Args:
        tilt: how it is tilted.
        output_ids: the tokens drawn so far; the engine appends to this list.
        preempted: keeps its recurrent memory while it is out of the batch.
        prompt_ids: the tokens of its prompt, which a value model reads.
    """

    tilt: Tilt
    output_ids: Sequence[int]
    preempted: PreemptedMemories
    prompt_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class _Group:
    """G tilted rows whose tilt is computed in one call.

    Args:
        members: (G,) integer, their indices among the tilted rows; None if the group holds all of them.
        rows: (G,) integer, their rows in the batch; None if the group is the whole batch.
        top_k: the largest K of the group; None if every token is a candidate.
        dense: whether to compute the tilt of every token and select the candidates' afterwards.
        beyond_k: (G, top_k) bool, True for ranks beyond a row's own K; None if all rows have the same K.
        lam: (G, M) float32.
        temperature: (G, 1) float32; None if all are 1.
    """

    members: Tensor | None
    rows: Tensor | None
    top_k: int | None
    dense: bool
    beyond_k: Tensor | None
    lam: Tensor
    temperature: Tensor | None


@dataclass(frozen=True, slots=True)
class _StepTensors:
    """The tensors of a decoding step, rebuilt when the batch changes.

    Args:
        rows: (R,) integer, the tilted rows of the batch; None if all rows are tilted.
        groups: one to three groups that together hold the tilted rows.
    """

    rows: Tensor | None
    groups: list[_Group]


class TiltedBatch:
    """Tracks which rows of an engine's batch are tilted, and tilts their logits in place.

        z_a + T · tilt_a  over the K candidates of each row, −inf elsewhere

    The engine then divides by T, which gives the logits of π(a|s) ∝ π_ref(a|s)^{1/T} · exp(tilt_a) up to a constant
    that the softmax cancels. Rows without a tilt stay bit-identical.

    Args:
        critic: a hidden-state critic, or a value model with the `token` readout, on the device of the engine's states.
        capacity: the most rows of a batch and the most tokens of a request; only a value model needs it.

    Examples:
        >>> import mavis
        >>> import torch
        >>> from mavis.vllm.batch import TiltedBatch, TiltedRow
        >>> from mavis.vllm.recurrent_memory import PreemptedMemories
        >>> from mavis.vllm.request_arguments import Tilt
        >>> policy, _ = mavis.embedded.load()
        >>> batch = TiltedBatch(mavis.HiddenStateCritic.for_policy(policy, ["good"]))
        >>> row = TiltedRow(Tilt(torch.ones(1), top_k=5, temperature=1.0), [], PreemptedMemories())
        >>> batch.update(2, removed=[], added=[(0, None), (1, row)], moved=[])
        >>> batch.apply(torch.randn(2, 2048), torch.randn(2, 128)).isfinite().sum(1).tolist()
        [2048, 5]

    Source: MAVIS, arXiv 2508.13415.
    """

    def __init__(self, critic: Any, capacity: tuple[int, int] = (0, 0)) -> None:
        self.critic = critic
        self.device = critic.reward_mean.device
        self._rows: list[TiltedRow | None] = []
        self._tensors: _StepTensors | None = None
        memory = getattr(critic, "memory", None)
        self._memory = BatchMemory(memory.network.hidden_size, self.device) if memory is not None else None
        self._value_model = ValueModelRunner(critic.trunk, *capacity) if isinstance(critic, ValueModelCritic) else None

    @property
    def size(self) -> int:
        """The number of rows in the batch."""
        return len(self._rows)

    @property
    def tilted(self) -> list[TiltedRow]:
        """The tilted rows, in batch order."""
        return [row for row in self._rows if row is not None]

    @property
    def any_tilted(self) -> bool:
        """Whether any row is tilted."""
        return self._tensors is not None

    def advance(self) -> None:
        """Advance the recurrent memories past the tokens just drawn; call it before `update` in every step."""
        if self._memory is not None:
            self._memory.advance()

    def update(
        self,
        size: int,
        removed: Sequence[int],
        added: Sequence[tuple[int, TiltedRow | None]],
        moved: Sequence[tuple[int, int, bool]],
    ) -> None:
        """Remove, then add, then move rows, as the engine did.

        Args:
            size: the number of rows afterwards.
            removed: rows whose requests left.
            added: rows and the requests that took them, None for one without a tilt; a previous occupant leaves.
            moved: source, target, and whether the two are swapped; otherwise the target's previous occupant leaves.
        """
        if self._tensors is None and all(row is None for _, row in added):
            self._rows = [None] * size  # nothing was tilted and nothing is
            return
        rows, before = self._rows, self.tilted
        largest = max([size, len(rows), *(at + 1 for at, _ in added), *(max(one, two) + 1 for one, two, _ in moved)])
        rows = rows + [None] * (largest - len(rows))
        for at in removed:
            rows[at] = None
        for at, row in added:
            rows[at] = row
        for source, target, swap in moved:
            rows[source], rows[target] = (rows[target] if swap else None), rows[source]
        self._rows = rows[:size]
        if self._memory is not None:
            self._memory.update(before, self.tilted)
        if self._value_model is not None:
            self._value_model.update(before, self.tilted)
        self._tensors = self._build()

    def apply(self, logits: Tensor, states: Tensor) -> Tensor:
        """Tilt one step.

        Args:
            logits: (B, V) float32; changed in place.
            states: (B, H) floating, the hidden states from which the logits were computed.

        Returns:
            `logits`.
        """
        tensors = self._tensors
        if tensors is None:
            return logits
        inputs = self._inputs(states if tensors.rows is None else states.index_select(0, tensors.rows))
        for group in tensors.groups:
            group_inputs = inputs if group.members is None else inputs.index_select(0, group.members)
            _tilt(logits, group_inputs, group, self.critic)
        return logits

    def _inputs(self, states: Tensor) -> Tensor:
        """Compute what the heads read, (R, I), from the policy's states (R, H) or with a value model."""
        if self._value_model is not None:
            inputs: Tensor = self.critic.prefix_inputs(self._value_model.read(self.tilted))
            return inputs
        memory = self._memory
        inputs, after = self.critic.step_inputs(states, memory.current if memory is not None else None)
        if memory is not None:
            memory.after_step = after
        return inputs

    def _build(self) -> _StepTensors | None:
        tilts = [row.tilt for row in self.tilted]
        if not tilts:
            return None
        rows = [at for at, row in enumerate(self._rows) if row is not None]
        kinds: dict[str, list[int]] = {}
        for index, tilt in enumerate(tilts):
            kind = "all" if tilt.top_k is None else "dense" if tilt.top_k > _MAX_GATHERED else "gathered"
            kinds.setdefault(kind, []).append(index)
        groups = [self._group(members, rows, tilts) for members in kinds.values()]
        return _StepTensors(self._integers(rows) if len(rows) < self.size else None, groups)

    def _group(self, members: list[int], rows: list[int], tilts: list[Tilt]) -> _Group:
        group = [tilts[index] for index in members]
        counts = [tilt.top_k for tilt in group if tilt.top_k is not None]
        beyond_k = None
        if counts and min(counts) < max(counts):
            beyond_k = torch.arange(max(counts))[None] >= torch.tensor(counts)[:, None]
            beyond_k = beyond_k.to(self.device)
        temperatures = [tilt.temperature for tilt in group]
        return _Group(
            members=self._integers(members) if len(members) < len(tilts) else None,
            rows=self._integers([rows[index] for index in members]) if len(members) < self.size else None,
            top_k=max(counts) if counts else None,
            dense=bool(counts) and max(counts) > _MAX_GATHERED,
            beyond_k=beyond_k,
            lam=torch.stack([tilt.lam for tilt in group]).to(self.device),
            temperature=torch.tensor(temperatures, device=self.device)[:, None] if set(temperatures) != {1.0} else None,
        )

    def _integers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def _tilt(logits: Tensor, inputs: Tensor, group: _Group, critic: Any) -> None:
    """Tilt the rows of one group in place."""
    rows = group.rows
    if group.top_k is None:
        tilt = critic.tilt_from_inputs(inputs, None, group.lam)
        tilt = tilt if group.temperature is None else tilt * group.temperature
        _ = logits.add_(tilt) if rows is None else logits.index_add_(0, rows, tilt)
        return
    group_logits = logits if rows is None else logits.index_select(0, rows)
    # Ranks matter only where the rows differ in K, so only then are the candidates sorted.
    values, ids = group_logits.topk(group.top_k, sorted=group.beyond_k is not None)
    tilt = critic.tilt_from_inputs(inputs, None if group.dense else ids, group.lam)
    tilt = tilt.gather(1, ids) if group.dense else tilt
    values += tilt if group.temperature is None else tilt * group.temperature
    if group.beyond_k is not None:
        values.masked_fill_(group.beyond_k, -torch.inf)
    if rows is None:
        logits.fill_(-torch.inf).scatter_(1, ids, values)
    else:
        logits.index_fill_(0, rows, -torch.inf)
        logits[rows[:, None], ids] = values
