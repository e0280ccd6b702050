"""`mavis generate format=json`: one object a line, for programs to read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mavis.critics import Critic
from mavis.rewards import Brevity, Positive, score

GENERATE = ("generate", "policy=tiny", "decoding.max_new_tokens=6", "beta=2", "format=json", "samples=2")


def rows(ran: Any) -> list[dict[str, Any]]:
    assert ran.code == 0, ran.err
    return [json.loads(line) for line in ran.out.splitlines()]


def test_a_line_holds_the_response_alone_its_rewards_and_its_kl(mavis: Any, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the dog\nshe said\n")
    printed = rows(mavis(*GENERATE, f"checkpoint={trained}", "prompt_file=prompts.txt"))
    assert [row["prompt"] for row in printed] == ["the dog", "the dog", "she said", "she said"]
    critic = Critic.from_pretrained(trained)
    for row in printed:
        assert not row["response"].startswith(row["prompt"])
        assert row["kl"] == pytest.approx(sum(row["kl_per_token"]), abs=1e-4)
        assert len(row["kl_per_token"]) <= 6
        assert isinstance(row["finished"], bool)
        raw = score({"positive": Positive(), "brevity": Brevity()}, [row["prompt"]], [row["response"]])[0]
        assert list(row["raw_rewards"].values()) == raw.tolist()
        for name, value, mean, std in zip(critic.objectives, raw, critic.reward_mean, critic.reward_std, strict=True):
            assert row["rewards"][name] == pytest.approx((value - float(mean)) / float(std))


def test_unknown_objectives_leave_out_the_rewards_and_say_so(mavis: Any, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "alone")
    config = tmp_path / "alone" / "config.json"
    config.write_text(config.read_text().replace('"brevity"', '"warmth"'))
    ran = mavis(*GENERATE, "checkpoint=alone", "prompt=the dog")
    assert "rewards" not in rows(ran)[0]
    assert "no rewards: nothing beside the critic says what its objective is: warmth." in ran.err


def test_objectives_that_are_asked_for_must_be_the_critics(mavis: Any, trained: Path) -> None:
    ran = mavis(*GENERATE, f"checkpoint={trained}", "prompt=the dog", "objective=[positive]")
    assert ran.code == 2
    assert "the critic's objective 'brevity' is not among the configured ones" in ran.err
