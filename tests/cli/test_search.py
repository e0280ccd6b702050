"""The search of settings: which trials it runs, how it resumes, and how it handles failures."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus

from mavis.cli.conf_dir import conf_dir
from mavis.cli.search import search
from mavis.cli.search_space import current_settings, search_space
from mavis.critics import Critic
from mavis.errors import ConfigError
from mavis.utils.files import write_json

pytest.importorskip("optuna")

SPACE = ("beta=interval(1.0,8.0)", "critic.hidden=64,128,256", "improvement.iterations=range(1,5)")
Metrics = dict[str, float | None]


def measured(settings: dict[str, str]) -> Metrics:
    """Best at beta 5, 64 wide and 4 iterations; the seconds are the iterations."""
    beta, hidden, iterations = (float(settings[name.partition("=")[0]]) for name in SPACE)
    return {"efficiency": 1 - (beta - 5) ** 2 / 20 - hidden / 1000 + iterations / 100, "seconds": iterations}


class Launched:
    """Stands for Hydra's launcher: runs a function of each trial's settings, and records them."""

    def __init__(self, run: Callable[[dict[str, str]], Metrics], folder: Path, breaks: Sequence[int] = ()) -> None:
        self.run, self.folder, self.breaks = run, folder, list(breaks)
        self.batches: list[list[dict[str, str]]] = []

    def __call__(self, overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        batch = [dict(one.split("=", 1) for one in run) for run in overrides]
        self.batches.append(batch)
        if len(self.batches) in self.breaks:
            raise KeyboardInterrupt
        return [self._run(settings) for settings in batch]

    def _run(self, settings: dict[str, str]) -> JobReturn:
        done = JobReturn(status=JobStatus.COMPLETED)
        try:
            done.return_value = self.run(settings)
        except Exception as error:
            done.status, done.return_value = JobStatus.FAILED, error
            write_json(self.folder / settings["hydra.sweep.subdir"] / "error.json", {"error": str(error)})
        return done

    @property
    def tried(self) -> list[dict[str, str]]:
        return [run for batch in self.batches for run in batch]


def searched(folder: Path, launched: Any, *arguments: str, trials: int = 12) -> dict[str, Any]:
    given = [*SPACE, f"search.trials={trials}", f"output={folder}", *arguments]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        plain = [one for one in given if not any(mark in one for mark in ("interval(", "range(", "64,128"))]
        config = compose("search", plain, return_hydra_config=True)
    search(config, given, launched)
    found: dict[str, Any] = json.loads((folder / "search.json").read_text())
    return found


def test_the_first_trial_uses_the_current_settings_and_later_ones_are_better(tmp_path: Path) -> None:
    launched = Launched(measured, tmp_path)
    found = searched(tmp_path, launched, trials=40)
    first, *others = launched.tried
    assert {name: first[name] for name in ("beta", "critic.hidden", "improvement.iterations")} == {
        "beta": "4.0",
        "critic.hidden": "128",
        "improvement.iterations": "3",
    }
    assert all(1 <= float(run["beta"]) <= 8 for run in others)
    assert {run["critic.hidden"] for run in launched.tried} <= {"64", "128", "256"}
    assert {run["improvement.iterations"] for run in launched.tried} <= {"1", "2", "3", "4"}
    # Each run gets all fixed overrides, and a folder of its own.
    assert {run["output"] for run in launched.tried} == {str(tmp_path)}
    assert [run["hydra.sweep.subdir"] for run in launched.tried] == [f"trial-{number:03d}" for number in range(40)]
    scores = [measured(run)["efficiency"] for run in launched.tried]
    assert [trial["metrics"]["efficiency"] for trial in found["trials"]] == scores
    (best,) = found["best"]
    assert scores[best] == max(scores, key=lambda score: score or 0.0)
    # The highest is 0.976. Of 39 random trials the best falls below 0.9 with probability (1 − 0.114)^39 < 0.01.
    assert (scores[best] or 0.0) > 0.9


@pytest.mark.parametrize("parallel", [1, 4])
def test_an_interrupted_search_runs_the_same_trials(tmp_path: Path, parallel: int) -> None:
    asked = (f"search.parallel_trials={parallel}",)
    whole = Launched(measured, tmp_path / "whole")
    expected = searched(tmp_path / "whole", whole, *asked)
    assert {len(batch) for batch in whole.batches} == {parallel}
    interrupted = Launched(measured, tmp_path / "interrupted", breaks=(1, 3))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            searched(tmp_path / "interrupted", interrupted, *asked)
    assert searched(tmp_path / "interrupted", interrupted, *asked) == expected
    # Interrupted trials resume in their own folders.
    again = {run["hydra.sweep.subdir"]: run for run in interrupted.tried}
    assert len(interrupted.tried) == len(whole.tried) + 2 * parallel
    for run in whole.tried:
        assert again[run["hydra.sweep.subdir"]] | {"output": ""} == run | {"output": ""}
    # Rerunning a finished search runs nothing, and a longer one continues it.
    before = len(interrupted.tried)
    assert searched(tmp_path / "interrupted", interrupted, *asked) == expected
    assert len(interrupted.tried) == before
    longer = searched(tmp_path / "interrupted", interrupted, *asked, trials=16)
    assert longer["trials"][:12] == expected["trials"]
    assert len(longer["trials"]) == 16


def test_trials_of_a_batch_are_not_all_the_same(tmp_path: Path) -> None:
    launched = Launched(measured, tmp_path)
    searched(tmp_path, launched, "search.parallel_trials=6", trials=6)
    assert len({run["beta"] for run in launched.tried}) == 6


def test_two_metrics_give_the_trials_that_no_other_beats(tmp_path: Path) -> None:
    found = searched(tmp_path, Launched(measured, tmp_path), "search.minimise=[seconds]", trials=24)
    points = [(trial["metrics"]["efficiency"], -trial["metrics"]["seconds"]) for trial in found["trials"]]
    best = {
        number
        for number, (a, b) in enumerate(points)
        if not any(x >= a and y >= b and (x, y) != (a, b) for x, y in points)
    }
    assert set(found["best"]) == best
    assert found["directions"] == {"efficiency": "maximize", "seconds": "minimize"}


def test_a_failed_trial_counts_and_says_why(tmp_path: Path) -> None:
    def fragile(settings: dict[str, str]) -> Metrics:
        if settings["critic.hidden"] == "256":
            raise RuntimeError("too wide")
        if settings["critic.hidden"] == "64":
            return {"efficiency": None, "seconds": 1.0}
        return measured(settings)

    found = searched(tmp_path, Launched(fragile, tmp_path), trials=20)
    assert len(found["trials"]) == 20
    said = {
        "256": "too wide",
        "64": "no target KL has an efficiency: the frontier has too few effective samples, or truncation costs more KL",
    }
    for trial in found["trials"]:
        hidden = trial["settings"]["critic.hidden"]
        assert trial["error"] == said.get(hidden)
        assert (trial["metrics"] is None) == (hidden in said)
    assert found["trials"][found["best"][0]]["settings"]["critic.hidden"] == "128"


def test_a_search_in_which_everything_fails_gives_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(settings: dict[str, str]) -> Metrics:
        raise RuntimeError("no such policy")

    launched = Launched(broken, tmp_path)
    with pytest.raises(SystemExit) as stop:
        searched(tmp_path, launched)
    assert stop.value.code == 2
    assert len(launched.tried) == 3
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == (
        "mavis: all of 3 trials failed, the last with: no such policy "
        "Hint: fix the cause, and name a new output folder."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search.trials=0"], "trials is 0, expected a whole number ≥ 1"),
        (["search.parallel_trials=1.5"], "parallel_trials is 1.5, expected a whole number ≥ 1"),
        (["search.maximise=[efficency]"], "metric 'efficency' does not exist. Hint: did you mean 'efficiency'?"),
        (["search.maximise=[]"], "maximise and minimise are empty"),
        (["search.minimise=[efficiency]"], "metric 'efficiency' is named twice"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    launched = Launched(measured, tmp_path)
    with pytest.raises(SystemExit) as stop:
        searched(tmp_path, launched, *arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert " Hint: " in said
    assert not launched.tried


def test_two_searches_never_run_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The second would mistake the first one's trials for interrupted ones, and run them in the same folders.
    second = Launched(measured, tmp_path)

    def meanwhile(settings: dict[str, str]) -> Metrics:
        with pytest.raises(SystemExit) as stop:
            searched(tmp_path, second)
        assert stop.value.code == 2
        assert "where another search is running. Hint: " in capsys.readouterr().err
        return measured(settings)

    assert len(searched(tmp_path, Launched(meanwhile, tmp_path), trials=2)["trials"]) == 2
    assert not second.tried
    assert len(searched(tmp_path, second, trials=3)["trials"]) == 3


def test_an_unwritable_folder_is_reported_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            config = compose("search", [f"output={tmp_path / 'file'}"], return_hydra_config=True)
        search(config, [], Launched(measured, tmp_path))
    assert stop.value.code == 2
    assert "file', which cannot be written: [Errno" in capsys.readouterr().err


def test_a_failing_launcher_is_reported_in_one_line_and_nothing_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        raise RuntimeError("A worker process was unexpectedly terminated. This could be caused by a lack of memory.")

    first = searched(tmp_path, Launched(measured, tmp_path), trials=2)
    with pytest.raises(SystemExit) as stop:
        searched(tmp_path, killed, trials=3)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "mavis: the launcher failed: RuntimeError: A worker process was unexpectedly terminated. Hint: " in said
    assert searched(tmp_path, Launched(measured, tmp_path), trials=3)["trials"][:2] == first["trials"]


def test_another_search_in_the_same_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    searched(tmp_path, Launched(measured, tmp_path), trials=2)
    for other in ("critic.rank=8", "search.minimise=[seconds]", "seed=1"):
        with pytest.raises(SystemExit):
            searched(tmp_path, Launched(measured, tmp_path), other, trials=3)
        assert "holds a search with different settings, space or metrics" in capsys.readouterr().err
    searched(tmp_path, Launched(measured, tmp_path), "threads=2", "hydra/launcher=joblib", trials=3)


def test_the_space_is_parsed_in_hydras_grammar() -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    given = [
        "output=x",
        "a=int(interval(1,9))",
        "b=interval(1,9)",
        "c=int(tag(log,interval(1,9)))",
        "d=tag(log,interval(0.1,9))",
        "e=range(0,10,3)",
        "f=one,two",
        "g=choice([1,2],{a: 1})",
        "~h",
    ]
    fixed, space, texts = search_space(given, {"a": "range(1,3)", "i": "choice(1,2)", "output": "range(1,3)"})
    assert fixed == ["output=x", "~h"]
    assert space == {
        "a": IntDistribution(1, 9),
        "b": FloatDistribution(1.0, 9.0),
        "c": IntDistribution(1, 9, log=True),
        "d": FloatDistribution(0.1, 9.0, log=True),
        "e": IntDistribution(0, 9, step=3),
        "f": CategoricalDistribution(["one", "two"]),
        "g": CategoricalDistribution(["[1,2]", "{a:1}"]),
        "i": CategoricalDistribution(["1", "2"]),
    }
    assert texts["d"] == "tag(log,interval(0.1,9))"
    assert list(texts) == list(space)


@pytest.mark.parametrize(
    ("setting", "choices", "chosen"),
    [
        ("decoding.top_k=null", "null,40", "null"),
        ("improvement.reuse=true", "false,true", "True"),
        ("improvement.fit.learning_rate=0.001", "1e-2,1e-3", "0.001"),
        ("evaluation.target_kls=[1,2]", "[1,2],[3]", "[1,2]"),
        ("critic=value_model", "hidden_state,value_model", "value_model"),
        ("critic.hidden=7", "64,128", None),
    ],
)
def test_the_current_settings_are_found_among_choices(setting: str, choices: str, chosen: str | None) -> None:
    name = setting.partition("=")[0]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = compose("search", [setting], return_hydra_config=True)
    _, space, _ = search_space([f"{name}={choices}"], {})
    assert current_settings(config, space) == ({} if chosen is None else {name: chosen})


@pytest.mark.parametrize(
    ("given", "defaults", "message"),
    [
        ([], {}, "there is nothing to search"),
        (["beta=3"], {"beta": "interval(1,2)"}, "there is nothing to search"),
        (["beta=interval(3,1)"], {}, "'beta=interval(3,1)' cannot be searched: "),
        (["beta=tag(log,interval(0.0,1.0))"], {}, "cannot be searched: "),
        ([], {"beta": "interval(1"}, "search.space cannot be parsed: "),
        ([], {"beta": "3"}, "search.space has a single value for beta"),
    ],
)
def test_an_impossible_space_is_refused(given: list[str], defaults: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        search_space(given, defaults)
    assert message in str(raised.value)


FEW = (
    "decoding.top_k=null",
    "evaluation.divisions=1",
    "evaluation.betas=[1.0]",
    "evaluation.samples=4",
    "evaluation.reference_samples=128",
    "evaluation.target_kls=[0.05]",
    "evaluation.speed_repeats=0",
    "data.evaluation_prompts.source=[the dog]",
    "data.prompts.source=[the,a cat]",
    "data=openings",
)


def test_a_search_of_the_tiny_policy(mavis: Any, small: tuple[str, ...], tmp_path: Path) -> None:
    given = [one for one in small if not one.startswith(("critic.hidden", "improvement.iterations", "decoding.top_k"))]
    ran = mavis(
        "search", *given, *FEW, "critic.hidden=4,8", "improvement.iterations=1", "search.trials=2", "output=found"
    )
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "found" / "search.json").read_text())
    assert set(found["space"]) == {"beta", "critic.hidden"}
    assert found["trials"][0]["settings"]["beta"] == 4.0
    for trial in found["trials"]:
        assert trial["error"] is None
        run = tmp_path / "found" / f"trial-{trial['trial']:03d}"
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["efficiency"] == trial["metrics"]["efficiency"]
        assert math.isfinite(metrics["efficiency"])
        assert metrics["seconds"] > 0
        # The prompts that chose the critic are not those on which it may be praised.
        assert "efficiency" not in Critic.from_pretrained(run / "critic").about
    # The rollouts of the plain policy are drawn once for all trials.
    assert len(list((tmp_path / "found").rglob("reference/shard-*"))) == 1
    assert f"best: found/trial-{found['best'][0]:03d}/critic" in ran.out
    again = mavis(
        "search", *given, *FEW, "critic.hidden=4,8", "improvement.iterations=1", "search.trials=2", "output=found"
    )
    assert again.code == 0, again.err
    reported = mavis("report", "found")
    assert reported.code == 0, reported.err
    assert "2 runs: 2 finished" in reported.out


@pytest.mark.slow
def test_parallel_trials_share_the_reference_rollouts(
    tiny_folder: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    ours = ("policy", "critic.hidden", "improvement.iterations", "decoding.top_k")
    given = [*(one for one in small if not one.startswith(ours)), *FEW, "improvement.iterations=1", "output=found"]
    given += ["policy=pretrained", f"policy.path={tiny_folder}", "critic.hidden=4,8,16", "search.minimise=[seconds]"]
    given += ["launcher=joblib", "hydra.launcher.n_jobs=2", "search.parallel_trials=2", "search.trials=2"]
    done = subprocess.run(
        [sys.executable, "-m", "mavis.cli", "search", *given],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found" / "search.json").read_text())
    assert [set(trial["metrics"]) for trial in found["trials"]] == [{"efficiency", "seconds"}] * 2
    assert len(list((tmp_path / "found").rglob("reference/shard-*"))) == 1
