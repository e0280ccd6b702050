"""Scores of prefixes: those of one pass are those of each prefix alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mavis.errors import ObjectiveError
from mavis.rewards import RewardModel

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content | trim }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
ASKED = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d e"}]
RENDERED = "user : a b <eos> assistant : c <eos> user : d e <eos> assistant : "
RESPONSES = ["f", "g h i j a", "", "b b", " c "]


def prefixes(response: str) -> list[str]:
    words = response.split()
    return [" ".join(words[: n + 1]) for n in range(len(words))]


@pytest.mark.parametrize("pad_token", ["<pad>", None])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_prefixes_of_texts_are_scored_in_one_pass(make_folder: Any, batch_size: int, pad_token: str | None) -> None:
    model = RewardModel(make_folder(pad_token=pad_token), template="concat", batch_size=batch_size)
    scores = model.score_prefixes(["a b c "] * 5, RESPONSES)
    for response, found in zip(RESPONSES, scores, strict=True):
        parts = prefixes(response)
        assert found == pytest.approx(model(["a b c "] * len(parts), parts), abs=1e-5)
    assert [len(found) for found in scores] == [1, 5, 0, 2, 1]
    assert max(scores[1]) - min(scores[1]) > 0.1
    assert scores[1][-1] == pytest.approx(model(["a b c "], ["g h i j a"])[0], abs=1e-5)


def test_prefixes_of_a_reply_leave_the_turn_open(make_folder: Any) -> None:
    folder = make_folder(chat_template=CHAT_TEMPLATE)
    chat, plain = RewardModel(folder), RewardModel(folder, template="concat")
    for response, found in zip(RESPONSES, chat.score_prefixes([ASKED] * 5, RESPONSES), strict=True):
        parts = prefixes(response)
        assert found == pytest.approx(plain([RENDERED] * len(parts), parts), abs=1e-5)
    assert chat([ASKED], ["f"]) == pytest.approx(plain([RENDERED], ["f <eos>"]), abs=1e-5)


@pytest.mark.parametrize("said", ["a", "a b", "a b c", "a b c d", "a b c d e"])
def test_ends_of_turns_that_are_the_padding_are_no_end_of_the_text(make_folder: Any, said: str) -> None:
    folder = make_folder(chat_template=CHAT_TEMPLATE, pad_token="<eos>")
    model, plain = RewardModel(folder), RewardModel(folder, template="concat")
    rendered = f"user : {said} <eos> assistant : "
    assert model.score_prefixes([said], ["f g h"])[0] == pytest.approx(
        plain([rendered] * 3, ["f", "f g", "f g h"]), abs=1e-5
    )


def test_prefixes_have_the_sign_the_output_and_the_length_penalty_of_the_reward(make_folder: Any) -> None:
    folder = make_folder(labels=3)
    model = RewardModel(folder, template="concat", output=[2, 0], sign=-1, length_penalty=3.0)
    assert model.score_prefixes(["a "], ["b c d"])[0] == pytest.approx(
        model(["a "] * 3, ["b", "b c", "b c d"]), abs=1e-5
    )


def test_the_prompt_is_cut_on_the_left_but_never_the_response(make_folder: Any) -> None:
    model = RewardModel(make_folder(), template="concat", max_length=4)
    whole = RewardModel(make_folder(), template="concat")
    assert model.score_prefixes(["a b c d "], ["e f g"]) == [pytest.approx(whole.score_prefixes(["d "], ["e f g"])[0])]
    with pytest.raises(ObjectiveError, match="max_length is 4, but a response has 5 tokens"):
        model.score_prefixes(["a "], ["b c d e f"])


def test_a_begin_token_is_read_once(make_folder: Any) -> None:
    folder = make_folder(begins_with_eos=True, bos_token="<eos>")
    model = RewardModel(folder, template="concat")
    assert model.score_prefixes(["<eos> a "], ["b c"])[0] == pytest.approx(
        model(["<eos> a ", "<eos> a "], ["b", "b c"]), abs=1e-5
    )


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(ObjectiveError) as caught:
        RewardModel(folder, **options).score_prefixes(["a b "], ["c d e"])
    return caught.value.message


def test_what_has_no_prefixes_is_refused(make_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "reads its text in both directions" in refused(make_folder("bert", name="bert"), template="concat")
    folder = make_folder()
    assert "truncation_side is 'right'" in refused(folder, template="concat", truncation_side="right")
    for template in ("{response} {prompt}", "{response} a {response}"):
        assert "the response is not the last part" in refused(folder, template=template)
    assert RewardModel(folder).score_prefixes([], []) == []
    # A decoder that was changed to read both directions, as some embedding models are.
    from transformers import LlamaModel

    forward = LlamaModel.forward

    def both_directions(self: Any, input_ids: Any, attention_mask: Any, **rest: Any) -> Any:
        states = forward(self, input_ids=input_ids, attention_mask=attention_mask, **rest)
        states.last_hidden_state = states.last_hidden_state + states.last_hidden_state.mean(1, keepdim=True)
        return states

    monkeypatch.setattr(LlamaModel, "forward", both_directions)
    assert "reads its text in both directions" in refused(folder, template="concat")
