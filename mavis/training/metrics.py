"""Metrics of training runs for trackers, and the record of a training in its critic's model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mavis.critics import Critic
from mavis.policies import Prompt
from mavis.policies.names import policy_name
from mavis.training.run_folder import Progress
from mavis.utils.mappings import flatten

Log = Callable[[Mapping[str, float], int], None]
"""Called with metrics by name and their step; steps never decrease."""


class MetricLogger:
    """Logs the metrics of a training on one axis, the epochs of all its fits.

        step = iteration · epochs + epoch

    Trackers want one axis that never goes back, so the metrics of an iteration belong to its last epoch. A resumed run
    logs its finished iterations again, so that a tracker that starts anew has them all.

    Args:
        log: takes the metrics; None drops them.
        epochs: number of epochs of each fit.
    """

    def __init__(self, log: Log | None, epochs: int) -> None:
        self._log, self._epochs = log or (lambda values, step: None), epochs

    def watch(self, report_progress: Progress, stage: str, iteration: int = 0) -> Callable[[int, float], None]:
        """Return a callback for a fit that logs each epoch's held-out error and reports progress."""

        def on_epoch(epoch: int, error: float) -> None:
            report_progress(stage, epoch, self._epochs)
            self._log({"fit/held-out error": error}, iteration * self._epochs + epoch)

        return on_epoch

    def errors(self, losses: Sequence[float], iteration: int = 0) -> None:
        """Log the held-out errors of a finished fit: before the first epoch and after each."""
        on_epoch = self.watch(lambda stage, done, total: None, "", iteration)
        for epoch, error in enumerate(losses[1:], 1):
            on_epoch(epoch, error)

    def log_groups(self, groups: Mapping[str, Mapping[str, float | None]], iteration: int = 0) -> None:
        """Log metrics by group and name at the end of an iteration, leaving out those that are None."""
        values = {
            f"{group}/{name}": value
            for group, values_of_group in groups.items()
            for name, value in values_of_group.items()
            if value is not None
        }
        self._log(values, (iteration + 1) * self._epochs)


def record_training(critic: Critic, policy: Any, prompts: Sequence[Prompt], settings: Any) -> None:
    """Record in a critic's model card the training that starts now, in place of an earlier one.

    Args:
        critic: about to be trained. Its `about["data"]` names the prompts, unless that belongs to an earlier training.
        policy: the reference policy.
        prompts: the training prompts.
        settings: a dataclass.
    """
    data = {"data": critic.about["data"]} if "data" in critic.about and "training" not in critic.about else {}
    training = flatten(asdict(settings)) | {"prompts": len(prompts)}
    critic.about = data | {"policy": policy_name(policy), "training": training}
