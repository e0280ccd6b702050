"""The wrapper that turns a function of a config into a command, and how errors end one."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

from mavis.cli.conf_dir import conf_dir
from mavis.distributed import join_processes, launcher_rank, launcher_world_size, leave_process_group
from mavis.errors import ConfigError, MavisError, ObjectiveError, check_whole
from mavis.policies.devices import DEVICE_MAPS


def hydra_app(config_name: str, *, multi_process: bool = False) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """Turn a function of a config into a command that reports user errors in one line, with exit status 2.

    In a sweep an error ends only its own run, and the exit status is 1 after all others have finished.

    Args:
        config_name: the file in the conf tree, without its ending.
        multi_process: whether several processes can share the work; otherwise they are refused.
    """

    def wrap(run: Callable[[Any], Any]) -> Callable[[], None]:
        import hydra

        from mavis.cli.run_status import clear_error, in_sweep, record_error

        def guarded(config: Any) -> Any:
            count = launcher_world_size()
            try:
                if count > 1:
                    _join_processes(config_name, config, multi_process, in_sweep())
                if launcher_rank() == 0:
                    clear_error()
                prepare_process(config)
                with _warnings_in_one_line():
                    return run(config)
            except Exception as error:
                message = _user_message(error)
                if message is not None and (count > 1 or not in_sweep()):
                    name = "mavis" if count == 1 else f"mavis (process {launcher_rank()} of {count})"
                    print(f"{name}: {message}", file=sys.stderr)
                    sys.exit(2)
                if not in_sweep():
                    raise
                if message is None:  # the terminal of a sweep may go unread, so the run's own log holds the traceback
                    logging.getLogger(__name__).exception("the run failed")
                raise record_error(message or f"{type(error).__name__}: {error}") from error

        app = hydra.main(version_base="1.3", config_path=conf_dir(), config_name=config_name)(guarded)

        def start() -> None:
            try:
                app()
            except KeyboardInterrupt:
                if launcher_rank() == 0:
                    print(
                        "\nmavis: interrupted. Hint: finished work is kept; rerun the command to resume.",
                        file=sys.stderr,
                    )
                sys.exit(130)
            leave_process_group()

        return start

    return wrap


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print warnings of mavis as one line, without a place in its code."""
    original = warnings.formatwarning

    def one_line(message: Any, category: Any, *place: Any) -> str:
        if issubclass(category, UserWarning):
            return f"mavis: warning: {message}\n"
        return original(message, category, *place)

    warnings.formatwarning = one_line  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = original


def check_single_process(command: str) -> None:
    """Refuse several processes for a command that does not share its work.

    Raises:
        ConfigError: if a launcher started this process with others.
    """
    if launcher_world_size() > 1:
        raise ConfigError(
            f"{launcher_world_size()} processes were started, but {command} runs in one.",
            "start it without the launcher; train, distill and evaluate can share their work between processes.",
        )


def prepare_process(config: Any) -> None:
    """Set the number of threads and the seed that a config asks for, and silence what others would print."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Accelerate passes an option on under its deprecated name, and torch would warn every user.
    warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
    if launcher_rank() != 0:  # one process speaks for all
        logging.set_verbosity_error()
    # The embedded policy is so small that a second thread slows it down.
    if config.get("threads") is not None:
        check_whole(ConfigError, "null takes torch's default.", threads=config.threads)
    threads = config.get("threads") or (1 if "policy" in config and config.policy.path is None else None)
    if threads:
        torch.set_num_threads(threads)
    if "seed" in config:
        check_whole(ConfigError, "0 is the default.", 0, seed=config.seed)
        torch.manual_seed(config.seed)


def _join_processes(command: str, config: Any, multi_process: bool, sweep: bool) -> None:
    """Join the processes that the launcher started, before anything is placed on a device."""
    if not multi_process:
        check_single_process(f"mavis {command}")
    if sweep:
        raise ConfigError(
            f"{launcher_world_size()} processes were started for a sweep, whose runs are processes of their own.",
            "start the sweep without the launcher, or start each run separately.",
        )
    import torch

    device = "cpu" if config.policy.path is None else str(config.policy.get("device", "cpu"))
    if device in DEVICE_MAPS:
        if torch.cuda.is_available():
            raise ConfigError(
                f"policy.device is {device!r}, which spreads the policy over all accelerators, but "
                f"{launcher_world_size()} processes were started.",
                "start one process for a policy that fits on no single accelerator; otherwise set policy.device=cuda.",
            )
        device = "cpu"
    join_processes(device)


def _user_message(error: Exception) -> str | None:
    """Explain in one line an error that a user can fix; return None for one that only a developer can."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import MissingMandatoryValue
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    if isinstance(error, ObjectiveError) and error.__cause__ and os.environ.get("HYDRA_FULL_ERROR") == "1":
        return None  # the author of an objective asks for its traceback
    if isinstance(error, MavisError):
        return str(error)
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        return f"the setting {error.full_key} is missing, which this command reads. Hint: do not remove it by ~."
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not given. Hint: write {error.full_key}=..."
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        return None
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, OSError | SafetensorError):
        return (
            f"{text}. Hint: finished work is kept; fix the cause or free some space, and rerun the command to resume."
        )
    # Mostly a setting of the wrong type. A developer asks Hydra for the traceback.
    if not isinstance(error, TypeError | ValueError | RuntimeError):
        return None
    overrides = ", ".join(HydraConfig.get().overrides.task) or "none"
    return (
        f"{type(error).__name__}: {text}. Hint: check the settings that were given ({overrides}); "
        "HYDRA_FULL_ERROR=1 shows where it happened."
    )
