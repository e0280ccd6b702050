"""Steps of decoding that several tests follow: processors that watch or ban, and what every row should be.

What is expected is computed without a cache: one fresh forward pass for each prefix, the critic's values on the state
it ends with, and the tilt written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from mavis import HiddenStateCritic, MavisTilt

MakeCritic = Callable[..., HiddenStateCritic]
ByHand = Callable[..., torch.Tensor]
Inputs = dict[str, torch.Tensor]
Seen = list[tuple[torch.Tensor, torch.Tensor]]


class Ban(LogitsProcessor):
    """Forbid some tokens."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.tokens] = -torch.inf
        return scores


class Keep(LogitsProcessor):
    """Remember what passes by."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append((input_ids, scores))
        return scores


def follow(policy: Any, inputs: Inputs, tilt: MavisTilt, steps: int = 6, **arguments: Any) -> Keep:
    keep = Keep()
    policy.generate(
        **inputs, top_k=0, max_new_tokens=steps, logits_processor=LogitsProcessorList([tilt, keep]), **arguments
    )
    return keep


KINDS = {
    "plain": {},
    "memory": {"memory": 8},
    "conditioned": {"composition": "conditioned"},
    "conditioned memory": {"memory": 8, "composition": "conditioned"},
    "token": {"readout": "token"},
    "candidates": {"readout": "candidates"},
}


EITHER = ("plain", "conditioned memory", "candidates")
LAM = [1.5, 0.6]
REPETITIVE = {"input_ids": torch.tensor([[1, 7, 3, 9, 7, 3, 9, 7, 3]]), "attention_mask": torch.ones(1, 9).long()}


def tilt_for(critic: HiddenStateCritic, top_k: int | None = 7, **options: Any) -> MavisTilt:
    return MavisTilt([1.0, 0.4], critic, beta=1.5, top_k=top_k, **options)


def processed(policy: Any, inputs: Inputs, *tilts: MavisTilt, **arguments: Any) -> Seen:
    """Generate, and return what came out of the processors with the ids it was for."""
    seen: Seen = []

    def keep(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append((input_ids, scores))
        return scores

    arguments = {"do_sample": False, "max_new_tokens": 6} | arguments
    sampling = {"top_k": 0} if arguments["do_sample"] else {}
    policy.generate(**inputs, **sampling, **arguments, logits_processor=LogitsProcessorList([*tilts, keep]))
    return seen


def expect_tilted(
    by_hand: ByHand,
    policy: Any,
    critic: HiddenStateCritic,
    seen: Seen,
    inputs: Inputs,
    lam: list[float] = LAM,
    top_k: int | None = 7,
    reference: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Compare every row of every step with what it would have been alone."""
    assert seen
    for ids, logprobs in seen:
        copies = len(ids) // len(inputs["input_ids"])
        for row in range(len(ids)):
            asked = inputs["attention_mask"][row // copies]
            mask = torch.cat([asked, asked.new_ones(ids.shape[1] - len(asked))])
            scores = None if reference is None else reference(ids[row][mask.bool()][None], asked)
            expected = by_hand(policy, critic, ids[row], mask, lam, top_k, prompt=int(asked.sum()), reference=scores)
            torch.testing.assert_close(logprobs[row].double(), expected, atol=1e-4, rtol=1e-4)
