"""What training tells of itself while it goes on: figures by name, on one axis, and to the critic's card."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mavis.critics import Critic
from mavis.policies.names import policy_name
from mavis.training.run_folder import Progress

Log = Callable[[Mapping[str, float], int], None]
"""Called with figures by name and the step that they belong to; steps never fall."""


class MetricLogger:
    """Lays the figures of a training out over the epochs of all its fits.

        step = iteration · epochs + epoch

    Trackers want one axis on which nothing goes back, so what an iteration came to belongs to its last epoch. A run
    that goes on tells of its finished iterations again: a tracker that begins anew then has all of it.

    Args:
        log: what to tell; None tells nobody.
        epochs: of each fit.
    """

    def __init__(self, log: Log | None, epochs: int) -> None:
        self._log, self._epochs = log or (lambda values, step: None), epochs

    def watch(self, say: Progress, stage: str, iteration: int = 0) -> Callable[[int, float], None]:
        """Make what a fit calls with each epoch's number and held-out error; it tells the progress, too."""

        def on_epoch(epoch: int, error: float) -> None:
            say(stage, epoch, self._epochs)
            self._log({"fit/held-out error": error}, iteration * self._epochs + epoch)

        return on_epoch

    def errors(self, losses: Sequence[float], iteration: int = 0) -> None:
        """Tell of a fit that is over: the held-out error before the first epoch and after each."""
        on_epoch = self.watch(lambda stage, done, total: None, "", iteration)
        for epoch, error in enumerate(losses[1:], 1):
            on_epoch(epoch, error)

    def log_groups(self, groups: Mapping[str, Mapping[str, float | None]], iteration: int = 0) -> None:
        """Tell figures by group and name, at the end of an iteration; those that are not known are left out."""
        values = {
            f"{group}/{name}": value
            for group, named in groups.items()
            for name, value in named.items()
            if value is not None
        }
        self._log(values, (iteration + 1) * self._epochs)


def record_training(critic: Critic, policy: Any, prompts: Sequence[str], settings: Any) -> None:
    """Let a critic's card tell of the training that begins now, and no longer of what an earlier one came to.

    Args:
        critic: about to be trained. Its `about["data"]` names the prompts, unless it tells of an earlier training.
        policy: that it is trained for.
        prompts: that it is trained on.
        settings: a dataclass.
    """
    named = {"data": critic.about["data"]} if "data" in critic.about and "training" not in critic.about else {}
    told = dict(_flat(asdict(settings))) | {"prompts": len(prompts)}
    critic.about = named | {"policy": policy_name(policy), "training": told}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
