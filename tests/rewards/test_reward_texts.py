"""What a reward model reads: templates, and tokenizers that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from mavis.errors import ObjectiveError
from mavis.rewards import RewardModel
from mavis.rewards.reward_texts import check_template, check_token_ids, check_vocabulary, fill_template


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{response}", "c {prompt} d"),
        ("{response} {bos} {prompt}", "c {prompt} d <eos> a {response}"),
        ("{prompt}{response}", "a {response}c {prompt} d"),
        ("user : {prompt} assistant : {response} {eos}", "user : a {response} assistant : c {prompt} d <eos>"),
    ],
)
def test_a_template_of_ones_own_is_filled_once(make_folder: Any, template: str, text: str) -> None:
    folder = make_folder(bos_token="<eos>")
    rewards = RewardModel(folder, template=template)(["a {response}"], ["c {prompt} d"])
    assert rewards == pytest.approx(RewardModel(folder, template="concat")([""], [text]), abs=1e-6)


def test_a_template_with_a_token_that_the_tokenizer_lacks_is_refused(make_folder: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_folder())
    with pytest.raises(ObjectiveError, match=r"template is '\{response\} \{bos\} \{prompt\}', but .* has no bos token"):
        fill_template("{response} {bos} {prompt}", tokenizer, "a", "b")


@pytest.mark.parametrize("template", ["chat", "concat", "{response}", "{bos}{prompt} {response}{eos}"])
def test_templates_are_returned_as_they_are(template: str) -> None:
    assert check_template(template) == template


@pytest.mark.parametrize("template", ["", "Chat", "{prompt}", None, 3])
def test_a_template_without_the_response_is_refused(template: Any) -> None:
    with pytest.raises(ObjectiveError, match="but it must be 'auto', 'chat', 'concat' or a text with"):
        check_template(template)


def test_a_tokenizer_that_fits_is_accepted(make_folder: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_folder())
    check_vocabulary("owner/name", tokenizer)
    check_token_ids("owner/name", tokenizer, [[15], []], 16)
    with pytest.raises(ObjectiveError, match=r"writes token 15 \('j'\), but the model has embeddings of 15 tokens"):
        check_token_ids("owner/name", tokenizer, [[15], []], 15)
