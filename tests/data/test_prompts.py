"""Prompts from everywhere they may come from."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from mavis.data import draw_prompts, load_prompts
from mavis.errors import DataError, PromptError

ROWS = ["Once upon a time", "Tom said, “Hi”", "  An indented day"]


def write(folder: Path, kind: str, columns: dict[str, list[Any]]) -> str:
    """Write columns as one kind of source, and say how it is named."""
    path = folder / f"prompts.{kind}"
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if kind == "txt":
        path.write_text("\n".join(next(iter(columns.values()))) + "\n", encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "csv":
        datasets.Dataset.from_dict(columns).to_csv(path, index=False)
    elif kind == "parquet":
        datasets.Dataset.from_dict(columns).to_parquet(path)
    elif kind == "folder":
        datasets.Dataset.from_dict(columns).save_to_disk(str(path))
    elif kind == "folder of splits":
        splits = {"train": datasets.Dataset.from_dict(columns), "test": datasets.Dataset.from_dict({"text": ["held"]})}
        datasets.DatasetDict(splits).save_to_disk(str(path))
    return str(path)


# Older versions of datasets leave the closing of CSV files to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"
)

KINDS = ["txt", "jsonl", "json", "csv", "parquet", "folder", "folder of splits"]


def standard_input(content: bytes) -> io.TextIOWrapper:
    """What a process reads from a pipe, in a locale that is not UTF-8."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="latin-1")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_its_rows_in_their_order(tmp_path: Path, kind: str) -> None:
    assert load_prompts(write(tmp_path, kind, {"text": ROWS})) == ROWS


def test_a_list_is_taken_as_it_is() -> None:
    assert load_prompts(ROWS) == ROWS
    assert load_prompts(tuple(ROWS)) == ROWS


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_dash_reads_standard_input(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr("sys.stdin", standard_input(("\n".join(ROWS) + end).encode()))
    assert load_prompts("-") == ROWS


def test_the_only_column_of_text_is_found_among_others(tmp_path: Path) -> None:
    source = write(tmp_path, "parquet", {"score": [1.0, 2.0, 3.0], "story": ROWS, "id": [1, 2, 3]})
    assert load_prompts(source) == ROWS


def test_a_column_can_be_named(tmp_path: Path) -> None:
    source = write(tmp_path, "jsonl", {"prompt": ROWS, "answer": ["a", "b", "c"]})
    assert load_prompts(source, column="prompt") == ROWS
    assert load_prompts(source, column="answer") == ["a", "b", "c"]


def test_a_split_can_be_named(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path, "folder of splits", {"text": ROWS}), split="test") == ["held"]


def test_the_first_words_of_whole_texts_are_kept() -> None:
    rows = ["One day, a little\n girl ran home.", "She said", "a  b\tc d"]
    assert load_prompts(rows, first_words=3) == ["One day, a", "She said", "a b c"]


def test_prompts_that_are_repeated_or_blank_are_left_out() -> None:
    assert load_prompts(["b", "", "a", "b", "   ", "a", "\t"]) == ["b", "a"]


def test_what_is_equal_in_its_first_words_is_repeated() -> None:
    assert load_prompts(["once upon a time", "once upon a hill"], first_words=2) == ["once upon"]


def test_the_limit_counts_what_is_left() -> None:
    assert load_prompts(["a", "a", "", "b", "c"], limit=2) == ["a", "b"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_a_file_may_be_named_by_a_path_and_in_capitals(tmp_path: Path, kind: str) -> None:
    source = Path(write(tmp_path, kind, {"text": ROWS}))
    assert load_prompts(source) == ROWS
    assert load_prompts(source.rename(tmp_path / f"PROMPTS.{kind.upper()}")) == ROWS


# What goes wrong


@pytest.mark.parametrize(
    ("source", "shown"), [([], "an empty list"), (["", "  "], "an empty list"), ("empty.txt", "empty.txt")]
)
def test_no_prompt_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any, shown: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match=f"{shown}.*holds no prompt"):
        load_prompts(source)


def test_empty_standard_input_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", standard_input(b""))
    with pytest.raises(DataError, match="prompts come from standard input, which holds no prompt"):
        load_prompts("-")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=f"missing.{kind}', which does not exist"):
        load_prompts(str(tmp_path / f"missing.{kind}"))


def test_a_kind_of_file_that_is_not_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "prompts.docx").write_text("a")
    with pytest.raises(DataError, match=r"which is of an unsupported type. Hint: known: \.txt"):
        load_prompts(str(tmp_path / "prompts.docx"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_that_is_broken_is_named(tmp_path: Path, kind: str) -> None:
    source = tmp_path / f"broken.{kind}"
    source.write_bytes(b'{"text": "a"}\n{"text": ')
    with pytest.raises(DataError, match=rf"broken\.{kind}', which the datasets library cannot read"):
        load_prompts(str(source))


def test_text_that_is_not_utf_8_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    source = tmp_path / "latin.txt"
    source.write_bytes("Märchen".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt', which is not UTF-8"):
        load_prompts(str(source))


def test_an_unknown_column_is_an_error_that_knows_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column is 'promt', which .* does not have. Hint: did you mean 'prompt'"):
        load_prompts(write(tmp_path, "jsonl", {"prompt": ROWS}), column="promt")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": ROWS, "answer": ROWS}, "has 2 columns of text: question, answer"),
        ({"score": [1.0, 2.0, 3.0]}, "has 0 columns of text"),
    ],
)
def test_no_single_column_of_text_is_an_error(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_prompts(write(tmp_path, "parquet", columns))


def test_an_unknown_split_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path, "folder of splits", {"text": ROWS})
    with pytest.raises(DataError, match=r"split is 'valid', which .* does not have. Hint: known: train, test"):
        load_prompts(source, split="valid")


def test_a_row_without_a_text_is_left_out(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path, "jsonl", {"prompt": ["a", None, "b"]})) == ["a", "b"]


def test_a_list_of_something_else_is_an_error() -> None:
    with pytest.raises(DataError, match="row 1 of the list is 3, expected a text or a conversation"):
        load_prompts(["a", 3])  # type: ignore[list-item]


@pytest.mark.parametrize("source", [None, 3, {"text": ROWS}])
def test_what_is_no_source_is_an_error(source: Any) -> None:
    with pytest.raises(DataError, match="source is .*, expected a list of rows or a name. Hint: name a file"):
        load_prompts(source)


@pytest.mark.parametrize("options", [{"first_words": 0}, {"limit": 0}, {"limit": -1}])
def test_numbers_out_of_range_are_refused(options: dict[str, int]) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(DataError, match=f"{name} is {value}, expected a whole number ≥ 1"):
        load_prompts(["a", "b"], **options)  # type: ignore[arg-type]


def test_repeated_prompts_are_kept_where_each_wants_an_answer(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n\na\n")
    assert load_prompts(str(tmp_path / "prompts.txt"), repeated=True) == ["a", "b", "a"]


def test_drawn_prompts_come_equally_often_and_in_a_new_order_each_time() -> None:
    prompts = [str(i) for i in range(10)]
    drawn = draw_prompts(prompts, 25, seed=1)
    first, second, third = drawn[:10], drawn[10:20], drawn[20:]
    assert sorted(first) == sorted(second) == prompts
    assert len({*third}) == 5
    assert first != second != prompts
    assert draw_prompts(prompts, 15, seed=1) == drawn[:15]
    assert draw_prompts(prompts, 25, seed=2) != drawn


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85"])
def test_a_line_ends_at_a_line_break_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str) -> None:
    text = f"one{separator}still one\ntwo\n"
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", standard_input(text.encode()))
    expected = [f"one{separator}still one", "two"]
    assert load_prompts(str(tmp_path / "prompts.txt")) == expected
    assert load_prompts("-") == expected


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
def test_a_file_and_standard_input_are_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bytes) -> None:
    content = b"\xef\xbb\xbfone\rstill one" + end + "“two”".encode() + end
    (tmp_path / "prompts.txt").write_bytes(content)
    monkeypatch.setattr("sys.stdin", standard_input(content))
    assert load_prompts(str(tmp_path / "prompts.txt")) == load_prompts("-") == ["one\rstill one", "“two”"]


def test_standard_input_that_is_not_utf_8_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", standard_input("Märchen".encode("latin-1")))
    with pytest.raises(DataError, match="source is 'standard input', which is not UTF-8 text"):
        load_prompts("-")


# Conversations

HI = [{"role": "user", "content": "Hi!"}]
REPLY = {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
def test_conversations_are_read_from_a_column_of_prompts(tmp_path: Path, kind: str) -> None:
    source = write(tmp_path, kind, {"id": ["q0", "q1"], "prompt": [HI, [SYSTEM, *HI]]})
    assert load_prompts(source) == [HI, [SYSTEM, *HI]]


def test_the_reply_at_the_end_of_messages_is_left_out(tmp_path: Path) -> None:
    source = write(tmp_path, "jsonl", {"id": ["q0", "q1"], "messages": [[*HI, REPLY], [*HI, REPLY, *HI]]})
    assert load_prompts(source) == [HI, [*HI, REPLY, *HI]]


def test_the_prompt_of_preference_pairs_is_what_precedes_the_reply(tmp_path: Path) -> None:
    dialogue = "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    columns = {"chosen": [f"{dialogue} Because."], "rejected": [f"{dialogue} No."]}
    assert load_prompts(write(tmp_path, "jsonl", columns)) == [[*HI, REPLY, {"role": "user", "content": "Why?"}]]


def test_a_dialogue_is_a_conversation_unless_texts_are_wanted() -> None:
    dialogue = "\n\nHuman: Hi!\n\nAssistant:"
    assert load_prompts([dialogue]) == [HI]
    assert load_prompts([dialogue], chat=False) == [dialogue]


def test_a_line_can_be_a_turn_of_the_user(tmp_path: Path) -> None:
    source = write(tmp_path, "txt", {"": ["Hi!", "Why?"]})
    assert load_prompts(source, chat=True) == [HI, [{"role": "user", "content": "Why?"}]]
    assert load_prompts(source, chat=True, system="Be brief.")[0] == [SYSTEM, *HI]


def test_the_source_says_what_it_was_taken_for(tmp_path: Path) -> None:
    said: list[str] = []
    load_prompts(write(tmp_path, "jsonl", {"messages": [[*HI, REPLY]]}), report=said.append)
    load_prompts([HI, "Why?"], report=said.append)
    load_prompts(["Once"], report=said.append)
    assert said[0].endswith("prompts.jsonl': conversations in column 'messages' without the replies")
    assert said[1:] == [
        "2 prompts from the list: conversations, 1 of them a single turn of the user",
        "1 prompts from the list: texts",
    ]


def test_unusable_conversations_of_a_file_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    empty, unknown = [{"role": "user", "content": " "}], [{"role": "critic", "content": "Hm."}]
    source = write(tmp_path, "jsonl", {"prompt": [HI, empty, unknown, [*HI, REPLY]]})
    with pytest.warns(UserWarning, match=r"3 of 4 rows are left out, the first because row 1 of .* has content ' '"):
        assert load_prompts(source) == [HI]
    with pytest.raises(PromptError, match="row 0 of the list, message 0 has content ' '"):
        load_prompts([empty])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": [HI], "chat": False}, "chat is False, but row 0 of the list is a conversation"),
        ({"source": [HI], "first_words": 2}, "first_words is 2, but the prompts are conversations"),
        ({"source": ["Hi!"], "system": "Be brief."}, "system is 'Be brief.', but the prompts are texts"),
        ({"source": ["Hi!"], "column": "prompt"}, "column is 'prompt', but the list has no columns"),
        ({"source": HI}, "row 0 of the list is a single message, expected a list of messages"),
        ({"source": [{"role": "user", "content": "Help"}]}, "row 0 of the list is a single message"),
        ({"source": [[*HI, REPLY]]}, "row 0 of the list does not end with a turn of the user"),
    ],
)
def test_what_contradicts_the_rows_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_prompts(**arguments)


def test_cells_of_a_csv_file_are_texts_as_they_stand(tmp_path: Path) -> None:
    content = 'prompt,score\nNA,1\nnull,2\n007,3\n"a, ""b""\nc",4\nnan,\n'
    (tmp_path / "prompts.csv").write_text(content, encoding="utf-8")
    assert load_prompts(str(tmp_path / "prompts.csv")) == ["NA", "null", "007", 'a, "b"\nc', "nan"]


def test_a_ragged_csv_file_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("prompt,score\na,1\nb, c,2\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 3 has 3 cells, expected 2"):
        load_prompts(str(tmp_path / "prompts.csv"))


def test_a_cell_of_a_csv_file_may_be_long(tmp_path: Path) -> None:
    text = "once " * 50_000
    (tmp_path / "prompts.csv").write_text(f"prompt,score\n{text},1\n", encoding="utf-8")
    assert load_prompts(str(tmp_path / "prompts.csv")) == [text]


def test_columns_of_a_csv_file_without_a_name_are_no_fault(tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("prompt,score,,\nThe cat,1,,\n", encoding="utf-8")
    assert load_prompts(str(tmp_path / "prompts.csv")) == ["The cat"]


def test_a_data_frame_is_refused_and_an_iterator_is_read() -> None:
    with pytest.raises(DataError, match=r"source is a DataFrame.*to_dict\('records'\)"):
        load_prompts(pandas.DataFrame({"prompt": ["The cat"]}))
    assert load_prompts(iter(["The cat", "A dog"])) == ["The cat", "A dog"]


def test_columns_of_a_csv_file_that_share_a_name_are_named(tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("text,score,text,score,id\na,1,b,2,3\n", encoding="utf-8")
    with pytest.raises(DataError, match="which has several columns named 'text', 'score'. Hint: give each column"):
        load_prompts(str(tmp_path / "prompts.csv"))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_numbers_written_as_text_are_prompts_only_if_there_is_nothing_else(tmp_path: Path, kind: str) -> None:
    numbers = {"id": ["007", "8", "9"], "score": ["0.5", "", "-1e3"]}
    assert load_prompts(write(tmp_path, kind, {**numbers, "story": ROWS})) == ROWS
    assert load_prompts(write(tmp_path, kind, {"id": numbers["id"]})) == numbers["id"]
    with pytest.raises(DataError, match="has 2 columns of text: id, score"):
        load_prompts(write(tmp_path, kind, numbers))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "folder"])
def test_a_split_of_what_has_none_is_refused(tmp_path: Path, kind: str) -> None:
    source = write(tmp_path, kind, {"text": ROWS})
    with pytest.raises(DataError, match=r"split is 'test', but .* (has no splits|without splits)"):
        load_prompts(source, split="test")
    assert load_prompts(source, split="train") == ROWS


def test_the_only_split_of_a_dataset_needs_no_name(tmp_path: Path) -> None:
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ROWS})}).save_to_disk(str(tmp_path / "one"))
    assert load_prompts(str(tmp_path / "one")) == ROWS


def test_an_error_of_the_library_shows_its_cause(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_bytes(b'{"text": "a"}\n{"text": ')
    with pytest.raises(DataError, match="cannot read: .*: .*JSON"):
        load_prompts(str(tmp_path / "broken.jsonl"))


def test_chosen_texts_without_turns_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path, "jsonl", {"chosen": ["Once upon a time."], "rejected": ["No."]})
    with pytest.raises(DataError, match="is a text without turns, so its reply cannot be told from its prompt"):
        load_prompts(source)
