"""`mavis info` says what a critic is, without its policy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mavis.critics import Critic
from mavis.policies import embedded


def test_info_says_what_a_critic_is(mavis: Any) -> None:
    ran = mavis("info", str(embedded.critic_path()))
    assert (ran.code, ran.err) == (0, "")
    said = ["hidden_state critic, conditioned composition", "mavis embedded policy", "positive", "dialogue", "8192"]
    said += ["every token a candidate, temperature 1", "256"]  # tokens, of the longest responses
    for text in said:
        assert text in ran.out
    assert mavis("info", f"checkpoint={embedded.critic_path()}").out == ran.out


def test_a_critic_without_calibration_says_so(mavis: Any, tmp_path: Any) -> None:
    critic = Critic.from_pretrained(embedded.critic_path())
    critic.calibration, critic.about = None, {}
    critic.save_pretrained(tmp_path / "critic")
    ran = mavis("info", "critic")
    assert ran.code == 0, ran.err
    assert "no calibration: give beta, not target_kl" in ran.out
    assert "policy: unnamed (llama, hidden size 128, 2048 tokens" in ran.out


def test_a_folder_without_a_critic_is_a_mistake(mavis: Any, tmp_path: Any) -> None:
    (tmp_path / "empty").mkdir()
    ran = mavis("info", "empty")
    assert ran.code == 2
    assert "'empty'" in ran.err


def test_it_shows_the_measured_efficiency_or_how_to_measure_it(mavis: Any, tmp_path: Path) -> None:
    critic = Critic.from_pretrained(embedded.critic_path())
    critic.about.pop("efficiency", None)
    critic.save_pretrained(tmp_path / "unmeasured")
    assert "no efficiency: mavis evaluate measures it" in mavis("info", "unmeasured").out
    weights = {"positive": 0.25, "dialogue": 0.75}
    critic.about["efficiency"] = [{"weights": weights, "kl": 1.5, "efficiency": 0.875}]
    critic.save_pretrained(tmp_path / "measured")
    shown = mavis("info", "measured").out
    assert "positive 0.25, dialogue 0.75" in shown
    assert "0.875" in shown


@pytest.mark.parametrize("argument", ["beta=2,critic.hidden=8/critic", "checkpoint=beta=2,critic.hidden=8/critic"])
def test_the_folder_of_a_run_of_a_sweep_needs_no_quotes(mavis: Any, tmp_path: Path, argument: str) -> None:
    shutil.copytree(embedded.critic_path(), tmp_path / "beta=2,critic.hidden=8" / "critic")
    ran = mavis("info", argument)
    assert ran.code == 0, ran.err


def test_a_repository_on_the_hub_is_downloaded(mavis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mavis.critics.io.load.download_critic", lambda *given: embedded.critic_path())
    ran = mavis("info", "me/happy-stories")
    assert ran.code == 0, ran.err
    assert "dialogue" in ran.out
