"""How an evaluation sweeps weights and β, and how much it samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mavis.decoding.weights import Weights
from mavis.errors import ConfigError, check_whole
from mavis.rollouts.sampling import RolloutSettings


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation sweeps and how much it samples.

    Args:
        divisions: d ≥ 1 of the simplex grid of weights; 4 gives five points for two objectives.
        betas: tilt strengths, > 0, in 1 / reward.
        weights: the weights to sweep instead of a grid, such as `[{"helpful": 1}, {"helpful": 0.5, "brief": 0.5}]` or
            rows of M numbers.
        samples: responses per prompt, weights and β, ≥ 1.
        reference_samples: N ≥ 2 reference rollouts per prompt, from which the optimal frontier is computed.
        target_kls: KLs at which the frontier efficiency is read, in nats per response, > 0.
        speed_batch: number of rows of the speed measurement, ≥ 1.
        speed_repeats: repeats of the speed measurement; 0 skips it.
        sampling: how responses are sampled; `mavis evaluate` samples as the critic was trained, and from Python
            `top_k` and `temperature` of `critic.decoding` do.

    Raises:
        ConfigError: if a number is out of range.

    Examples:
        >>> from mavis.evaluation import EvaluationSettings
        >>> settings = EvaluationSettings(betas=(1.0, 2.0), samples=16)
        >>> settings.betas, settings.samples, settings.reference_samples
        ((1.0, 2.0), 16, 4096)
    """

    divisions: int = 4
    betas: Sequence[float] = (1.0, 2.0, 3.0, 4.0, 6.0, 9.0)
    weights: Weights | None = None
    samples: int = 64
    reference_samples: int = 4096
    target_kls: Sequence[float] = (1.0, 2.0)
    speed_batch: int = 8
    speed_repeats: int = 5
    sampling: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        if not self.betas or not all(0 < beta < math.inf for beta in self.betas):
            raise ConfigError(f"betas is {list(self.betas)}, expected numbers > 0.", "β = 0 is always measured.")
        if not all(0 < kl < math.inf for kl in self.target_kls):
            raise ConfigError(f"target_kls is {list(self.target_kls)}, expected numbers > 0.", "1 and 2 are common.")
        check_whole(ConfigError, "64 is common.", samples=self.samples)
        check_whole(ConfigError, "4096 is common.", 2, reference_samples=self.reference_samples)
        if self.speed_repeats > 0:
            check_whole(ConfigError, "speed_repeats=0 skips the measurement.", speed_batch=self.speed_batch)
