"""The settings and the report of training a reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mavis.errors import ConfigError, check_number, check_whole, closest

TEMPLATES = ("auto", "chat", "concat")
AUTO = "auto"
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class RewardModelSettings:
    """The settings of `train_reward_model`.

    Args:
        template: what the model reads: `chat`, its tokenizer's chat template over conversation and response; `concat`,
            prompt + response as one text; `auto` takes `chat` if a prompt is a conversation, else `concat`.
        epochs: passes over the pairs, ≥ 1.
        batch_size: pairs per step, ≥ 1.
        micro_pairs: pairs per forward and backward pass, ≥ 1; None takes all at once. Affects memory only.
        learning_rate: of AdamW at the first step, > 0; linear decay to 0. All weights want a tenth of what adapters do.
        lora_rank: rank of the adapters that are trained on all linear layers, ≥ 0; 0 trains all weights. The head is
            always trained.
        label_smoothing: ε in [0, ½), the share of pairs that are taken to be labelled the wrong way round.
        length_penalty: reward per 100 characters of response that the model subtracts; `auto` subtracts the slope that
            it has on training pairs, which makes its correlation with length about 0; None subtracts nothing.
        held_out: share of the pairs that the report is measured on, in (0, ½]; no first turn is on both sides.
        max_length: the most tokens to read, ≥ 2, the oldest are cut off first; at most what the backbone can read.
        precision: of the matrix products, `float32` or `bfloat16`, which is about twice as fast where the hardware has
            it; weights, optimiser and loss stay in float32.
        save_every: steps between checkpoints, ≥ 1.
        seed: of the head, of the order of the pairs and of which are held out.

    Raises:
        ConfigError: if a setting is out of range.

    Examples:
        >>> from mavis.training import RewardModelSettings
        >>> RewardModelSettings(label_smoothing=0.1, length_penalty="auto").lora_rank
        16
    """

    template: str = AUTO
    epochs: int = 1
    batch_size: int = 16
    micro_pairs: int | None = None
    learning_rate: float = 2e-4
    lora_rank: int = 16
    label_smoothing: float = 0.0
    length_penalty: float | str | None = None
    held_out: float = 0.1
    max_length: int = 512
    precision: str = "float32"
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise ConfigError(f"template is {self.template!r}.", closest(str(self.template), TEMPLATES))
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision is {self.precision!r}.", closest(str(self.precision), PRECISIONS))
        for name, least in {"epochs": 1, "batch_size": 1, "lora_rank": 0, "max_length": 2, "save_every": 1}.items():
            check_whole(ConfigError, f"e.g. {name}={max(least, 16)}.", least, **{name: getattr(self, name)})
        if self.micro_pairs is not None:
            check_whole(ConfigError, "null passes all pairs of a step at once.", micro_pairs=self.micro_pairs)
        check_number(
            ConfigError, "adapters usually want 1e-4 to 5e-4.", low=0, strict=True, learning_rate=self.learning_rate
        )
        check_number(
            ConfigError, "0.1 is usual for noisy pairs.", low=0, high=0.49, label_smoothing=self.label_smoothing
        )
        check_number(ConfigError, "0.1 is usual.", low=0, high=0.5, strict=True, held_out=self.held_out)
        if self.length_penalty is not None and self.length_penalty != AUTO:
            hint = "auto subtracts what the model has learnt of length, null nothing."
            check_number(ConfigError, hint, length_penalty=self.length_penalty)


@dataclass(frozen=True)
class RewardModelReport:
    """What a reward model has learnt, measured on pairs that were held out.

    A pair counts as right if the chosen response scores higher, and as half right at equal scores. Errors are standard
    errors, binomial or, if larger, clustered by prompt. Correlation and slope are those of the differences between the
    two responses of a pair, so that what distinguishes prompts plays no part.

    Args:
        folder: of the model.
        template: that it reads, for `RewardModel`.
        max_length: the most tokens that it was trained to read.
        training_pairs: how many it learnt from.
        held_out_pairs: how many it was measured on.
        held_out_prompts: how many first turns these have.
        cut_texts: how many texts were longer than `max_length`, of two per pair.
        accuracy: share of the held-out pairs that are right.
        accuracy_error: its standard error.
        longer_accuracy: the same if the longer response is always preferred.
        longer_error: its standard error.
        baseline: `longer` or `shorter`, whichever is chosen more often in the training pairs.
        baseline_accuracy: share of the held-out pairs in which that response was chosen.
        gain: accuracy − baseline accuracy.
        gain_error: its standard error; the two are compared pair by pair.
        log_loss: mean of −log σ(score of chosen − score of rejected); log 2 = 0.69 knows nothing.
        calibration_error: mean distance of stated and observed accuracy, weighted by pairs.
        reliability: bins of the stated accuracy σ(|difference|), with the observed one, its error and the pairs.
        length_correlation: of the score with characters; None if all lengths are equal.
        length_slope: of the score per 100 characters, with the penalty subtracted.
        length_penalty: that the model subtracts per 100 characters.
        seconds: duration of the training.
        settings: of the run.

    Examples:
        A finished run holds its report as `report.json`.

        >>> from mavis.training import RewardModelReport
        >>> stored = {
        ...     "folder": "run/model", "template": "chat", "max_length": 512, "training_pairs": 900,
        ...     "held_out_pairs": 100, "held_out_prompts": 10, "cut_texts": 0, "accuracy": 0.71,
        ...     "accuracy_error": 0.05, "longer_accuracy": 0.6, "longer_error": 0.05, "baseline": "longer",
        ...     "baseline_accuracy": 0.6, "gain": 0.11, "gain_error": 0.06, "log_loss": 0.6,
        ...     "calibration_error": 0.03, "reliability": [], "length_correlation": 0.2, "length_slope": 0.1,
        ...     "length_penalty": 0.0, "seconds": 60.0, "settings": {"lora_rank": 16},
        ... }
        >>> RewardModelReport(**stored).accuracy
        0.71
    """

    folder: str
    template: str
    max_length: int
    training_pairs: int
    held_out_pairs: int
    held_out_prompts: int
    cut_texts: int
    accuracy: float
    accuracy_error: float
    longer_accuracy: float
    longer_error: float
    baseline: str
    baseline_accuracy: float
    gain: float
    gain_error: float
    log_loss: float
    calibration_error: float
    reliability: list[dict[str, Any]]
    length_correlation: float | None
    length_slope: float | None
    length_penalty: float
    seconds: float
    settings: dict[str, Any]
