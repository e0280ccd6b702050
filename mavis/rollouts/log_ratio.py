"""Log-ratios of sampled responses: how much more likely a tilt has made them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


class LogRatioRecorder:
    """Records the log-ratio of every sampled token while a tilt decodes.

        log π(a_t | s_t) − log π_ref(a_t | s_t),   π_ref = softmax(scores / T) over all tokens

    A token is known only at the next step, so each step's ratios of all tokens are kept until then.

    Args:
        temperature: T at which the responses are sampled.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._reference: Tensor | None = None
        self._ratios: Tensor | None = None
        self._steps: list[Tensor] = []

    def around(self, tilt: Any) -> list[Any]:
        """Return the logits processors that `generate` is to call: this recorder's around the tilt."""
        return [_Observer(self._before), tilt, _Observer(self._after)]

    def totals(self, responses: Sequence[Sequence[int]]) -> Tensor:
        """Sum the log-ratios of each response.

        Args:
            responses: B lists of token ids, as sampled, each up to its first end token.

        Returns:
            (B,) float64 in nats, on the CPU.
        """
        assert self._ratios is not None
        latest = len(self._steps)
        last = [response[latest] if len(response) > latest else 0 for response in responses]
        steps = [*self._steps, self._chosen(torch.tensor(last, device=self._ratios.device))]
        lengths = torch.tensor([len(response) for response in responses])
        ratios = torch.stack(steps, dim=1).double().cpu()
        is_response = torch.arange(len(steps)) < lengths[:, None]
        return torch.where(is_response, ratios, 0.0).sum(1)  # what follows an end can be banned, and its ratio −inf

    def _before(self, input_ids: Tensor, scores: Tensor) -> None:
        if self._ratios is not None:
            self._steps.append(self._chosen(input_ids[:, -1]))
        self._reference = torch.log_softmax(scores.float() / self._temperature, dim=-1)

    def _after(self, input_ids: Tensor, scores: Tensor) -> None:
        assert self._reference is not None
        self._ratios = torch.log_softmax(scores.float() / self._temperature, dim=-1) - self._reference

    def _chosen(self, token_ids: Tensor) -> Tensor:
        assert self._ratios is not None
        return self._ratios.gather(1, token_ids[:, None])[:, 0]


class _Observer(LogitsProcessor):
    """Shows every step to a function; the scores pass through unchanged."""

    def __init__(self, observe: Any) -> None:
        self._observe = observe

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._observe(input_ids, scores)
        return scores
