"""Logging of metrics to TensorBoard, or to any other tracker that Accelerate supports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from mavis.cli.build import plain
from mavis.errors import ConfigError, closest
from mavis.training.accelerate_session import accelerator
from mavis.training.metrics import Log
from mavis.utils.mappings import flatten

_CUSTOM_TRACKER = "write e.g. '{_target_: my_module.MyTracker}', a subclass of accelerate.tracking.GeneralTracker."


@contextmanager
def start_trackers(config: Any, folder: Path, device: torch.device) -> Iterator[Log | None]:
    """Start the trackers of a config for the duration of a `with` block.

    Args:
        config: with `tracking`: `with`, names that Accelerate knows or `_target_` mappings of a `GeneralTracker`;
            `project`; and `options` by name. Trackers get all settings except these, which may contain keys.
        folder: of the run; trackers write their local files to `folder/tracking`.
        device: where training runs, for Accelerate.

    Yields:
        A function that logs metrics by name at a step; None if there is no tracker.

    Raises:
        ConfigError: if a tracker is unknown, not installed, or does not start.
    """
    if not config.tracking["with"]:
        yield None
        return
    settings = plain(config)
    options = settings.pop("tracking")
    requested = options["with"] if isinstance(options["with"], list) else [options["with"]]
    with ExitStack() as stack:
        is_main = stack.enter_context(accelerator(device)).is_main_process
        started = []
        for one in requested:
            tracker = _build_tracker(one, options, folder)
            if not is_main and tracker.main_process_only:
                continue
            try:
                tracker.start()
                tracker.store_init_configuration(_loggable(settings))
            except Exception as error:  # each tracker's library has its own exceptions
                text = " ".join(str(error).split()) or type(error).__name__
                raise ConfigError(
                    f"tracking.with names {tracker.name!r}, which does not start: {text}",
                    "see its documentation; its options are given in tracking.options.",
                ) from error
            stack.callback(tracker.finish)
            started.append(tracker)

        def log(values: Mapping[str, float], step: int) -> None:
            for tracker in started:
                tracker.log(dict(values), step=step)

        yield log


def _build_tracker(requested: Any, options: Mapping[str, Any], folder: Path) -> Any:
    """Build a tracker without starting it."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if isinstance(requested, Mapping):
        return _build_custom_tracker(dict(requested))
    known = {str(name): kind for name, kind in LOGGER_TYPE_TO_CLASS.items()}
    if requested not in known:
        raise ConfigError(f"tracking.with names {requested!r}.", closest(str(requested), known))
    if requested not in map(str, get_available_trackers()):
        package = "'mavis-decoding[tracking]'" if requested == "tensorboard" else requested.replace("_", "-")
        raise ConfigError(f"tracking.with names {requested!r}, which is not installed.", f"pip install {package}.")
    # A resumed run logs everything again, so TensorBoard discards what was logged before.
    defaults = {"purge_step": 0} if requested == "tensorboard" else {}
    arguments = defaults | ((options["options"] or {}).get(requested) or {})
    if known[requested].requires_logging_directory:
        directory = folder / "tracking"
        directory.mkdir(parents=True, exist_ok=True)
        return known[requested](options["project"], str(directory), **arguments)
    return known[requested](options["project"], **arguments)


def _build_custom_tracker(requested: dict[str, Any]) -> Any:
    from accelerate.tracking import GeneralTracker
    from hydra.utils import instantiate

    try:
        tracker = instantiate(requested, _convert_="all")
    except Exception as error:  # Hydra wraps the constructor's exception
        text = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(
            f"tracking.with contains {requested}, which cannot be built: {text}", _CUSTOM_TRACKER
        ) from error
    if not isinstance(tracker, GeneralTracker):
        raise ConfigError(f"tracking.with contains {requested}, which is not a GeneralTracker.", _CUSTOM_TRACKER)
    return tracker


def _loggable(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Name all settings by dotted path, those that are not plain values as text."""
    flat = flatten(settings).items()
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in flat}
