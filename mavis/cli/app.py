"""What every Hydra app of the command line shares: its start, its errors, its progress and its parts."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mavis.cli.conf_dir import conf_dir
from mavis.distributed import join_processes, launcher_rank, launcher_world_size, leave_process_group
from mavis.errors import ConfigError, MavisError, PolicyError, closest, first_sentence

_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""What `policy.device` may say instead of one device; transformers spreads the policy in this way."""


def hydra_app(config_name: str, together: bool = False) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """Make a function of a config into a command whose mistakes end in one line and exit status 2.

    In a sweep a mistake ends only its own run, and the status is 1 once all others are done.

    Args:
        config_name: the file in the conf tree, without its ending.
        together: whether several processes can run it as one job; else they are refused.
    """

    def wrap(run: Callable[[Any], Any]) -> Callable[[], None]:
        import hydra

        from mavis.cli.run_status import begin_run, fail_run, in_sweep

        def guarded(config: Any) -> Any:
            count = launcher_world_size()
            try:
                if count > 1:
                    _join(config_name, config, together, in_sweep())
                if launcher_rank() == 0:
                    begin_run()
                prepare(config)
                return run(config)
            except Exception as error:
                said = _explained(error)
                if said is not None and (count > 1 or not in_sweep()):
                    name = "mavis" if count == 1 else f"mavis (process {launcher_rank()} of {count})"
                    print(f"{name}: {said}", file=sys.stderr)
                    sys.exit(2)
                if not in_sweep():
                    raise
                if said is None:  # nobody may look at the terminal of a sweep; its run's own log keeps the whole story
                    logging.getLogger(__name__).exception("the run broke off")
                raise fail_run(said or f"{type(error).__name__}: {error}") from error

        app = hydra.main(version_base="1.3", config_path=conf_dir(), config_name=config_name)(guarded)

        def start() -> None:
            try:
                app()
            except KeyboardInterrupt:
                if launcher_rank() == 0:
                    print(
                        "\nmavis: interrupted. Hint: what is finished is kept; repeat the command to go on.",
                        file=sys.stderr,
                    )
                sys.exit(130)
            leave_process_group()

        return start

    return wrap


def check_alone(command: str) -> None:
    """Refuse several processes to a command that does not share its work out.

    Raises:
        ConfigError: if a launcher started this process with others.
    """
    if launcher_world_size() > 1:
        raise ConfigError(
            f"{launcher_world_size()} processes were started, but {command} runs in one.",
            "leave the launcher out; train, distill and evaluate share their work out over processes.",
        )


def _join(command: str, config: Any, together: bool, sweep: bool) -> None:
    """Join the processes that were started with this one, before anything is put on a device."""
    if not together:
        check_alone(f"mavis {command}")
    if sweep:
        raise ConfigError(
            f"{launcher_world_size()} processes were started for a sweep, whose runs are processes of their own.",
            "leave the launcher out, or start every run by itself.",
        )
    import torch

    device = "cpu" if config.policy.path is None else str(config.policy.get("device", "cpu"))
    if device in _DEVICE_MAPS:
        if torch.cuda.is_available():
            raise ConfigError(
                f"policy.device is {device!r}, which spreads the policy over all accelerators, but "
                f"{launcher_world_size()} processes were started.",
                "start one process for a policy that fits on no single accelerator; else let policy.device be cuda.",
            )
        device = "cpu"
    join_processes(device)


def _explained(error: Exception) -> str | None:
    """Say in one line what a user can mend; None for what only a developer can."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import MissingMandatoryValue

    if isinstance(error, MavisError):
        return str(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not given. Hint: write {error.full_key}=..."
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        return None
    said = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, OSError | SafetensorError):
        return (
            f"{said}. Hint: what is finished is kept; make room or mend what is said, and repeat the command to go on."
        )
    # Most often a value of another kind than a setting takes; a developer asks Hydra for the whole story.
    if not isinstance(error, TypeError | ValueError | RuntimeError):
        return None
    given = ", ".join(HydraConfig.get().overrides.task) or "none"
    return (
        f"{type(error).__name__}: {said}. Hint: check the settings that were given ({given}); "
        "HYDRA_FULL_ERROR=1 shows where it happened."
    )


def prepare(config: Any) -> None:
    """Set the process up as a config says: threads, seed, no progress bars but ours."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Accelerate passes on an option under its old name, and torch would tell every user of it.
    warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
    if launcher_rank() != 0:  # what there is to say of all processes one says
        logging.set_verbosity_error()
    # The embedded policy is so small that a second thread costs more than it brings.
    threads = config.get("threads") or (1 if "policy" in config and config.policy.path is None else None)
    if threads:
        torch.set_num_threads(threads)
    if "seed" in config:
        torch.manual_seed(config.seed)


def load_policy(config: Any) -> tuple[Any, Any]:
    """Load the policy and the tokenizer that a `policy` group describes.

    Args:
        config: with `path`, None for the embedded policy; else also dtype, device, revision and trust_remote_code.

    Returns:
        The policy in evaluation mode, without gradients, and its tokenizer, padding on the left.

    Raises:
        PolicyError: if there is no such model, or its weights are no safetensors.
    """
    if config.path is None:
        from mavis.policies import embedded

        return embedded.load()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = Path(config.path).expanduser()
    if not local.exists() and (local.is_absolute() or str(config.path).startswith((".", "~"))):
        raise PolicyError(f"policy.path is {config.path!r}, which does not exist.", "name a folder or a model id.")
    source = str(local) if local.exists() else config.path
    shared = {"revision": config.get("revision") or "main", "trust_remote_code": config.get("trust_remote_code", False)}
    device = config.get("device", "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **shared)
        policy = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=config.get("dtype", "auto"),
            use_safetensors=True,
            **({"device_map": device} if device in _DEVICE_MAPS else {}),
            **shared,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise PolicyError(
            f"policy.path is {config.path!r}, which cannot be loaded: {first_sentence(error)}.",
            "give a folder with config.json, *.safetensors and a tokenizer, or a model id that the hub can serve.",
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise PolicyError(
                f"the tokenizer of {config.path!r} has neither padding nor an end token.", "give it a pad token."
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    policy = policy if device in _DEVICE_MAPS else policy.to(device)
    return policy.eval().requires_grad_(False), tokenizer


def make_objectives(config: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Build the objectives of a config.

    Args:
        config: with `objectives`, a mapping from name to `_target_` and options.
        names: which, in this order; None takes all.

    Raises:
        ConfigError: if there is none, one is unknown, or one cannot be built.
    """
    from hydra.utils import instantiate
    from omegaconf import MissingMandatoryValue

    found = config.get("objectives") or {}
    wanted = list(found) if names is None else list(names)
    if not wanted:
        raise ConfigError("objective is empty.", "choose at least one, e.g. objective=[positive,dialogue].")
    built = {}
    for name in wanted:
        if name not in found:
            raise ConfigError(
                f"the critic's objective {name!r} is not among the configured ones.",
                f"{closest(name, found)} Choose the critic's by objective=[{','.join(wanted)}].",
            )
        try:
            built[name] = instantiate(found[name], _convert_="all")
        except MissingMandatoryValue:
            raise
        except Exception as error:  # Hydra wraps whatever the constructor raised
            cause = error.__cause__ or error
            said = cause.message if isinstance(cause, MavisError) else " ".join(str(cause).split())
            hint = cause.hint if isinstance(cause, MavisError) else "check its options."
            raise ConfigError(f"objective {name!r} cannot be built: {said}", hint) from error
    return built


def check_objectives_manifest(config: Any, names: Sequence[str], folder: Path) -> None:
    """Mark a run's folder with how its objectives are configured: stored rewards hold for no other options.

    Raises:
        DataError: if the folder holds a run whose objectives are configured otherwise.
    """
    from omegaconf import OmegaConf

    from mavis.utils.files import matches_manifest, write_json

    claim = {name: OmegaConf.to_container(config.objectives[name], resolve=True) for name in names}
    if join_processes().is_main and not matches_manifest(
        folder / "objectives.json", claim, "a run whose objectives are configured otherwise:"
    ):
        write_json(folder / "objectives.json", claim)


def read_prompts(config: Any) -> list[str]:
    """Read the prompts that one entry of a `data` group describes."""
    from omegaconf import OmegaConf

    from mavis.policies import embedded
    from mavis.rollouts import load_prompts

    options: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    if options["source"] == "embedded":
        options["source"] = str(embedded.path() / "openings.txt")
    return load_prompts(**options)


def data_name(config: Any) -> str:
    """Name the prompts of one entry of a `data` group for a model card: files without their folders."""
    from omegaconf import OmegaConf

    if OmegaConf.is_list(config.source):
        return f"{len(config.source)} prompts of its own"
    if config.source == "embedded":
        return "the story openings that ship with mavis"
    path = Path(config.source).expanduser()
    return path.name if path.exists() else str(config.source)


def sampling_settings(config: Any, shard_size: int, critic: Any | None = None) -> Any:
    """Build the settings of sampling from the `decoding` group and the seed; see `as_trained`."""
    from mavis.rollouts import RolloutSettings

    return RolloutSettings(
        max_new_tokens=config.decoding.max_new_tokens,
        top_k=as_trained(config.decoding, "top_k", critic),
        temperature=as_trained(config.decoding, "temperature", critic),
        shard_size=shard_size,
        seed=config.seed,
    )


def as_trained(decoding: Any, name: str, critic: Any | None) -> Any:
    """Read `top_k` or `temperature` of a `decoding` group.

    Values and budgets hold for the candidates and the temperature they were learnt with, so `as_trained` takes those of
    the critic's calibration.

    Raises:
        ConfigError: if `as_trained` meets a critic that carries no calibration.
    """
    if decoding[name] != "as_trained":
        return decoding[name]
    if critic is None or critic.calibration is None:
        raise ConfigError(
            f"decoding.{name} is as_trained, but the critic carries no calibration that would tell.",
            f"give a number, e.g. decoding.{name}={40 if name == 'top_k' else 1.0}.",
        )
    return getattr(critic.calibration, name)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar per stage; yields what to call with a stage, how much is done and how much there is.

    Of several processes only the main one shows anything.
    """
    if not join_processes().is_main:
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from mavis.cli.run_status import side_by_side

    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, Any] = {}
    # Bars that several processes redraw on one terminal are no bars: each shows its own once, when it is through.
    console = Console(force_terminal=False) if side_by_side() else None
    with Progress(*columns, console=console) as bars:

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield update


def say(text: str) -> None:
    """Print a line, of several processes only in the main one."""
    if join_processes().is_main:
        print(text)


def show_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table, as `say` does; numbers get three digits and a missing one a dash."""
    if not join_processes().is_main:
        return
    from rich.console import Console
    from rich.table import Table

    # In a pipe there is no width to fit into; rich would cut cells at 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, no_wrap=True, justify="right" if isinstance(rows[0][name], int | float) else "left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number:.3g}" for name, number in value.items() if number)
    if isinstance(value, float):
        return f"{0.0 if abs(value) < 1e-6 else value:.3g}"  # a mean that only rounding keeps from 0
    return str(value)
