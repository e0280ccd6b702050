"""The settings and the report of an alignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mavis.errors import ConfigError, check_number, check_whole, closest
from mavis.rollouts.sampling import RolloutSettings

METHODS = ("rloo", "grpo")


@dataclass(frozen=True)
class AlignSettings:
    """The settings of `align`.

    Args:
        method: the baseline of a response's reward: the mean of the prompt's other responses (`rloo`), or of all of
            them (`grpo`). `rloo` charges the KL of the whole response to each of its tokens, `grpo` each token its own.
        steps: of the optimiser, ≥ 0; 0 measures the reference policy.
        batch_size: prompts per step, ≥ 1.
        samples: responses per prompt, ≥ 2.
        learning_rate: of AdamW at the first step, > 0; linear decay to 0.
        beta: β > 0 of the goal, in 1 / reward. It is the *inverse* of TRL's `beta`, and of the β of RLHF papers, which
            is the price of a nat.
        max_new_tokens: longest response in tokens, ≥ 1.
        temperature: T > 0 of both policies.
        lora_rank: rank of the adapters that are trained, ≥ 0; 0 trains all weights.
        micro_rows: responses per forward and backward pass, a divisor of batch_size × samples; None takes all at once.
            Affects memory only.
        reference_samples: responses of the reference policy that the normalisation is estimated on, ≥ 2.
        evaluation_samples: responses that each metric of the report is measured on, ≥ 2.
        save_every: steps between checkpoints, ≥ 1.
        seed: of all sampling.

    Raises:
        ConfigError: if a setting is out of range.

    Examples:
        >>> from mavis.training import AlignSettings
        >>> settings = AlignSettings(method="grpo", steps=200, lora_rank=16)
        >>> settings.batch_size * settings.samples  # responses per step
        32
    """

    method: Literal["rloo", "grpo"] = "rloo"
    steps: int = 80
    batch_size: int = 8
    samples: int = 4
    learning_rate: float = 4e-4
    beta: float = 8.0
    max_new_tokens: int = 64
    temperature: float = 1.0
    lora_rank: int = 0
    micro_rows: int | None = None
    reference_samples: int = 1024
    evaluation_samples: int = 512
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}.", closest(str(self.method), METHODS))
        least = {
            "steps": 0,
            "batch_size": 1,
            "samples": 2,
            "lora_rank": 0,
            "micro_rows": 1,
            "reference_samples": 2,
            "evaluation_samples": 2,
            "save_every": 1,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if name == "micro_rows" and value is None:
                continue
            check_whole(ConfigError, f"e.g. {name}={max(bound, 2)}.", bound, **{name: value})
        hint = "beta is the inverse of the β of RLHF; a larger one moves further from the reference policy."
        check_number(ConfigError, hint, low=0, strict=True, learning_rate=self.learning_rate, beta=self.beta)
        rows = self.batch_size * self.samples
        if self.micro_rows is not None and rows % self.micro_rows:
            raise ConfigError(
                f"micro_rows is {self.micro_rows}, which does not divide batch_size × samples = {rows}.",
                "leave it out, or give a divisor.",
            )
        self.sampling(0)

    def sampling(self, seed: int) -> RolloutSettings:
        """Return the settings for sampling outside the training; `seed` is added to the run's own."""
        return RolloutSettings(
            max_new_tokens=self.max_new_tokens, top_k=None, temperature=self.temperature, seed=self.seed + seed
        )


@dataclass(frozen=True)
class AlignReport:
    """The result of an alignment; rewards are in standard deviations of the reference policy.

    Args:
        folder: of the aligned policy (`policy`) or of its adapter (`adapter`).
        weights: per objective.
        rewards_before: per objective, mean of the reference policy's responses.
        rewards_after: the same of the aligned policy's.
        reward_before: the weighted sum.
        reward_after: the weighted sum.
        reward_error: standard error of `reward_after`.
        kl: KL of the aligned policy to the reference, nats per response.
        kl_error: its standard error.
        goal: reward_after − kl / β.
        mean: per objective, of the raw rewards of the reference policy, for the normalisation.
        std: their standard deviation.
        responses: how many each mean was taken over.
        evaluated_on: `evaluation prompts`, or `training prompts` where no others were given.
        seconds: duration of the training, without the sampling for normalisation and report.
        settings: of the run.

    Examples:
        A finished run holds its report as `report.json`.

        >>> from mavis.training import AlignReport
        >>> stored = {
        ...     "folder": "run/policy", "weights": {"short": 1.0}, "rewards_before": {"short": 0.0},
        ...     "rewards_after": {"short": 0.75}, "reward_before": 0.0, "reward_after": 0.75, "reward_error": 0.04,
        ...     "kl": 2.0, "kl_error": 0.1, "goal": 0.5, "mean": {"short": -0.6}, "std": {"short": 0.1},
        ...     "responses": 512, "evaluated_on": "evaluation prompts", "seconds": 60.0, "settings": {"beta": 8.0},
        ... }
        >>> report = AlignReport(**stored)
        >>> report.goal == report.reward_after - report.kl / report.settings["beta"]
        True
    """

    folder: str
    weights: dict[str, float]
    rewards_before: dict[str, float]
    rewards_after: dict[str, float]
    reward_before: float
    reward_after: float
    reward_error: float
    kl: float
    kl_error: float
    goal: float
    mean: dict[str, float]
    std: dict[str, float]
    responses: int
    evaluated_on: str
    seconds: float
    settings: dict[str, Any]
