"""The candidates, the temperature and the length that a critic was trained with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TrainedDecoding:
    """How the responses were sampled that a critic learnt from; its values and budgets hold for these settings.

    Args:
        top_k: number of candidates K of each step; None makes every token a candidate.
        temperature: T > 0.
        max_new_tokens: longest response in tokens.

    Examples:
        >>> from mavis.critics import TrainedDecoding
        >>> TrainedDecoding(top_k=40)
        TrainedDecoding(top_k=40, temperature=1.0, max_new_tokens=64)
    """

    top_k: int | None = None
    temperature: float = 1.0
    max_new_tokens: int = 64

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)
