"""The settings and the report of a distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mavis.errors import ConfigError, check_whole
from mavis.policies.embeddings import embedding_shape, output_embedding
from mavis.rollouts.sampling import RolloutSettings
from mavis.training.regression import RegressionSettings


@dataclass(frozen=True)
class DistillSettings:
    """The settings of `distill`.

    Args:
        rollouts: responses of the reference policy, ≥ 4.
        candidates: K ≥ 1, how many of the policy's most likely tokens the teachers score at each step; what responses
            are sampled from is set by `sampling`.
        sampling: how rollouts are sampled.
        fit: how the student is fitted.

    Raises:
        ConfigError: if a setting is out of range.

    Examples:
        >>> from mavis.training import DistillSettings
        >>> settings = DistillSettings(rollouts=512)
        >>> settings.candidates, settings.fit.epochs
        (40, 6)
    """

    rollouts: int = 2048
    candidates: int = 40
    sampling: RolloutSettings = field(default_factory=RolloutSettings)
    fit: RegressionSettings = field(default_factory=RegressionSettings)

    def __post_init__(self) -> None:
        hint = "the defaults are 2048 rollouts and 40 candidates."
        check_whole(ConfigError, hint, 4, rollouts=self.rollouts)
        check_whole(ConfigError, hint, candidates=self.candidates)

    def check(self, policy: Any) -> None:
        """Check that the policy has at least as many tokens as there are candidates.

        Raises:
            ConfigError: if `candidates` or the sampling's `top_k` is larger than the vocabulary.
        """
        _, vocabulary = embedding_shape(output_embedding(policy))
        if self.candidates > vocabulary:
            raise ConfigError(
                f"candidates is {self.candidates}, but the policy has {vocabulary} tokens.",
                f"{vocabulary} makes every token a candidate.",
            )
        self.sampling.check(policy)


@dataclass(frozen=True)
class DistillReport:
    """The result of a distillation, measured on held-out rollouts.

    Args:
        explained: per objective, 1 − squared error / variance of the teacher's values over all steps and candidates;
            None where those do not vary.
        between_candidates: the same for the differences between the candidates of one step, the only thing that a tilt
            depends on.
        epoch: the epoch that is kept, counted from 1; 0 if none was better than the initial student.
        losses: the held-out error before the first and after each epoch.

    Examples:
        >>> from mavis.training import DistillReport
        >>> report = DistillReport({"positive": 0.9}, {"positive": 0.6}, epoch=2, losses=[1.0, 0.5, 0.3])
        >>> report.losses[report.epoch]
        0.3
    """

    explained: dict[str, float | None]
    between_candidates: dict[str, float | None]
    epoch: int
    losses: list[float]

    def metrics(self) -> dict[str, dict[str, float | None]]:
        """Return the metrics to log, by group and name."""
        return {"explained": self.explained, "explained between candidates": self.between_candidates}
