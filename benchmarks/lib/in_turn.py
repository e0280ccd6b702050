"""Runs of `generate` that take a step each in turn, so that a machine's drifts are the same for all of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from transformers import StoppingCriteria


class _EndOfStep(StoppingCriteria):
    """Lets the others have their turn when a step is done; stops nothing."""

    def __init__(self) -> None:
        self._others = getcurrent()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self._others.switch()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def twin(policy: Any) -> Any:
    """Copy a policy's modules but none of its weights, so that what is hooked into one is not in the other."""
    return copy.deepcopy(policy, {id(tensor): tensor for tensor in (*policy.parameters(), *policy.buffers())})


def seconds_in_turn(runs: Mapping[str, Callable[[StoppingCriteria], Any]], turn: int) -> dict[str, float]:
    """Run all at once, a step of each in turn, and measure how long each has been at it.

    They share one thread, and with it the threads that torch computes with. The order is turned round after every turn,
    for a step takes longer or shorter after another's, which has left its own in the processor's caches and room in
    memory. The longest step, which is that of the prompt, is taken once: so that nobody has it first in every round,
    rounds are numbered.

    Args:
        runs: each calls `generate`, on the CPU, with the stopping criterion that it is given. No two may share a
            critic, or a policy that a critic is attached to, and every tilt names its critic.
        turn: the number of the first turn, ≥ 0; where it is odd, the last of the runs begins.

    Returns:
        Seconds by name, from the call to its return.
    """
    with torch.no_grad():  # which `generate` leaves as it was, and the others are still in theirs
        end = _EndOfStep()
        waiting = {name: greenlet(run) for name, run in runs.items()}
        seconds = dict.fromkeys(runs, 0.0)
        try:
            while waiting:
                for name in list(reversed(waiting) if turn % 2 else waiting):
                    start = time.perf_counter()
                    waiting[name].switch(end)  # the argument of the run, and later what nobody reads
                    seconds[name] += time.perf_counter() - start
                    if waiting[name].dead:
                        del waiting[name]
                turn += 1
        finally:
            for unfinished in waiting.values():  # where one has failed, the others leave their contexts here
                unfinished.throw()
    return seconds
