"""`score` and `Signed`: order, what they accept, and how they refuse."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mavis.rewards
from mavis.errors import DataError, ObjectiveError
from mavis.rewards import Brevity, Dialogue, Signed, exclamations, score
from mavis.rewards.protocol import check_callable

PROMPTS = ["p", "q", "r"]
RESPONSES = ["Hi!", "", "no no!!"]


def returning(value: Any) -> Any:
    return lambda prompts, responses: value


def test_columns_follow_the_order_of_the_mapping() -> None:
    forward = score({"shout": exclamations, "brief": Brevity(scale=1, longest=3)}, PROMPTS, RESPONSES)
    backward = score({"brief": Brevity(scale=1, longest=3), "shout": exclamations}, PROMPTS, RESPONSES)
    assert forward.dtype == np.float64
    assert forward.tolist() == [[1, -1], [0, -3], [2, -2]]
    assert backward.tolist() == [[-1, 1], [-3, 0], [-2, 2]]


def test_an_objective_sees_prompts_and_responses() -> None:
    def same(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float(p == r) for p, r in zip(prompts, responses, strict=True)]

    assert score({"same": same}, ["a", "b"], ["a", "c"]).tolist() == [[1], [0]]


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        np.array([1, 2, 3]),
        np.array([1, 2, 3], dtype=np.float32),
        torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        torch.tensor([1, 2, 3], dtype=torch.bfloat16),
        [torch.tensor(1.0, requires_grad=True), np.float32(2), np.array(3)],
        iter([1, 2, 3]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_lists_arrays_and_tensors_are_accepted(returned: Any) -> None:
    assert score({"x": returning(returned)}, PROMPTS, RESPONSES).tolist() == [[1], [2], [3]]


def test_no_responses_give_no_rows_and_no_calls() -> None:
    assert score({"x": returning(None), "y": returning(None)}, [], []).shape == (0, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1.0", 1j, [1.0], np.array([1.0])])
def test_anything_but_a_finite_number_names_objective_value_and_response(value: Any) -> None:
    long = "once upon a time there was a dog who liked to run and play all day long"
    with pytest.raises(ObjectiveError) as caught:
        score({"fine": exclamations, "helpful": returning([0.0, value])}, ["p", "q"], ["ok", long])
    assert str(caught.value) == (
        f"objective 'helpful' scored response 1 ({long[:60] + '...'!r}) as {value!r}, but a reward is a "
        "finite number. Hint: fix the objective for this response, or leave the response out."
    )


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], "objective 'x' returned 2 rewards for 3 responses."),
        (0.5, "objective 'x' returned a float for 3 responses."),
        (None, "objective 'x' returned a NoneType for 3 responses."),
        ("abc", "objective 'x' returned a str for 3 responses."),
        ({"a": 1, "b": 2, "c": 3}, "objective 'x' returned a dict for 3 responses."),
        (np.zeros((3, 1)), "objective 'x' returned shape (3, 1), but must return (3,)."),
        (torch.zeros(3, 1), "objective 'x' returned shape (3, 1), but must return (3,)."),
        (torch.tensor(1.0), "objective 'x' returned shape (), but must return (3,)."),
    ],
)
def test_wrong_returns_are_refused(returned: Any, message: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        score({"x": returning(returned)}, PROMPTS, RESPONSES)
    assert caught.value.message == message
    assert caught.value.hint == "return one finite number per response, in the order of the responses."


def test_prompts_and_responses_must_pair_up() -> None:
    with pytest.raises(ObjectiveError, match="score got 3 prompts but 2 responses"):
        score({"x": exclamations}, PROMPTS, RESPONSES[:2])


@pytest.mark.parametrize(("prompts", "responses"), [("abc", ["a", "b", "c"]), (["a", "b", "c"], "abc")])
def test_a_bare_string_is_no_sequence_of_strings(prompts: Any, responses: Any) -> None:
    with pytest.raises(ObjectiveError, match=r"score got one string, .* Hint: pass \[prompt\] and \[response\]"):
        score({"x": exclamations}, prompts, responses)


def test_no_objective_is_refused() -> None:
    with pytest.raises(ObjectiveError, match="score got no objectives"):
        score({}, PROMPTS, RESPONSES)


def test_what_cannot_be_called_is_refused() -> None:
    objectives: Any = {"x": {"_target_": "mavis.rewards.Positive"}}
    with pytest.raises(ObjectiveError, match=r"objective 'x' is a dict, .*hydra\.utils\.instantiate"):
        score(objectives, PROMPTS, RESPONSES)


def touchy(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [1 / response.count("!") for response in responses]  # LINE


def test_what_an_objective_raises_becomes_the_cause_of_an_error_that_names_objective_response_and_line() -> None:
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.endswith("# LINE"))
    with pytest.raises(ObjectiveError) as caught:
        score({"fine": exclamations, "helpful": touchy}, PROMPTS, RESPONSES)
    function = "<listcomp>" if sys.version_info < (3, 12) else "touchy"
    assert caught.value.message == (
        "objective 'helpful' raised ZeroDivisionError: division by zero while scoring response 1 (''), "
        f"at {__file__}:{line} in {function}."
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError, UnicodeError, RuntimeError, AssertionError])
def test_an_exception_for_every_response_blames_none(error: type[Exception]) -> None:
    def broken(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        raise error

    with pytest.raises(ObjectiveError, match=rf"^objective 'x' raised {error.__name__} for every response, at "):
        score({"x": broken}, PROMPTS, RESPONSES)


@pytest.mark.parametrize("wrong", [[0], [13], [37], [63], [5, 6], [0, 50]])
def test_one_of_the_failing_responses_is_named_after_a_few_retries(wrong: list[int]) -> None:
    calls: list[int] = []

    def broken(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        calls.append(len(responses))
        return [1 / (int(response) not in wrong) for response in responses]

    with pytest.raises(ObjectiveError, match=r"while scoring response (\d+) \('\1'\)") as caught:
        score({"x": broken}, [""] * 64, list(map(str, range(64))))
    assert any(f"response {row} (" in caught.value.message for row in wrong)
    assert sum(calls[1:]) <= 64 + 4
    assert len(calls) <= 1 + 4 + 7


def test_the_only_response_is_named() -> None:
    with pytest.raises(ObjectiveError, match=r"division by zero while scoring response 0 \(''\), at "):
        score({"x": touchy}, [""], [""])


def test_an_exception_in_a_library_names_the_line_that_called_it() -> None:
    def parses(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float(json.loads(response)) for response in responses]

    with pytest.raises(ObjectiveError, match=r"raised JSONDecodeError: .*test_protocol\.py:\d+ in "):
        score({"x": parses}, PROMPTS, RESPONSES)


def test_an_exception_of_the_batch_alone_blames_no_response() -> None:
    def small(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        if len(responses) > 2:
            raise ValueError("too many")
        return [0.0] * len(responses)

    with pytest.raises(ObjectiveError, match="raised ValueError: too many while scoring 3 responses, at "):
        score({"x": small}, PROMPTS, RESPONSES)


def test_an_error_of_mavis_is_passed_on_with_a_note() -> None:
    def broken(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        raise DataError("the lexicon is missing.", "download it.")

    with pytest.raises(DataError) as caught:
        score({"helpful": broken}, PROMPTS, RESPONSES)
    assert caught.value.__notes__ == ["raised while objective 'helpful' scored 3 responses"]


async def asynchronous(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [0.0] * len(responses)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            lambda responses: [0.0],
            r"objective 'x' takes the arguments \(responses\), but is called as objective\(prompts",
        ),
        (lambda: [0.0], r"objective 'x' takes the arguments \(\), but"),
        (lambda prompts, responses, scale: [0.0], r"takes the arguments \(prompts, responses, scale\), but"),
        (lambda prompts, *, responses: [0.0], r"takes the arguments \(prompts, \*, responses\), but"),
        (Brevity, r"objective 'x' is the class Brevity, expected an instance\. Hint: build it: Brevity\(\.\.\.\)\."),
        (asynchronous, r"objective 'x' is asynchronous"),
    ],
)
def test_an_objective_with_another_signature_is_refused_before_it_is_called(objective: Any, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        check_callable("x", objective)
    with pytest.raises(ObjectiveError, match=message):
        score({"x": objective}, PROMPTS, RESPONSES)


@pytest.mark.parametrize("objective", [max, lambda *texts: [0.0], lambda p, r, scale=2: [0.0], Brevity(), exclamations])
def test_any_signature_that_takes_two_lists_is_accepted(objective: Any) -> None:
    check_callable("x", objective)


def test_an_objective_cannot_change_the_texts_of_the_next() -> None:
    def sorts(prompts: list[str], responses: list[str]) -> list[float]:
        responses.sort()
        return [0.0] * len(responses)

    rewards = score({"sorts": sorts, "shout": exclamations}, PROMPTS, RESPONSES)  # type: ignore[dict-item]
    assert rewards[:, 1].tolist() == [1, 0, 2]


def test_signed_turns_an_objective_round() -> None:
    texts = ['"Hi," she said.', "no talk"]
    plain = score({"d": Dialogue()}, texts, texts)
    assert (score({"d": Signed(Dialogue())}, texts, texts) == -plain).all()
    assert (score({"d": Signed(Dialogue(), sign=1)}, texts, texts) == plain).all()
    assert (score({"d": Signed(Signed(Dialogue()))}, texts, texts) == plain).all()


def test_signed_passes_what_is_wrong_on_to_the_check() -> None:
    with pytest.raises(ObjectiveError, match=r"objective 'cost' scored response 1 .* as nan"):
        score({"cost": Signed(returning([1.0, float("nan"), 2.0]))}, PROMPTS, RESPONSES)


@pytest.mark.parametrize("sign", [0, 2, -0.5, "-1", None])
def test_a_sign_is_one_or_minus_one(sign: Any) -> None:
    with pytest.raises(ObjectiveError, match="but it must be 1 or -1"):
        Signed(exclamations, sign=sign)


@pytest.mark.parametrize("path", sorted(Path(mavis.rewards.__file__).parent.glob("*.py")), ids=lambda p: p.stem)
def test_scorers_are_imported_where_they_are_used(path: Path) -> None:
    imported = set()
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            imported.add(str(statement.module).split(".")[0])
    assert imported - sys.stdlib_module_names <= {"mavis", "numpy", "torch"}
