"""`mavis elicit` with scripted answers: what it asks, stores and prints, and how it resumes."""

from __future__ import annotations

import builtins
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from mavis.preference import read_pairs

ROOM = ("policy=tiny", "objective=[positive,brevity]", "decoding.max_new_tokens=8", "decoding.top_k=20", "beta=3")
FEW = ("prompts=2", "questions=3", "output=out")
LONG = {"prompt": "the dog", "chosen": " was good .", "rejected": " was good and the man said so to the little girl ."}


def assert_refused(ran: Any, message: str) -> None:
    assert ran.code == 2, ran.err
    line = ran.err.strip().splitlines()[-1]
    assert line.startswith("mavis: ")
    assert " Hint: " in line
    assert message in line


def shown_pairs(out: str) -> list[list[str]]:
    """The two texts of every question."""
    return [part.split("\n--- ")[1:3] for part in out.split("=== question ")[1:]]


def test_answers_become_weights_and_a_command_that_works(mavis: Any, trained: Path, tmp_path: Path) -> None:
    ran = mavis("elicit", *ROOM, *FEW, f"checkpoint={trained}", stdin="1\n2\n1\n")
    assert ran.code == 0, ran.err
    pairs = read_pairs(tmp_path / "out" / "answers.jsonl")
    assert len(pairs) == 3
    for pair, preferred, (one, two) in zip(pairs, (1, 2, 1), shown_pairs(ran.out), strict=True):
        texts = f"1\n{pair.prompt}{pair.chosen}", f"2\n{pair.prompt}{pair.rejected}"
        if preferred == 2:
            texts = f"1\n{pair.prompt}{pair.rejected}", f"2\n{pair.prompt}{pair.chosen}"
        assert (one, two) == texts
    found = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert found["pairs"] == 3
    for name in ("positive", "brevity"):
        assert found["low"][name] < found["weights"][name] < found["high"][name]
        assert name in ran.out
    assert "weights from 3 choices" in ran.out
    *_, line = ran.out.strip().splitlines()
    name, *command = shlex.split(line)
    assert name == "mavis"
    weights = next(word for word in command if word.startswith("weights="))
    for name, weight in found["normalised"].items():
        assert f"{name}: {weight:.3g}" in weights
    assert "beta=3" in command
    again = mavis(*command)
    assert again.code == 0, again.err


def test_the_command_works_whatever_the_critics_folder_is_called(mavis: Any, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "mine, {1} [b]")
    ran = mavis("elicit", *ROOM, *FEW, "checkpoint='mine, {1} [b]'", stdin="1\n2\n1\n")
    assert ran.code == 0, ran.err
    again = mavis(*shlex.split(ran.out.strip().splitlines()[-1])[1:])
    assert again.code == 0, again.err


def test_a_conditioned_critic_is_not_asked_for_weights_below_zero(
    mavis: Any, small: tuple[str, ...], tmp_path: Path
) -> None:
    conditioned = [word.replace("=independent", "=conditioned") for word in small]
    assert mavis("train", *conditioned, "output=run").code == 0
    choice = {"prompt": "the dog", "chosen": " was sad.", "rejected": " was happy and loved the lovely sun so much."}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(choice) + "\n" for _ in range(6)))
    ran = mavis("elicit", *ROOM, "checkpoint=run/critic", "pairs=pairs.jsonl", "output=out")
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert found["weights"]["positive"] < 0 < found["weights"]["brevity"]
    assert "takes weights ≥ 0 only" in ran.out
    *_, line = ran.out.strip().splitlines()
    assert "weights={positive: 0, brevity: " in line
    again = mavis(*shlex.split(line)[1:])
    assert (again.code, again.err) == (0, "")


def test_skipped_questions_are_left_out_and_not_asked_again(mavis: Any, trained: Path, tmp_path: Path) -> None:
    ran = mavis("elicit", *ROOM, *FEW, f"checkpoint={trained}", stdin="0\nmaybe\n\n 2 \n0\n1\nQ\n")
    assert ran.code == 0, ran.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert ["skipped" in row for row in rows] == [True, False, True, False]
    assert "weights from 2 choices" in ran.out
    shown = shown_pairs(ran.out)
    assert len({tuple(sorted(text[2:] for text in pair)) for pair in shown}) == len(shown) == 5
    assert [part[:6] for part in ran.out.split("=== question ")[1:]] == [
        "1 of 3",
        "1 of 3",
        "2 of 3",
        "2 of 3",
        "3 of 3",
    ]


def test_the_end_of_the_input_is_no_error(mavis: Any, trained: Path, tmp_path: Path) -> None:
    ran = mavis("elicit", *ROOM, *FEW, f"checkpoint={trained}", stdin="")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.endswith("No question was answered, so there are no weights yet; rerun the command to resume.\n")
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    assert not (tmp_path / "out" / "weights.json").exists()


def test_an_interrupted_call_resumes_as_if_it_had_never_stopped(
    mavis: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ("elicit", *ROOM, "prompts=2", "questions=5", f"checkpoint={trained}")
    unbroken = mavis(*base, "output=whole", stdin="1\n0\n2\n2\n1\n2\n")
    assert unbroken.code == 0, unbroken.err

    answers = iter("10")

    def interrupted(prompt: str) -> str:
        print(prompt)
        try:
            return next(answers)
        except StopIteration:
            raise KeyboardInterrupt from None

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "input", interrupted)
        first = mavis(*base, "output=parts")
    assert first.code == 130
    assert "finished work is kept; rerun the command to resume" in first.err
    second = mavis(*base, "output=parts", stdin="2\n")
    assert second.code == 0
    assert "weights from 2 choices" in second.out
    third = mavis(*base, "output=parts", stdin="2\n1\n2\n")
    assert third.code == 0
    for name in ("answers.jsonl", "weights.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    again = mavis(*base, "output=parts", stdin="")
    assert "=== question" not in again.out
    assert "weights from 5 choices" in again.out
    more = mavis(*base[:-2], "questions=6", base[-1], "output=parts", stdin="1\n")
    assert more.code == 0, more.err
    assert "=== question 6 of 6" in more.out
    assert "weights from 6 choices" in more.out


def test_running_out_of_pairs_is_reported(mavis: Any, trained: Path) -> None:
    ran = mavis(
        *("elicit", *ROOM, "prompts=1", "divisions=1", "questions=9", "output=out", f"checkpoint={trained}"),
        stdin="1\n" * 9,
    )
    assert ran.code == 0, ran.err
    assert 1 <= ran.out.count("=== question") <= 3
    assert "All pairs have been asked. To sample more, choose a new output folder and prompts=2." in ran.out


def test_other_settings_in_the_same_folder_are_refused(mavis: Any, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "alone" / "critic")  # without its run, whose objectives would be held to
    base = ("elicit", *ROOM, "checkpoint=alone/critic", "output=out", "prompts=2", "questions=3")
    assert mavis(*base, stdin="1\n").code == 0
    assert_refused(mavis(*base, "seed=1", stdin="1\n"), "holds rollouts with different settings.seed")
    assert_refused(
        mavis(*base, "objectives.brevity.scale=7", stdin="1\n"),
        "a run with different objective settings: brevity.scale",
    )


def test_pairs_from_a_file_need_no_policy(
    mavis: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mavis.cli.elicit.load_policy", None)
    rows = [LONG, LONG | {"chosen": " was bad ."}, {"prompt": "the dog", "skipped": [" a", " b"]}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    ran = mavis("elicit", *ROOM, f"checkpoint={trained}", "pairs=pairs.jsonl", "output=out")
    assert ran.code == 0, ran.err
    assert "weights from 2 choices" in ran.out
    assert json.loads((tmp_path / "out" / "weights.json").read_text())["weights"]["brevity"] > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["weights.json"]


def test_an_objective_on_which_no_pair_differs_is_named(mavis: Any, trained: Path, tmp_path: Path) -> None:
    row = {"prompt": "the dog", "chosen": " was big .", "rejected": " was big and old ."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    ran = mavis("elicit", *ROOM, f"checkpoint={trained}", "pairs=pairs.jsonl", "output=out")
    assert ran.code == 0, ran.err
    assert "No pair differs on positive, so the choices say nothing about it." in ran.out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["questions=0"], "questions is 0, expected ≥ 1"),
        (["prompts=0"], "prompts is 0, expected ≥ 1"),
        (["divisions=0"], "divisions is 0, expected a whole number ≥ 1"),
        (["beta=-1"], "beta is -1"),
        (["checkpoint=nothing"], "'nothing', which does not exist"),
        (["objective=[positive]"], "the critic's objective 'brevity' is not among the configured ones"),
        (["pairs=nothing.jsonl"], "path is 'nothing.jsonl', which cannot be read"),
        (["pairs=empty.jsonl"], "pairs is 'empty.jsonl', a file without any pair"),
        (["pairs=broken.jsonl"], "line 1 of 'broken.jsonl' is not JSON"),
        (["pairs=equal.jsonl"], "none of the 1 pairs differs on any objective (positive, brevity)"),
    ],
)
def test_a_mistake_is_one_line(mavis: Any, trained: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "equal.jsonl").write_text(json.dumps(LONG | {"chosen": LONG["rejected"]}))
    given = {override.partition("=")[0] for override in overrides}
    base = [word for word in (*ROOM, *FEW, f"checkpoint={trained}") if word.partition("=")[0] not in given]
    assert_refused(mavis("elicit", *base, *overrides, stdin="1\n"), message)
