"""`mavis search`: search the settings of training, with a critic trained and evaluated in each trial."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mavis.cli.build import (
    build_objectives,
    evaluation_settings,
    load_policy,
    plain,
    read_evaluation_prompts,
)
from mavis.cli.console import print_table
from mavis.cli.evaluate import evaluate
from mavis.cli.hydra_app import hydra_app
from mavis.cli.run_status import ERROR_FILE
from mavis.cli.search_space import current_settings, search_space
from mavis.cli.train import train
from mavis.errors import ConfigError, MavisError, check_whole, closest, first_sentence, import_optional
from mavis.utils.files import read_json, write_json
from mavis.utils.optuna_study import open_study, quiet_optuna, trial_sampler

METRICS = ("efficiency", "seconds")
"""What a trial is judged by: mean frontier efficiency, and the duration of its training in seconds."""

_MAX_FAILURES = 3
"""A search stops after this many failed trials if none has succeeded."""

_MAY_CHANGE = ("search.", "launcher=", "output=", "threads=", "tracking.", "hydra.", "hydra/")
"""Prefixes of the overrides that may change when a search is rerun."""

Launch = Callable[..., Sequence[Any]]


def search(config: Any, arguments: Sequence[str], launch: Launch) -> None:
    """Choose, run and record trials until there are as many as a config asks for; write and print the results.

    Args:
        config: of `conf/search.yaml`, including Hydra's own node.
        arguments: the overrides as given, with ranges and choices.
        launch: Hydra's launcher: a function from lists of overrides to what the runs return.
    """
    try:
        with _folder_lock(Path(str(config.hydra.sweep.dir))):
            _search(config, arguments, launch)
    except MavisError as error:
        print(f"mavis: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Refuse a second search in the same folder: it would mistake running trials for interrupted ones."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"output is {str(folder)!r}, where another search is running.", "wait for it, or name a new folder."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"output is {str(folder)!r}, which cannot be written: {first_sentence(error)}.",
            "name a folder that you may write to.",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _search(config: Any, arguments: Sequence[str], launch: Launch) -> None:
    options, folder = config.search, Path(str(config.hydra.sweep.dir))
    parallel = options.parallel_trials
    check_whole(ConfigError, "e.g. search.trials=20.", trials=options.trials, parallel_trials=parallel)
    directions = _directions(options)
    import_optional("optuna", "search", "sweep")
    fixed, space, texts = search_space(arguments, dict(options.space or {}))
    manifest = {
        "space": texts,
        "fixed": sorted(one for one in fixed if not one.startswith(_MAY_CHANGE)),
        "directions": directions,
        "seed": config.seed,
    }
    with quiet_optuna():
        study = open_study(
            folder / "study.jsonl",
            manifest,
            directions=list(directions.values()),
            holds="a search with different settings, space or metrics",
            error=ConfigError,
        )
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(current_settings(config, space))
        while (done := len(_ended_trials(study))) < options.trials:
            numbers = range(done, min(done + parallel, options.trials))
            batch = [_next_trial(study, number, space, config.seed, parallel > 1) for number in numbers]
            overrides = [
                [*fixed, *(f"{k}={v}" for k, v in trial.params.items()), f"hydra.sweep.subdir={_trial_name(number)}"]
                for number, trial in zip(numbers, batch, strict=True)
            ]
            for trial, result in zip(batch, _launch_batch(launch, overrides, done), strict=True):
                _record(study, trial, result, list(directions))
            _check_any_success(_write_summary(folder, study, directions, texts)["trials"], options.trials)
        summary = _write_summary(folder, study, directions, texts)
    _print_summary(summary, folder)


def _print_summary(summary: dict[str, Any], folder: Path) -> None:
    print_table(
        "trials; * marks those that no other trial beats",
        [
            {
                "trial": f"{_trial_name(trial['trial'])}{'*' if trial['trial'] in summary['best'] else ''}",
                **trial["settings"],
                **{name: (trial["metrics"] or {}).get(name) for name in summary["directions"]},
                "error": trial["error"],
            }
            for trial in summary["trials"]
        ],
    )
    print("\n".join(f"best: {folder / _trial_name(number) / 'critic'}" for number in summary["best"]))


def _directions(options: Any) -> dict[str, str]:
    """Read which metrics are maximised and which minimised."""
    directions = {}
    for names, direction in ((options.maximise, "maximize"), (options.minimise, "minimize")):
        for name in [names] if isinstance(names, str) else names or ():
            if name not in METRICS:
                raise ConfigError(f"metric {name!r} does not exist.", closest(str(name), METRICS))
            if name in directions:
                raise ConfigError(f"metric {name!r} is named twice.", "name each metric once.")
            directions[name] = direction
    if not directions:
        raise ConfigError("maximise and minimise are empty.", "search.maximise=[efficiency] is the default.")
    return directions


def _ended_trials(study: Any) -> list[Any]:
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def _next_trial(study: Any, number: int, space: dict[str, Any], seed: int, parallel: bool) -> Any:
    """Return the trial of this number that an interrupted search left unfinished, or a new one."""
    unfinished = (trial for trial in study.get_trials(deepcopy=False) if not trial.state.is_finished())
    found = next((trial for trial in unfinished if trial.user_attrs.get("number") == number), None)
    if found is not None:
        return found
    study.sampler = trial_sampler(seed, number, constant_liar=parallel)
    trial = study.ask(fixed_distributions=space)
    trial.set_user_attr("number", number)
    return study.get_trials(deepcopy=False)[trial.number]


def _launch_batch(launch: Launch, overrides: Sequence[Sequence[str]], first: int) -> Sequence[Any]:
    """Run a batch of trials; an error of the launcher itself, such as a killed worker, ends the search."""
    try:
        return launch(overrides, initial_job_idx=first)
    except Exception as error:  # each launcher has its own exceptions
        raise ConfigError(
            f"the launcher failed: {type(error).__name__}: {first_sentence(error)}.",
            "rerun the command to resume; with fewer parallel trials if one was killed for memory.",
        ) from error


def _record(study: Any, trial: Any, result: Any, names: Sequence[str]) -> None:
    """Record the metrics of a trial; it counts as failed if it raised an error or one of them is missing."""
    from optuna.trial import TrialState

    try:
        metrics = result.return_value
    except Exception:  # the run has written its error to its folder
        metrics = {}
    values = [metrics.get(name) for name in names]
    if all(value is not None and math.isfinite(value) for value in values):
        study.tell(trial.number, values, state=TrialState.COMPLETE)
    else:
        study.tell(trial.number, None, state=TrialState.FAIL)


def _write_summary(folder: Path, study: Any, directions: dict[str, str], texts: dict[str, str]) -> dict[str, Any]:
    """Write `search.json`, the trials so far, and return its content."""
    trials = _ended_trials(study)
    summary = {
        "directions": directions,
        "space": texts,
        "best": [trial.user_attrs["number"] for trial in study.best_trials] if any(t.values for t in trials) else [],
        "trials": [
            {
                "trial": (number := trial.user_attrs["number"]),
                "settings": dict(trial.params),
                "metrics": dict(zip(directions, trial.values, strict=True)) if trial.values else None,
                "error": None if trial.values else _failure(folder / _trial_name(number)),
            }
            for trial in trials
        ],
    }
    write_json(folder / "search.json", summary)
    return summary


def _trial_name(number: int) -> str:
    return f"trial-{number:03d}"


def _failure(run: Path) -> str:
    if (run / ERROR_FILE).is_file():
        return str(read_json(run / ERROR_FILE)["error"])
    return "no target KL has an efficiency: the frontier has too few effective samples, or truncation costs more KL"


def _check_any_success(trials: Sequence[dict[str, Any]], wanted: int) -> None:
    if len(trials) >= min(_MAX_FAILURES, wanted) and not any(trial["metrics"] for trial in trials):
        raise ConfigError(
            f"all of {len(trials)} trials failed, the last with: {trials[-1]['error']}",
            "fix the cause, and name a new output folder.",
        )


def _run(config: Any) -> dict[str, float | None]:
    """Run one trial and return its metrics."""
    from hydra.core.hydra_config import HydraConfig

    from mavis.evaluation import write_report

    folder = Path(HydraConfig.get().runtime.output_dir)
    metrics: dict[str, float | None]
    if (folder / "metrics.json").is_file():  # finished in a batch that was interrupted before its other trials
        metrics = read_json(folder / "metrics.json")
        return metrics
    policy, tokenizer = load_policy(config.policy)
    with _accumulated_seconds(folder / "seconds.json"):
        critic = train(config, policy, tokenizer, folder)
    reference = _shared_reference(config, policy, tokenizer, Path(HydraConfig.get().sweep.dir))
    objectives = build_objectives(config, critic.objectives)
    report = evaluate(config, policy, tokenizer, critic, objectives, folder / "evaluation", reference=reference)
    assert report is not None  # there is one process
    write_report(folder, report)
    metrics = {"efficiency": report.mean_efficiency(), "seconds": read_json(folder / "seconds.json")["seconds"]}
    write_json(folder / "metrics.json", metrics)
    return metrics


@contextmanager
def _accumulated_seconds(path: Path) -> Iterator[None]:
    """Add the duration of a block to a file that earlier attempts have added to; a killed attempt adds nothing."""
    before = read_json(path)["seconds"] if path.is_file() else 0.0
    start = time.perf_counter()
    try:
        yield
    finally:
        write_json(path, {"seconds": before + time.perf_counter() - start})


def _shared_reference(config: Any, policy: Any, tokenizer: Any, folder: Path) -> Path:
    """Sample the reference rollouts that trials with the same policy, prompts and sampling share, once for all.

    Returns:
        Their folder.
    """
    from filelock import FileLock

    from mavis.evaluation.sweep_rollouts import reference_rollouts

    key = [plain(config[group]) for group in ("policy", "objectives", "data", "decoding")]
    key += [config.evaluation.reference_samples, config.evaluation.shard_size, config.seed]
    shared = folder / "reference" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    shared.mkdir(parents=True, exist_ok=True)
    objectives, settings = build_objectives(config), evaluation_settings(config)
    prompts = read_evaluation_prompts(config.data)
    with FileLock(shared / "lock"):
        for _ in reference_rollouts(policy, tokenizer, objectives, prompts, shared, settings):
            pass
    return shared


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("search")(_run)()


if __name__ == "__main__":
    main()
