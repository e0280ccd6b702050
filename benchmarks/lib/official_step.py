"""The decoding step of the official MAVIS scripts, reimplemented as a logits processor for speed comparisons.

One value model per objective reads every candidate. For a single prompt the candidates are rows of a batch, each with a
copy of the prompt's cache, and the last two tokens are read again. For several prompts the candidates of a prompt are
laid out side by side under a mask. Both follow `ValueGeneratorWithCache` and `ValueGeneratorBatched` of https://github.com/5-Jeremy/MAVIS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor


class OfficialStep(LogitsProcessor):
    """Add β · Σ_m V_m(s ⊕ a) / M to the top-k logits.

    Args:
        trunks: for each objective, a decoder without output embedding.
        scores: the linear head of each trunk.
        top_k: K, the number of candidates.
        beta: β.
    """

    def __init__(self, trunks: Sequence[Any], scores: Sequence[nn.Linear], *, top_k: int, beta: float) -> None:
        self.trunks, self.scores, self.top_k, self.beta = trunks, scores, top_k, beta
        self.caches: list[DynamicCache] = []

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Tilt the scores (B, V) for the prefixes (B, L)."""
        logits, candidates = scores.topk(self.top_k)
        values = [self._values(m, input_ids, candidates) for m in range(len(self.trunks))]
        tilted = logits + self.beta * torch.stack(values).mean(dim=0)
        return torch.full_like(scores, -torch.inf).scatter(1, candidates, tilted)

    def _values(self, m: int, input_ids: Tensor, candidates: Tensor) -> Tensor:
        if len(self.caches) <= m:
            self.caches.append(DynamicCache(config=self.trunks[m].config))
        read = self._read_rows if len(input_ids) == 1 else self._read_side_by_side
        states: Tensor = read(self.trunks[m], self.caches[m], input_ids, candidates)
        return self.scores[m](states).squeeze(-1)

    def _read_rows(self, trunk: Any, cache: DynamicCache, input_ids: Tensor, candidates: Tensor) -> Tensor:
        rows = torch.cat([input_ids.expand(self.top_k, -1), candidates.T], dim=1)
        new = rows[:, -2:] if cache.get_seq_length() else rows
        states: Tensor = trunk(input_ids=new, past_key_values=cache, use_cache=True).last_hidden_state
        cache.crop(-1)
        return states[:, -1][None]

    def _read_side_by_side(self, trunk: Any, cache: DynamicCache, input_ids: Tensor, candidates: Tensor) -> Tensor:
        length = input_ids.shape[1]
        if not cache.get_seq_length():
            trunk(input_ids=input_ids, past_key_values=cache, use_cache=True)
        new = length - cache.get_seq_length()
        mask = torch.zeros(new + self.top_k, length + self.top_k, dtype=torch.float32, device=input_ids.device)
        mask[:, length:] = torch.finfo(torch.float32).min
        mask[new:, length:].fill_diagonal_(0)
        positions = torch.tensor([length - 1] * new + [length] * self.top_k, device=input_ids.device)
        states: Tensor = trunk(
            input_ids=torch.cat([input_ids[:, length - new :], candidates], dim=1),
            attention_mask=mask.expand(len(input_ids), 1, -1, -1),
            position_ids=positions.expand(len(input_ids), -1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        cache.crop(-self.top_k)
        return states[:, -self.top_k :]
