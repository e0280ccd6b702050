"""`mavis train-reward`: what it writes and prints, and how it reports mistakes."""

from __future__ import annotations

import csv
import gzip
import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest

from mavis.rewards import RewardModel
from tests.factories import word_policy, word_tokenizer

TRAIN = ("train-reward", "reward_model.lora_rank=0", "reward_model.learning_rate=5e-3", "reward_model.held_out=0.25")
TRAIN = (*TRAIN, "reward_model.max_length=64", "policy=tiny", "output=run")


def write_pairs(folder: Path, kind: str = "standard", count: int = 60) -> str:
    """Write pairs of which the one that says "good" was chosen, and return the file's name."""
    draw = random.Random(0)
    rows = []
    for index in range(count):
        asked = f"the {draw.choice(['dog', 'cat', 'bird'])} {index}"
        good, bad = (" ".join(draw.sample([word, "the", "boy", "ran"], 4)) for word in ("good", "bad"))
        if kind == "hh":
            dialogue = f"\n\nHuman: {asked}\n\nAssistant: "
            rows.append({"chosen": dialogue + good, "rejected": dialogue + bad})
        elif kind == "conversational":
            prompt = [{"role": "user", "content": asked}]
            reply = [[{"role": "assistant", "content": text}] for text in (good, bad)]
            rows.append({"prompt": prompt, "chosen": reply[0], "rejected": reply[1]})
        else:
            rows.append({"prompt": f"{asked} ", "chosen": good, "rejected": bad})
    if kind == "csv":
        with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
            writer.writeheader()
            writer.writerows(rows)
        return "pairs.csv"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "hh":
        (folder / "pairs.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        return "pairs.jsonl.gz"
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    return "pairs.jsonl"


def chat_folder(folder: Path) -> str:
    """Write a policy whose tokenizer has a chat template, and return its folder's name."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
    word_policy().save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    return "chat"


@pytest.mark.parametrize("kind", ["standard", "csv"])
def test_training_ends_in_a_folder_and_tables(mavis: Any, tmp_path: Path, kind: str) -> None:
    pairs = write_pairs(tmp_path, kind)
    ran = mavis(*TRAIN, f"pairs={pairs}")
    assert ran.code == 0, ran.err
    assert f"60 pairs from '{pairs}', 0 of them with a conversation" in ran.err
    for words in ("15 held-out pairs of 15 prompts", "longer", "correlation with length", "calibration error"):
        assert words in ran.out
    assert ran.out.splitlines()[-2] == f"reward model: {tmp_path / 'run' / 'model'}"
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["training_pairs"], report["held_out_pairs"]) == (45, 15)
    assert (tmp_path / "run" / "reliability.png").is_file()
    assert len(RewardModel(tmp_path / "run" / "model")(["the "], ["good"])) == 1
    again = mavis(*TRAIN, f"pairs={pairs}")
    assert "reused" in again.err
    assert again.out == ran.out


@pytest.mark.parametrize("kind", ["conversational", "hh"])
def test_conversations_are_read_through_the_template_and_the_last_line_trains_with_the_model(
    mavis: Any, small: tuple[str, ...], tmp_path: Path, kind: str
) -> None:
    pairs, backbone = write_pairs(tmp_path, kind), chat_folder(tmp_path)
    ran = mavis(*TRAIN, f"pairs={pairs}", f"backbone={backbone}", "output='my run, 1'")
    assert ran.code == 0, ran.err
    assert "60 of them with a conversation" in ran.err
    name, *printed = shlex.split(ran.out.splitlines()[-1].removeprefix("use: "))
    assert (name, printed[0]) == ("mavis", "train")
    others = [item for item in small if not item.startswith(("objective=", "policy="))]
    trained = mavis(*printed, *others, "output=critic")
    assert trained.code == 0, trained.err
    assert json.loads((tmp_path / "my run, 1" / "report.json").read_text())["template"] == "chat"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pairs=missing.jsonl"], "'missing.jsonl', which does not exist"),
        ([], "pairs is not given. Hint: write pairs=..."),
        (["pairs=pairs.jsonl", "backbone=nowhere/here"], "backbone is 'nowhere/here', which"),
        (["pairs=pairs.jsonl", "reward_model.template=caht"], "template is 'caht'. Hint: did you mean 'chat'?"),
        (["pairs=pairs.jsonl", "reward_model.template=chat"], "tokenizer has no chat template"),
        (["pairs=few.jsonl"], "expected at least 8 and others to train on"),
    ],
)
def test_a_mistake_is_one_line(mavis: Any, tmp_path: Path, overrides: list[str], message: str) -> None:
    write_pairs(tmp_path, count=12)
    (tmp_path / "pairs.jsonl").rename(tmp_path / "few.jsonl")
    write_pairs(tmp_path)
    ran = mavis(*TRAIN, *overrides)
    assert ran.code == 2, ran.err
    assert ran.err.strip().splitlines()[-1].startswith("mavis: ")
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "run" / "run.json").exists()
