"""`mavis info` says what a critic is, without its policy."""

from __future__ import annotations

from typing import Any

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
