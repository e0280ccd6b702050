"""Times runs of `generate` that alternate step by step, so that drifts of the machine affect all of them alike."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from transformers import StoppingCriteria


class _EndOfStep(StoppingCriteria):
    """Switches to the other runs after each step; never stops generation."""

    def __init__(self) -> None:
        self._scheduler = getcurrent()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self._scheduler.switch()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def copy_sharing_weights(policy: Any) -> Any:
    """Copy a policy's modules but not its weights, so that hooks on one copy do not affect the other."""
    return copy.deepcopy(policy, {id(tensor): tensor for tensor in (*policy.parameters(), *policy.buffers())})


def time_interleaved(runs: Mapping[str, Callable[[StoppingCriteria], Any]], repeat: int) -> dict[str, float]:
    """Run several generations one step each in turn, and time each of them.

    All runs share one thread, and with it torch's thread pool. A step's time depends on which run precedes it, because
    that run leaves its own data in the caches and allocator, so the order is reversed after every turn. The prompt's
    step, which is the longest, happens only once; the parity of `repeat` decides which run takes it first.

    Args:
        runs: call `generate` on the CPU with the given stopping criterion. Runs must not share a critic, nor a policy
            to which a critic is attached, and every tilt must be given its critic.
        repeat: index ≥ 0 of this measurement; if it is odd, the last run begins.

    Returns:
        Seconds by name, from call to return.
    """
    turn = repeat
    with torch.no_grad():  # `generate` enters and leaves this context, but the runs overlap
        end_of_step = _EndOfStep()
        active = {name: greenlet(run) for name, run in runs.items()}
        seconds = dict.fromkeys(runs, 0.0)
        try:
            while active:
                for name in list(reversed(active) if turn % 2 else active):
                    start = time.perf_counter()
                    active[name].switch(end_of_step)  # the argument of the run; later switches ignore it
                    seconds[name] += time.perf_counter() - start
                    if active[name].dead:
                        del active[name]
                turn += 1
        finally:
            for unfinished in active.values():  # if a run failed, the others must leave their contexts
                unfinished.throw()
    return seconds
