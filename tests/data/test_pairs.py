"""Preference pairs in every layout, and what is no pair."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mavis.data import Pair, load_pairs
from mavis.errors import DataError, PromptError

HI = [{"role": "user", "content": "Hi!"}]
BRIEF = {"role": "system", "content": "Be brief."}
ASKED = "\n\nHuman: Hi!\n\nAssistant:"


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi!", "chosen": "Hello.", "rejected": "No."}, "Hi!"),
        ({"prompt": HI, "chosen": "Hello.", "rejected": "No."}, HI),
        ({"prompt": HI, "chosen": [reply("Hello.")], "rejected": [reply("No.")]}, HI),
        ({"chosen": [*HI, reply("Hello.")], "rejected": [*HI, reply("No.")]}, HI),
        ({"prompt": "Hi! ", "chosen": [*HI, reply("Hello.")], "rejected": [*HI, reply("No.")]}, "Hi! "),
        ({"prompt": HI, "chosen": [*HI, reply("Hello.")], "rejected": [*HI, reply("No.")]}, HI),
        ({"prompt": [BRIEF, *HI], "chosen": [*HI, reply("Hello.")], "rejected": "No."}, [BRIEF, *HI]),
        ({"prompt": "Hi!", "chosen": [BRIEF, *HI, reply("Hello.")], "rejected": "No."}, [BRIEF, *HI]),
        ({"chosen": f"{ASKED} Hello.", "rejected": f"{ASKED} No."}, HI),
        ({"prompt": "Hi!", "chosen": f"{ASKED} Hello.", "rejected": f"{ASKED} No."}, "Hi!"),
        ({"prompt": ASKED, "chosen": "Hello.", "rejected": "No."}, HI),
    ],
    ids=[
        "standard",
        "conversation and texts",
        "conversation and messages",
        "shared messages",
        "text that the messages repeat",
        "conversation that the messages repeat",
        "system message of the prompt alone",
        "system message of a side alone",
        "dialogue",
        "text that the dialogue repeats",
        "dialogue and texts",
    ],
)
def test_every_layout_gives_the_same_pair(row: dict[str, Any], prompt: Any) -> None:
    assert load_pairs([row]) == [Pair(prompt, "Hello.", "No.")]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".csv"])
def test_pairs_are_read_from_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pairs{suffix}"
    content = "prompt,chosen,rejected\nHi!,Hello.,NA\n" if suffix == ".csv" else ""
    content = content or json.dumps({"prompt": "Hi!", "chosen": "Hello.", "rejected": "NA"}) + "\n"
    path.write_bytes(gzip.compress(content.encode()) if suffix.endswith(".gz") else content.encode())
    assert load_pairs(str(path)) == [Pair("Hi!", "Hello.", "NA")]


def test_a_system_message_is_put_before_conversations_alone() -> None:
    rows = [{"prompt": prompt, "chosen": "Hello.", "rejected": "No."} for prompt in ("Hi!", HI)]
    assert [pair.prompt for pair in load_pairs(rows, system="Be brief.")] == [
        "Hi!",
        [{"role": "system", "content": "Be brief."}, *HI],
    ]


UNUSABLE = {
    "has two equal responses": {"prompt": "Hi!", "chosen": "No.", "rejected": "No."},
    "has an empty rejected response": {"prompt": "Hi!", "chosen": "No.", "rejected": "  "},
    "share no prompt": {"chosen": [*HI, reply("Hello.")], "rejected": [{**HI[0], "content": "Why?"}, reply("No.")]},
    "has no prompt": {"chosen": "Hello.", "rejected": "No."},
    "does not end with replies": {"chosen": HI, "rejected": [*HI, reply("No.")]},
    "turn 1 of .* is empty": {"chosen": f"{ASKED}\n\nHuman: So?", "rejected": f"{ASKED} No."},
    "message 0 has role 'critic'": {"prompt": [{"role": "critic", "content": "Hm."}], "chosen": "a", "rejected": "b"},
    "has the prompt '  '": {"prompt": "  ", "chosen": "a", "rejected": "b"},
    "repeat another prompt": {"prompt": "Why?", "chosen": [*HI, reply("Hello.")], "rejected": "No."},
    "sides that repeat another": {"prompt": "Hi!", "chosen": [reply("Hm."), *HI, reply("a")], "rejected": "b"},
    "has 2 different system messages": {
        "prompt": [{**BRIEF, "content": "Be kind."}, *HI],
        "chosen": [BRIEF, *HI, reply("a")],
        "rejected": "b",
    },
    "does not end with a turn of the user": {"prompt": [*HI, reply("Hello")], "chosen": " you.", "rejected": "."},
    "prompt that does not end with a turn": {"chosen": [BRIEF, reply("a")], "rejected": [BRIEF, reply("b")]},
    "has the prompt 3": {"prompt": 3, "chosen": "a", "rejected": "b"},
    "has 3, expected a text or a reply": {"prompt": "Hi!", "chosen": 3, "rejected": "b"},
}


@pytest.mark.parametrize("message", UNUSABLE)
def test_what_is_no_pair_is_counted_and_the_first_is_named(message: str) -> None:
    good: dict[str, Any] = {"prompt": "Hi!", "chosen": "Hello.", "rejected": "No."}
    if "prompt" not in UNUSABLE[message]:
        good = {"chosen": f"{ASKED} Hello.", "rejected": f"{ASKED} No."}
    with pytest.warns(UserWarning, match=f"1 of 2 pairs are left out, the first because .*{message}"):
        assert len(load_pairs([good, UNUSABLE[message]])) == 1
    with pytest.raises(PromptError, match=message):
        load_pairs([UNUSABLE[message]])


def test_a_missing_column_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Hi!", "chosen": "Hello."}\n')
    with pytest.raises(DataError, match="column is 'rejected', which .* does not have"):
        load_pairs(str(tmp_path / "pairs.jsonl"))
    with pytest.raises(DataError, match="holds no pair"):
        load_pairs([])


def test_rows_of_a_list_are_dictionaries() -> None:
    pair = Pair("Hi!", "Hello.", "No.")
    with pytest.raises(DataError, match=r"row 1 of the list is Pair\(.*, expected a dictionary. Hint: write {'prompt'"):
        load_pairs([{"prompt": "Hi!", "chosen": "Hello.", "rejected": "No."}, pair])  # type: ignore[list-item]


def test_a_path_names_a_file(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Hi!", "chosen": "Hello.", "rejected": "No."}')
    assert load_pairs(tmp_path / "pairs.jsonl") == [Pair("Hi!", "Hello.", "No.")]
