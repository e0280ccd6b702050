"""`mavis search`: search the settings of training, with one trained and measured critic per trial."""

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

from mavis.cli.app import hydra_app, load_policy, make_objectives, show_table
from mavis.cli.evaluate import evaluate, evaluation_settings, unseen_prompts
from mavis.cli.run_status import ERROR
from mavis.cli.search_space import as_it_is, search_space
from mavis.cli.train import train
from mavis.errors import ConfigError, MavisError, check_whole, closest, first_sentence, import_optional
from mavis.utils.files import read_json, write_json
from mavis.utils.optuna_study import open_study, quiet_optuna, trial_sampler

FIGURES = ("efficiency", "seconds")
"""What a trial is measured by: mean frontier efficiency, and the seconds that its training took."""

_HOPELESS = 3
"""After so many failed trials and none that came to anything, a search gives up."""

Launch = Callable[..., Sequence[Any]]


def search(config: Any, arguments: Sequence[str], launch: Launch) -> None:
    """Choose, run and judge trials until there are as many as a config asks for, and write and show what they came to.

    Args:
        config: of `conf/search.yaml`, with Hydra's own part.
        arguments: the overrides as they were given, among them ranges and choices.
        launch: of Hydra's launcher: from lists of overrides to what the runs return.
    """
    try:
        with _alone(Path(str(config.hydra.sweep.dir))):
            _search(config, arguments, launch)
    except MavisError as error:
        print(f"mavis: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second search out of a folder: it would take up, as broken off, the trials that the first is at."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"output is {str(folder)!r}, in which another search is at work.", "wait for it, or name a new folder."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"output is {str(folder)!r}, which cannot be written: {first_sentence(error)}.", "name a folder of yours."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _search(config: Any, arguments: Sequence[str], launch: Launch) -> None:
    options, folder = config.search, Path(str(config.hydra.sweep.dir))
    check_whole(ConfigError, "e.g. search.trials=20.", trials=options.trials, together=options.together)
    directions = _directions(options)
    optuna = import_optional("optuna", "search", "sweep")
    fixed, space, texts = search_space(arguments, dict(options.space or {}))
    claim = {
        "space": texts,
        "fixed": sorted(one for one in fixed if not one.startswith(_FREE)),
        "directions": directions,
        "seed": config.seed,
    }
    with quiet_optuna():
        study = open_study(
            folder / "study.jsonl",
            claim,
            directions=list(directions.values()),
            holds="a search with different settings, space or metrics",
            error=ConfigError,
        )
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(as_it_is(config, space))
        states = optuna.trial.TrialState
        while (done := len(_over(study, states))) < options.trials:
            numbers = range(done, min(done + options.together, options.trials))
            batch = [_take(study, number, space, config.seed, options.together > 1) for number in numbers]
            overrides = [
                [*fixed, *(f"{name}={value}" for name, value in trial.params.items()), f"hydra.sweep.subdir={_name(n)}"]
                for n, trial in zip(numbers, batch, strict=True)
            ]
            results = _launched(launch, overrides, done)
            for trial, result in zip(batch, results, strict=True):
                values = _values(result, list(directions))
                study.tell(trial.number, values, state=states.COMPLETE if values else states.FAIL)
            found = _found(folder, study, states, directions, texts)
            write_json(folder / "search.json", found)
            _refuse_hopeless(found["trials"], options.trials)
        found = _found(folder, study, states, directions, texts)
    write_json(folder / "search.json", found)
    show_table(
        "trials; * marks what no other trial beats",
        [
            {
                "trial": f"{_name(trial['trial'])}{'*' if trial['trial'] in found['best'] else ''}",
                **trial["settings"],
                **{name: (trial["figures"] or {}).get(name) for name in directions},
                "error": trial["error"],
            }
            for trial in found["trials"]
        ],
    )
    print("\n".join(f"best: {folder / _name(number) / 'critic'}" for number in found["best"]))


def _launched(launch: Launch, overrides: Sequence[Sequence[str]], first: int) -> Sequence[Any]:
    """Run a batch; what a launcher itself raises, as when a run was killed, breaks the search off."""
    try:
        return launch(overrides, initial_job_idx=first)
    except Exception as error:  # of whatever the launcher is made of
        raise ConfigError(
            f"the launcher broke off: {type(error).__name__}: {first_sentence(error)}.",
            "repeat the command to go on; if a trial was killed for memory, with fewer trials together.",
        ) from error


_FREE = ("search.", "launcher=", "output=", "threads=", "tracking.", "hydra.", "hydra/")
"""How overrides begin that may change from one call to the next of the same search."""


def _name(number: int) -> str:
    return f"trial-{number:03d}"


def _directions(options: Any) -> dict[str, str]:
    """Read which figures are to be high and which low."""
    found = {}
    for wanted, direction in ((options.maximise, "maximize"), (options.minimise, "minimize")):
        for name in [wanted] if isinstance(wanted, str) else wanted or ():
            if name not in FIGURES:
                raise ConfigError(f"{name!r} is not measured.", closest(str(name), FIGURES))
            if name in found:
                raise ConfigError(f"{name!r} is searched for twice.", "name every figure once.")
            found[name] = direction
    if not found:
        raise ConfigError("maximise and minimise are empty.", "search.maximise=[efficiency] is the default.")
    return found


def _over(study: Any, states: Any) -> list[Any]:
    ended: list[Any] = study.get_trials(deepcopy=False, states=(states.COMPLETE, states.FAIL))
    return ended


def _take(study: Any, number: int, space: dict[str, Any], seed: int, together: bool) -> Any:
    """Take up the trial that a search was broken off in, or ask for a new one."""
    running = (trial for trial in study.get_trials(deepcopy=False) if not trial.state.is_finished())
    begun = next((trial for trial in running if trial.user_attrs.get("number") == number), None)
    if begun is not None:
        return begun
    study.sampler = trial_sampler(seed, number, constant_liar=together)
    asked = study.ask(fixed_distributions=space)
    asked.set_user_attr("number", number)
    return study.get_trials(deepcopy=False)[asked.number]


def _values(result: Any, names: Sequence[str]) -> list[float] | None:
    """Read the figures of a trial; None if it has failed, or one of them is missing."""
    try:
        figures = result.return_value
    except Exception:  # the run has left word of it in its folder
        return None
    values = [figures[name] for name in names]
    return values if all(value is not None and math.isfinite(value) for value in values) else None


def _found(folder: Path, study: Any, states: Any, directions: dict[str, str], texts: dict[str, str]) -> dict[str, Any]:
    """Gather what a search came to so far."""
    ended = _over(study, states)
    complete = any(trial.state == states.COMPLETE for trial in ended)
    return {
        "directions": directions,
        "space": texts,
        "best": [trial.user_attrs["number"] for trial in study.best_trials] if complete else [],
        "trials": [
            {
                "trial": (number := trial.user_attrs["number"]),
                "settings": dict(trial.params),
                "figures": dict(zip(directions, trial.values, strict=True)) if trial.values else None,
                "error": None if trial.values else _why(folder / _name(number)),
            }
            for trial in ended
        ],
    }


def _why(run: Path) -> str:
    if (run / ERROR).is_file():
        return str(read_json(run / ERROR)["error"])
    return "at every target KL the limit has too few effective samples, or the cut to candidates costs more"


def _refuse_hopeless(trials: Sequence[dict[str, Any]], asked: int) -> None:
    if len(trials) >= min(_HOPELESS, asked) and not any(trial["figures"] for trial in trials):
        raise ConfigError(
            f"all of {len(trials)} trials failed, the last with: {trials[-1]['error']}",
            "mend that, and name a new output folder.",
        )


def _run(config: Any) -> dict[str, float | None]:
    """Run one trial and return its figures."""
    from hydra.core.hydra_config import HydraConfig

    from mavis.evaluation import write_report

    folder = Path(HydraConfig.get().runtime.output_dir)
    if (folder / "figures.json").is_file():  # of a batch that was broken off while others were at work
        figures: dict[str, float | None] = read_json(folder / "figures.json")
        return figures
    policy, tokenizer = load_policy(config.policy)
    with _clock(folder / "seconds.json"):
        critic = train(config, policy, tokenizer, folder)
    place = _reference(config, policy, tokenizer, Path(HydraConfig.get().sweep.dir))
    report = evaluate(config, policy, tokenizer, critic, folder / "evaluation", reference=place)
    assert report is not None  # one process
    write_report(folder, report)
    figures = {"efficiency": report.mean_efficiency(), "seconds": read_json(folder / "seconds.json")["seconds"]}
    write_json(folder / "figures.json", figures)
    return figures


@contextmanager
def _clock(path: Path) -> Iterator[None]:
    """Add the seconds of a block to a file, which those of earlier attempts are in; a killed attempt adds nothing."""
    before = read_json(path)["seconds"] if path.is_file() else 0.0
    began = time.perf_counter()
    try:
        yield
    finally:
        write_json(path, {"seconds": before + time.perf_counter() - began})


def _reference(config: Any, policy: Any, tokenizer: Any, folder: Path) -> Path:
    """Draw the reference rollouts that trials with the same policy, prompts and sampling share, one trial for all."""
    from filelock import FileLock
    from omegaconf import OmegaConf

    from mavis.evaluation.sweep_rollouts import reference_rollouts

    made_of = [
        OmegaConf.to_container(config[group], resolve=True) for group in ("policy", "objectives", "data", "decoding")
    ]
    made_of += [config.evaluation.reference_samples, config.evaluation.shard_size, config.seed]
    place = folder / "reference" / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    place.mkdir(parents=True, exist_ok=True)
    objectives, prompts, settings = make_objectives(config), unseen_prompts(config.data), evaluation_settings(config)
    with FileLock(place / "lock"):
        for _ in reference_rollouts(policy, tokenizer, objectives, prompts, place, settings):
            pass
    return place


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("search")(_run)()


if __name__ == "__main__":
    main()
