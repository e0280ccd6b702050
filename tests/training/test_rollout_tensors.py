"""Rollouts sharded over processes: each in one of them, every batch complete."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mavis.distributed import SINGLE_PROCESS, ProcessGroup
from mavis.training.rollout_tensors import RolloutTensors, ShardedRollouts, concatenate_sharded


def numbered(rows: int, steps: int = 2) -> RolloutTensors:
    """Rollouts whose tokens are their index."""
    numbers = torch.arange(rows)[:, None]
    return RolloutTensors(
        prompt_ids=numbers,
        is_prompt=torch.ones(rows, 1, dtype=torch.bool),
        states=torch.zeros(rows, steps, 0),
        action_ids=numbers.expand(-1, steps).contiguous(),
        is_response=torch.ones(rows, steps, dtype=torch.bool),
    )


@given(rows=st.integers(4, 30), count=st.integers(1, 4), data=st.data())
def test_the_parts_of_a_batch_hold_each_rollout_once(rows: int, count: int, data: st.DataObject) -> None:
    index = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, unique=True)))
    shares = [ShardedRollouts.shard(numbered(rows), ProcessGroup(number, count)) for number in range(count)]
    assert all(len(share) == rows for share in shares)
    batches = [share.rows(index) for share in shares]
    assert all(len(batch) > 0 for batch in batches)  # all processes call a network together
    found = [n for batch in batches for n in batch.action_ids[batch.is_response[:, 0], 0].tolist()]
    assert sorted(found) == sorted(index.tolist())
    for batch in batches:  # in the batch's own order
        assert [n for n in index.tolist() if n in batch.action_ids[batch.is_response[:, 0], 0]] == (
            batch.action_ids[batch.is_response[:, 0], 0].tolist()
        )


@given(sizes=st.lists(st.integers(3, 9), min_size=1, max_size=3), count=st.integers(1, 3))
def test_concatenated_sets_keep_their_indices(sizes: list[int], count: int) -> None:
    wholes = [numbered(size, steps) for steps, size in enumerate(sizes, start=1)]
    offsets = [sum(sizes[:n]) for n in range(len(sizes))]
    for number in range(count):
        both = concatenate_sharded([ShardedRollouts.shard(whole, ProcessGroup(number, count)) for whole in wholes])
        assert len(both) == sum(sizes)
        for offset, whole in zip(offsets, wholes, strict=True):
            some = both.rows(offset + torch.arange(len(whole)))
            assert some.prompt_ids[:, 0].tolist() == list(range(number, len(whole), count))
            assert some.is_response.sum(1).tolist() == [whole.is_response.shape[1]] * len(some)


def test_values_are_gathered_in_order() -> None:
    values = torch.arange(6.0).view(6, 1)
    assert torch.equal(ShardedRollouts.shard(numbered(6), SINGLE_PROCESS).all_gather(values), values)

    class Recording(ProcessGroup):
        """A process group that adds what the other process would."""

        def all_reduce_sum(self, given: torch.Tensor) -> torch.Tensor:
            others = torch.zeros(6, 1)
            others[0::2] = values[0::2]
            return given + others

    assert torch.equal(ShardedRollouts.shard(numbered(6), Recording(1, 2)).all_gather(values[1::2]), values)
