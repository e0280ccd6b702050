"""The trace of one generation under a tilt: its per-step KL, and which steps were tilted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class GenerationTrace:
    """What one run of `generate` in one thread has recorded so far.

    Args:
        prompt_ids: (B, P) integer, the ids at the first step.
        length: of the ids at the latest step.
        kl: (B,) of each step, in nats.
        tilted: (B,) of each step, 1 where the step was tilted, 0 where it was not, NaN after a row's end.
        has_ended: (B,) bool, True for rows that have drawn an end token; None while nothing has been drawn.
    """

    prompt_ids: Tensor
    length: int
    kl: list[Tensor] = field(default_factory=list)
    tilted: list[Tensor] = field(default_factory=list)
    has_ended: Tensor | None = None

    def is_continued_by(self, input_ids: Tensor) -> bool:
        """Tell whether ids (B, L) are the next step of this generation rather than the first of another."""
        prompt = self.prompt_ids
        if len(prompt) != len(input_ids) or input_ids.shape[1] != self.length + 1 or prompt.device != input_ids.device:
            return False
        # Beams only move among the rows of one prompt, so the prompts stay in place. On an accelerator the host would
        # have to wait for this comparison, so the lengths have to do.
        return input_ids.device.type != "cpu" or torch.equal(input_ids[:, : prompt.shape[1]], prompt)

    def update_ended(self, input_ids: Tensor, end_ids: Iterable[int]) -> Tensor | None:
        """Update `has_ended` by the latest token of every row, and return it.

        Args:
            input_ids: (B, L) integer, the tokens so far.
            end_ids: the policy's end tokens.
        """
        end_ids = list(end_ids)
        if input_ids.shape[1] == self.prompt_ids.shape[1] or not end_ids:
            return None
        latest = input_ids[:, -1:]
        ends_now = (latest == torch.tensor(end_ids, device=latest.device)).any(dim=1)
        self.has_ended = ends_now if self.has_ended is None else self.has_ended | ends_now
        return self.has_ended

    def record_kl(self, kl: Tensor) -> None:
        """Append the KL (B,) of one step, which counts 0 after a row's end."""
        self.kl.append(kl if self.has_ended is None else kl.masked_fill(self.has_ended, 0.0))

    def record_tilted(self, is_untilted: Tensor) -> None:
        """Append which rows one step tilted, from a mask (B, 1) that is True where it did not."""
        tilted = (~is_untilted[:, 0]).float()
        self.tilted.append(tilted if self.has_ended is None else tilted.masked_fill(self.has_ended, torch.nan))
