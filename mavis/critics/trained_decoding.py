"""The decoding settings that a critic was trained with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TrainedDecoding:
    """The settings of the rollouts that a critic was trained on; its values and budgets hold for these.

    Args:
        top_k: K, the number of candidates per step; None for all tokens.
        temperature: T > 0.
        max_new_tokens: maximum length of a response in tokens.

    Examples:
        >>> from mavis.critics import TrainedDecoding
        >>> TrainedDecoding(top_k=40)
        TrainedDecoding(top_k=40, temperature=1.0, max_new_tokens=64)
    """

    top_k: int | None = None
    temperature: float = 1.0
    max_new_tokens: int = 64

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON-compatible data."""
        return asdict(self)
