"""The runs of a hyperparameter sweep, read from their folders: every run is listed, with its state and metrics."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from omegaconf import OmegaConf

from mavis.errors import ConfigError, DataError, EvaluationError
from mavis.evaluation.report import mean_efficiency
from mavis.evaluation.sweeps.plots import plot_runs
from mavis.evaluation.sweeps.report import table_of_runs, write_runs
from mavis.evaluation.sweeps.runs import gather_runs
from mavis.utils.files import write_json

ONE, OTHER = {"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}


def report(*shares: float | None, samples: float = 1000.0, kls: tuple[float, ...] = (1.0, 2.0)) -> dict[str, Any]:
    """The part of a report that is read: efficiencies by weights, then by KL."""
    points = [(weights, kl) for weights in (ONE, OTHER) for kl in kls]
    return {
        "efficiency": [
            {"weights": weights, "kl": kl, "reward": share, "efficiency": share}
            for (weights, kl), share in zip(points, shares, strict=True)
        ],
        # Effective samples fall from `samples` at KL 0 to 0 at KL 4.
        "limits": [{"weights": w, "kl": [0.0, 4.0], "effective_sample_size": [samples, 0.0]} for w in (ONE, OTHER)],
    }


def run(
    folder: Path,
    *overrides: str,
    iterations: int = 0,
    asked: int = 2,
    command: str = "train",
    finished: bool = True,
    error: str | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Create the folder of a run as the commands leave it."""
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(list(overrides), folder / ".hydra" / "overrides.yaml")
    OmegaConf.save({"hydra": {"job": {"config_name": command}}}, folder / ".hydra" / "hydra.yaml")
    OmegaConf.save(config or {}, folder / ".hydra" / "config.yaml")
    if iterations:
        write_json(folder / "run.json", {"settings": {"iterations": asked}})
    for iteration in range(iterations):
        metrics = {"rewards": {"a": 1.0 + iteration}, "kl": {"a": 0.5}, "goal": {"a": 0.9}}
        write_json(folder / f"iteration-{iteration}" / "report.json", metrics)
    if finished:
        write_json(folder / "critic" / "config.json", {})
    if error is not None:
        write_json(folder / "error.json", {"error": error})
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of six runs: finished, failed, interrupted, unreadable, unfinished, and one that was not started."""
    folder = tmp_path / "sweep"
    run(folder / "beta=1,seed=0", "beta=1", "seed=0", "output=x", "threads=1", iterations=2)
    run(
        folder / "beta=2,seed=0", "beta=2", "seed=0", "output=x", iterations=1, finished=False, error="no | space\nleft"
    )
    run(folder / "beta=1,seed=1", "beta=1", "seed=1", "output=x", iterations=1, finished=False)
    broken = run(folder / "beta=2,seed=1", "beta=2", "seed=1", "output=x", iterations=1)
    (broken / "iteration-0" / "report.json").write_text("{")
    run(folder / "beta=3,seed=0", "beta=3", "seed=0", "output=x", finished=False)
    asked = ["beta=range(1,4)", "seed=0,1", "output=x"]
    OmegaConf.save({"hydra": {"overrides": {"task": asked}}}, folder / "multirun.yaml")
    return folder


def test_every_run_is_listed(sweep: Path) -> None:
    runs = {tuple(one["settings"].values()): one for one in gather_runs(sweep)}
    assert {settings: one["state"] for settings, one in runs.items()} == {
        ("1", "0"): "finished",
        ("2", "0"): "failed",
        ("1", "1"): "unfinished",
        ("2", "1"): "failed",
        ("3", "0"): "unfinished",
        ("3", "1"): "not started",
    }
    assert {tuple(one["settings"]) for one in runs.values()} == {("beta", "seed")}
    done = runs["1", "0"]
    assert done["run"] == "beta=1,seed=0"
    assert (done["iterations"], done["rewards"], done["kl"]) == ([2, 2], {"a": 2.0}, {"a": 0.5})
    assert runs["1", "1"]["iterations"] == [1, 2]
    assert runs["2", "0"]["error"] == "no | space\nleft"
    assert "cannot be read" in runs["2", "1"]["error"]
    assert runs["3", "0"]["iterations"] is None
    assert runs["3", "1"]["run"] == ""


def test_an_interpolation_is_shown_as_it_was_typed(tmp_path: Path) -> None:
    run(tmp_path / "one", "seed=1", "+a=${seed}", iterations=1)
    task = ["seed=1,2", "+a=${seed}"]
    OmegaConf.save({"hydra": {"overrides": {"task": task}}}, tmp_path / "multirun.yaml")
    assert [(one["state"], one["settings"]) for one in gather_runs(tmp_path)] == [
        ("finished", {"seed": "1"}),
        ("not started", {"seed": "2"}),
    ]


@pytest.mark.parametrize("name", ["overrides.yaml", "hydra.yaml"])
def test_a_run_with_truncated_settings_is_listed_as_failed(tmp_path: Path, name: str) -> None:
    run(tmp_path / "one", "beta=1", iterations=1)
    (run(tmp_path / "two", "beta=2", iterations=1) / ".hydra" / name).write_text("- 'beta=")
    one, two = gather_runs(tmp_path)
    assert (one["state"], two["state"]) == ("finished", "failed")
    assert f"{name} is truncated or was not written by Hydra" in two["error"]


def test_unrelated_files_in_a_sweep_folder_are_ignored(tmp_path: Path) -> None:
    one = run(tmp_path / "one", "beta=1", iterations=1)
    write_json(one / "iteration-0.old" / "report.json", {})
    write_json(one / "notes" / "report.json", [])
    two = run(tmp_path / "two", "critic.hidden=8", iterations=1)
    (two / ".hydra" / "config.yaml").write_text("beta: '")
    for text in ("", "[1, 2]", "hydra: '", "hydra: null", "other: 1"):
        (tmp_path / "multirun.yaml").write_text(text)
        runs = gather_runs(tmp_path)
        assert [(one["state"], one["settings"]["beta"]) for one in runs] == [("finished", "1"), ("finished", None)]


def test_an_evaluation_in_a_runs_own_folder_is_part_of_the_run(tmp_path: Path) -> None:
    one = run(tmp_path / "s" / "one", "beta=1", iterations=1, asked=1)
    run(one / "evaluation", "checkpoint=x", command="evaluate")
    write_json(one / "evaluation" / "report.json", report(0.5, 0.6, 0.7, 0.8))
    run(tmp_path / "s" / "two", "beta=2", iterations=1, asked=1)
    first, second = gather_runs(tmp_path / "s")
    assert first["efficiency"] == {1.0: pytest.approx(0.6), 2.0: pytest.approx(0.7)}
    assert second["efficiency"] == {}
    (alone,) = gather_runs(one)
    assert (alone["run"], alone["settings"]) == (".", {})


def test_commands_that_write_a_report_are_finished_when_it_exists(tmp_path: Path) -> None:
    for command in ("evaluate", "search", "align"):
        folder = run(tmp_path / command, f"name={command}", command=command)
        (one,) = gather_runs(folder)
        assert one["state"] == "unfinished"
        sums = {"reward_after": 1.5, "kl": 2.5, "goal": 1.0}
        write_json(folder / "report.json", report(0.5, 0.5, 0.5, 0.5) if command != "align" else sums)
        (one,) = gather_runs(folder)
        assert one["state"] == "finished"
    assert (one["rewards"], one["kl"]) == ({"weighted sum": 1.5}, {"weighted sum": 2.5})


def test_a_setting_that_was_not_overridden_shows_its_default(tmp_path: Path) -> None:
    run(tmp_path / "one", "beta=1", config={"beta": 1, "critic": {"hidden": 128, "kind": "x"}})
    run(tmp_path / "two", "+critic.hidden=64", "critic=y", config={"beta": 3.0, "critic": {"hidden": 64}})
    assert [one["settings"] for one in gather_runs(tmp_path)] == [
        {"beta": "1", "critic.hidden": "128", "critic": None},
        {"beta": "3.0", "critic.hidden": "64", "critic": "y"},
    ]


@pytest.mark.parametrize(
    ("shares", "samples", "mean"),
    [
        ((0.5, 0.7, 0.9, 1.1), 1000.0, 0.8),
        ((0.5, None, 0.9, None), 1000.0, 0.35),  # targets that are not reached count 0
        ((0.5, None, 0.9, None), 90.0, 0.7),  # the limit is unknown at KL 2: 45 effective samples
        ((None, None, None, None), 1000.0, 0.0),
        ((None, None, None, None), 40.0, None),
    ],
)
def test_the_mean_efficiency_counts_unreached_targets_and_skips_unknown_limits(
    shares: tuple[float | None, ...], samples: float, mean: float | None
) -> None:
    assert mean_efficiency(report(*shares, samples=samples)) == (None if mean is None else pytest.approx(mean))


def test_the_mean_efficiency_at_one_kl() -> None:
    assert mean_efficiency(report(0.5, 0.7, 0.9, 1.1), 2.0) == pytest.approx(0.9)
    assert mean_efficiency(report(0.5, 0.7, 0.9, 1.1), 3.0) is None


def test_csv_and_markdown_hold_the_same_rows(sweep: Path, tmp_path: Path) -> None:
    runs = gather_runs(sweep)
    paths = write_runs(tmp_path / "new" / "out", runs)
    assert [path.name for path in paths] == ["runs.csv", "runs.md", "runs.png"]
    rows = table_of_runs(runs)
    with paths[0].open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert read == [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    lines = paths[1].read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == len(runs) + 2
    assert len({line.replace(r"\|", "").count("|") for line in table}) == 1
    assert r"no \| space left" in paths[1].read_text(encoding="utf-8")
    assert lines[-1].startswith("1 of 6 runs finished.")
    assert imread(paths[2]).shape[1] == 1200


def test_runs_without_metrics_have_a_table_and_no_plot(tmp_path: Path) -> None:
    run(tmp_path / "sweep" / "one", "beta=1", finished=False)
    runs = gather_runs(tmp_path / "sweep")
    assert [path.name for path in write_runs(tmp_path, runs)] == ["runs.csv", "runs.md"]
    with pytest.raises(EvaluationError, match="none of 1 runs has metrics"):
        plot_runs(tmp_path / "runs.png", runs)


def test_the_plot_orders_runs_and_marks_unfinished_ones(sweep: Path, tmp_path: Path) -> None:
    figure = plot_runs(tmp_path / "runs.svg", gather_runs(sweep))
    reward, kl = figure.axes
    labels = [text.get_text() for text in reward.get_yticklabels()]
    assert len(labels) == 6
    assert labels[-1] == "beta=1, seed=0"
    assert "beta=3, seed=1 (not started)" in labels
    assert "beta=2, seed=0 (failed)" in labels
    drawn = {line.get_ydata()[0]: (line.get_xdata()[0], line.get_markerfacecolor()) for line in reward.lines}
    assert drawn[5][0] == 2.0
    assert sorted(x for x, _ in drawn.values()) == [1.0, 1.0, 2.0]
    assert [colour == "white" for _, (_, colour) in sorted(drawn.items())] == [True, True, False]
    assert len(kl.lines) == 3
    assert (tmp_path / "runs.svg").read_text().lstrip().startswith("<?xml")


def test_a_dollar_in_a_setting_is_drawn_literally(tmp_path: Path) -> None:
    for setting in (r"a=$\nothing{$", "a=1"):
        run(tmp_path / setting[-1], setting, iterations=1)
    figure = plot_runs(tmp_path / "runs.png", gather_runs(tmp_path))
    assert r"a=$\nothing{$" in [text.get_text() for text in figure.axes[0].get_yticklabels()]


def test_efficiency_is_plotted_where_it_is_known(tmp_path: Path) -> None:
    for index, share in enumerate((0.2, 0.8, None)):
        folder = run(tmp_path / f"run-{index}", f"beta={index}", iterations=1)
        if share is not None:
            write_json(folder / "report.json", report(share, share, share, share))
    figure = plot_runs(tmp_path / "runs.png", gather_runs(tmp_path))
    assert [axes.get_title(loc="left").split(" at ")[1][:4] for axes in figure.axes] == ["KL 1", "KL 2"]
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == pytest.approx([0.2, 0.8])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["beta=2", "beta=0", "beta=1"]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="which does not exist"):
        gather_runs(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no run"):
        gather_runs(tmp_path)
    run(tmp_path / "one", "beta=1")
    with pytest.raises(ConfigError, match="format is 'gif'"):
        write_runs(tmp_path, gather_runs(tmp_path), "gif")
