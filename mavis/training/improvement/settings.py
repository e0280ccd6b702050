"""The settings of the improvement loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from mavis.critics.base import Composition
from mavis.errors import ConfigError, check_number, check_whole
from mavis.rollouts.sampling import RolloutSettings
from mavis.training.improvement.fit import FitSettings

KlLabel = Literal["to_come", "whole_response"]


@dataclass(frozen=True)
class ImprovementSettings:
    """The settings of `improve`.

    Args:
        composition: what is improved: the weighted goal of every λ under the policy of that λ (`conditioned`), or each
            objective under its own policy (`independent`, the paper's).
        iterations: number of iterations of rollouts and fit, ≥ 1; the first one evaluates the reference policy.
        reuse: whether later iterations also learn from the rollouts of earlier ones. With return decomposition these
            are valid samples of the policy now evaluated: a return is the value plus the advantages still to come,
            whatever policy chose the tokens.
        rollouts: responses per iteration, ≥ 4. From iteration 1 on, `independent` divides them equally among the
            objectives and `conditioned` draws a λ for each.
        beta: strength of the tilt that later iterations evaluate, > 0, in 1 / reward (the inverse of the β of DPO and
            RLHF papers); `conditioned` draws one for each rollout from a range around it.
        zeta: ζ ≥ 0, price of a nat in reward; None is 1/β. Unused by `conditioned`: a separate head learns the KL.
        kl_label: what ζ is the price of: the exact KL still `to_come` after each token, or, as in the paper's code, the
            log-ratio of the `whole_response` once the policy is tilted, see `mavis.math.whole_response_returns`. The
            latter is for `independent` with the fit's target `monte_carlo`, and needs a ζ well below 1/β.
        min_beta: the smallest strength that `conditioned` draws, > 0; None is β/6. `independent` does not use it.
        max_beta: the largest strength; None is 8β/3. Strengths are log-uniform in this range.
        later_rate: factor on the fit's learning rate after iteration 0, > 0. By then the heads are nearly right, and
            larger steps would add more noise than they remove.
        calibration_samples: rollouts per point of the calibration sweep; 0 leaves the critic uncalibrated.
        sampling: how rollouts are sampled.
        fit: how the heads are fitted.

    Raises:
        ConfigError: if a setting is out of range.

    Examples:
        >>> from mavis.training import ImprovementSettings
        >>> settings = ImprovementSettings(beta=3.0)
        >>> settings.rollouts, settings.calibration_samples
        (8192, 64)
        >>> settings.strengths
        (0.5, 8.0)
    """

    composition: Composition = "conditioned"
    iterations: int = 3
    rollouts: int = 8192
    reuse: bool = True
    beta: float = 4.0
    zeta: float | None = None
    kl_label: KlLabel = "to_come"
    min_beta: float | None = None
    max_beta: float | None = None
    later_rate: float = 0.3
    calibration_samples: int = 64
    sampling: RolloutSettings = field(default_factory=RolloutSettings)
    fit: FitSettings = field(default_factory=FitSettings)

    def __post_init__(self) -> None:
        hint = "3 iterations of 8192 rollouts at beta 4 are a good start."
        check_whole(ConfigError, hint, iterations=self.iterations)
        check_whole(ConfigError, hint, 4, rollouts=self.rollouts)
        check_number(ConfigError, hint, low=0, strict=True, beta=self.beta)
        check_whole(ConfigError, "0 skips the calibration.", 0, calibration_samples=self.calibration_samples)
        check_number(ConfigError, "the default is 0.3.", low=0, strict=True, later_rate=self.later_rate)
        if self.zeta is not None:
            check_number(ConfigError, "the default is 1/beta.", low=0, zeta=self.zeta)
        if self.reuse and self.fit.target == "monte_carlo":
            raise ConfigError(
                "reuse is True, but plain Monte Carlo returns are valid only for the policy that sampled them.",
                "set reuse to False, or the fit's target to decomposition.",
            )
        self._check_kl_label()
        unused = ("zeta",) if self.composition == "conditioned" else ("min_beta", "max_beta")
        for name in unused:
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, but the {self.composition} composition does not use it.",
                    "leave it out, or choose the other composition.",
                )
        least, most = self.strengths
        if not 0 < least <= most < math.inf:
            raise ConfigError(
                f"min_beta is {least} and max_beta {most}; expected 0 < min_beta ≤ max_beta.",
                "the defaults are β/6 and 8β/3.",
            )

    def _check_kl_label(self) -> None:
        if self.kl_label not in ("to_come", "whole_response"):
            raise ConfigError(f"kl_label is {self.kl_label!r}.", "known: to_come, whole_response.")
        if self.kl_label == "to_come":
            return
        if self.composition == "conditioned" or self.fit.target != "monte_carlo":
            raise ConfigError(
                f"kl_label is 'whole_response', but composition is {self.composition!r} and the fit's target "
                f"{self.fit.target!r}.",
                "choose independent and monte_carlo, or kl_label=to_come.",
            )
        if self.zeta is None or self.zeta >= 1 / self.beta:
            raise ConfigError(
                f"kl_label is 'whole_response' and zeta is {self.zeta}, expected a number below 1/beta = "
                f"{1 / self.beta:g}.",
                "the paper's code takes 0 to 0.03; at 1/beta this iteration does not converge.",
            )

    @property
    def strengths(self) -> tuple[float, float]:
        """The smallest and the largest β that `conditioned` draws."""
        return (
            self.beta / 6 if self.min_beta is None else self.min_beta,
            8 * self.beta / 3 if self.max_beta is None else self.max_beta,
        )

    def resolved(self) -> ImprovementSettings:
        """Replace every None by the value that it stands for."""
        if self.composition == "independent":
            return replace(self, zeta=1 / self.beta if self.zeta is None else self.zeta)
        least, most = self.strengths
        return replace(self, min_beta=least, max_beta=most)
