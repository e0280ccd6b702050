"""The sweeper of `mavis search`, where Hydra looks for plugins; every Hydra app imports it, so it imports little."""

from __future__ import annotations

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class MavisSearch(Sweeper):
    """Lets `mavis.cli.search` choose the runs of a sweep in batches, which the configured launcher runs.

    Args:
        options: of Hydra's own sweeper; unused.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """See `Sweeper.setup`."""
        self.config = config
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """See `Sweeper.sweep`."""
        from mavis.cli.search import search

        search(self.config, arguments, self._launcher.launch)
