"""Trackers from a config: TensorBoard's files read back, a custom tracker, and mistakes."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorboard")

OWN = '''
import json
from accelerate.tracking import GeneralTracker, on_main_process

class Lines(GeneralTracker):
    """Writes a line per call."""

    name = "lines"
    requires_logging_directory = False

    def __init__(self, path):
        super().__init__()
        self.path = path

    @property
    def tracker(self):
        return self.path

    def write(self, **values):
        with open(self.path, "a") as file:
            print(json.dumps(values), file=file)

    @on_main_process
    def store_init_configuration(self, values):
        self.write(settings=values)

    @on_main_process
    def log(self, values, step=None, **more):
        self.write(values=values, step=step)

    @on_main_process
    def finish(self):
        self.write(finished=True)


class NoTracker:
    pass
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that holds a tracker of the user's own."""
    (tmp_path / "modules").mkdir()
    name = f"own_tracker_{abs(hash(tmp_path))}"
    (tmp_path / "modules" / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return name


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would draw from the event files of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_the_metrics_of_the_reports_once(mavis: Any, small: tuple[str, ...], tmp_path: Path) -> None:
    given = ("train", *small, "output=run", "tracking.with=[tensorboard]", "tracking.project=mine")
    assert mavis(*given).code == 0
    report = json.loads((tmp_path / "run" / "iteration-0" / "report.json").read_text())
    for _ in range(2):
        drawn = curves(tmp_path / "run" / "tracking" / "mine")
        assert drawn["fit/held-out error"] == [(1, pytest.approx(report["losses"][1], rel=1e-6))]
        for group, name in (("reward", "rewards"), ("kl", "kl"), ("goal", "goal")):
            for goal, value in report[name].items():
                assert drawn[f"{group}/{goal}"] == [(1, pytest.approx(value, rel=1e-6, abs=1e-7))]
        assert mavis(*given).code == 0  # the finished run is logged once more into the same folder
    hyperparameters = list((tmp_path / "run" / "tracking" / "mine").rglob("hparams.yml"))
    assert "critic.hidden: 8" in hyperparameters[0].read_text()


def test_a_custom_tracker_is_started_logged_to_and_finished(
    mavis: Any, small: tuple[str, ...], own: str, tmp_path: Path
) -> None:
    wanted = f"tracking.with=[{{_target_: {own}.Lines, path: {tmp_path / 'lines'}}}]"
    ran = mavis("train", *small, "output=run", wanted, "tracking.options={comet_ml: {api_key: a secret}}")
    assert ran.code == 0, ran.err
    first, *logged, last = (json.loads(line) for line in (tmp_path / "lines").read_text().splitlines())
    # A tracker is not given the keys of another one.
    assert "secret" not in (tmp_path / "lines").read_text()
    assert not [name for name in first["settings"] if name.startswith("tracking")]
    assert first["settings"]["improvement.rollouts"] == 32
    assert first["settings"]["objectives.positive._target_"] == "mavis.rewards.Positive"
    assert [one["step"] for one in logged] == [1, 1]
    assert set(logged[0]["values"]) == {"fit/held-out error"}
    assert {"reward/positive", "reward/brevity", "kl/positive", "goal/brevity"} <= set(logged[1]["values"])
    assert last == {"finished": True}


def test_a_tracker_is_finished_when_training_is_interrupted(
    mavis: Any, small: tuple[str, ...], own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("mavis.training.improvement.stages"), "fit", broken)
    wanted = f"tracking.with=[{{_target_: {own}.Lines, path: {tmp_path / 'lines'}}}]"
    assert mavis("train", *small, "output=run", wanted).code == 130
    assert json.loads((tmp_path / "lines").read_text().splitlines()[-1]) == {"finished": True}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("tensorbord", "tracking.with names 'tensorbord'. Hint: did you mean 'tensorboard'?"),
        ("[tensorbord]", "tracking.with names 'tensorbord'. Hint: did you mean 'tensorboard'?"),
        ("[aim]", "tracking.with names 'aim', which is not installed. Hint: pip install aim."),
        ("[{_target_: OWN.Lines}]", "cannot be built: "),
        ("[{_target_: OWN.NoTracker}]", "which is not a GeneralTracker. Hint: "),
        ("[{_target_: nowhere.Tracker}]", "cannot be built: "),
        ("[{_target_: OWN.Lines, path: /nowhere/at/all}]", "tracking.with names 'lines', which does not start: "),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_sampled(
    mavis: Any, small: tuple[str, ...], own: str, tmp_path: Path, wanted: str, message: str
) -> None:
    ran = mavis("train", *small, "output=run", f"tracking.with={wanted.replace('OWN', own)}")
    assert ran.code == 2, ran.err
    last = ran.err.strip().splitlines()[-1]
    assert last.startswith("mavis: ")
    assert " Hint: " in last
    assert message.split("OWN")[0] in last
    assert not (tmp_path / "run" / "run.json").exists()


def test_no_tracker_is_the_default(trained: Path) -> None:
    assert not (trained.parent / "tracking").exists()
