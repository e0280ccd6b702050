"""Metrics to TensorBoard and to whatever other tracker Accelerate knows, as a config says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from mavis.errors import ConfigError, closest
from mavis.training.accelerate_session import accelerator
from mavis.training.metrics import Log


@contextmanager
def trackers(config: Any, folder: Path, device: torch.device) -> Iterator[Log | None]:
    """Start the trackers of a config, and end them with the block, however it ends.

    Args:
        config: with `tracking`: `with`, names that Accelerate knows or `_target_` mappings of a `GeneralTracker`;
            `project`; and `options` by name. The trackers are told all settings but these, which may hold keys.
        folder: of the run; what a tracker writes on this machine goes to `folder/tracking`.
        device: where the training is; Accelerate, through which trackers are reached, is borrowed for it.

    Yields:
        What to tell figures to; None if there is no tracker.

    Raises:
        ConfigError: if a tracker is unknown, not installed, or does not start.
    """
    if not config.tracking["with"]:
        yield None
        return
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(config, resolve=True)
    options = plain.pop("tracking")
    wanted = options["with"] if isinstance(options["with"], list) else [options["with"]]
    with ExitStack() as stack:
        main = stack.enter_context(accelerator(device)).is_main_process
        started = []
        for one in wanted:
            tracker = _make(one, options, folder)
            if not main and tracker.main_process_only:
                continue
            try:
                tracker.start()
                tracker.store_init_configuration(dict(_flat(plain)))
            except Exception as error:  # whatever a tracker's own library raises
                said = " ".join(str(error).split()) or type(error).__name__
                raise ConfigError(
                    f"tracking.with names {tracker.name!r}, which does not start: {said}",
                    "see its own documentation; tracking.options holds what it takes.",
                ) from error
            stack.callback(tracker.finish)
            started.append(tracker)

        def log(values: Mapping[str, float], step: int) -> None:
            for tracker in started:
                tracker.log(dict(values), step=step)

        yield log


def _make(wanted: Any, options: Mapping[str, Any], folder: Path) -> Any:
    """Build a tracker, not started yet."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
    from hydra.utils import instantiate

    if isinstance(wanted, Mapping):
        try:
            tracker = instantiate(dict(wanted), _convert_="all")
        except Exception as error:  # Hydra wraps whatever the constructor raised
            said = " ".join(str(error.__cause__ or error).split())
            raise ConfigError(f"tracking.with holds {dict(wanted)}, which cannot be built: {said}", _OWN) from error
        if not isinstance(tracker, GeneralTracker):
            raise ConfigError(f"tracking.with holds {dict(wanted)}, which is no GeneralTracker.", _OWN)
        return tracker
    known = {str(name): kind for name, kind in LOGGER_TYPE_TO_CLASS.items()}
    if wanted not in known:
        raise ConfigError(f"tracking.with names {wanted!r}.", closest(str(wanted), known))
    if wanted not in map(str, get_available_trackers()):
        extra = "'mavis-decoding[tracking]'" if wanted == "tensorboard" else wanted.replace("_", "-")
        raise ConfigError(f"tracking.with names {wanted!r}, which is not installed.", f"pip install {extra}.")
    # A run that goes on tells everything again; TensorBoard then forgets what an earlier call told.
    own = ({"purge_step": 0} if wanted == "tensorboard" else {}) | ((options["options"] or {}).get(wanted) or {})
    if known[wanted].requires_logging_directory:
        place = folder / "tracking"
        place.mkdir(parents=True, exist_ok=True)
        return known[wanted](options["project"], str(place), **own)
    return known[wanted](options["project"], **own)


_OWN = "write e.g. '{_target_: my_module.MyTracker}', a subclass of accelerate.tracking.GeneralTracker."


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name every setting by its path; what is no plain value is told as text."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, bool | int | float | str) else str(value)
