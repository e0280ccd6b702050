"""Conversations are rendered as the tokenizer's own chat template renders them, or refused with the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken

import mavis
from mavis.errors import PromptError
from mavis.policies.chat import as_conversation, last_user_turn, prompt_key, render_prompt, turn_end_ids
from mavis.policies.encoding import encode_prompts

TEMPLATES = Path(__file__).parent / "chat_templates"
SPECIAL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "qwen_3": ["<|im_start|>", "<|im_end|>"],
    "llama_3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "gemma_3": ["<start_of_turn>", "<end_of_turn>"],
    "phi_3": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
    "command_r": ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"],
    "deepseek_r1": ["<｜User｜>", "<｜Assistant｜>"],
}
SYSTEM = {"role": "system", "content": "Be brief."}
ONE_TURN = [{"role": "user", "content": "Hi!"}]
THREE_TURNS = [
    *ONE_TURN,
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Well."},
    {"role": "user", "content": "Tell me a story."},
]
# The formats as their models' cards describe them.
RENDERED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n",
    "command_r": "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
    "<|USER_TOKEN|>Hi!<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "deepseek_r1": "<s>Be brief.<｜User｜>Hi!<｜Assistant｜><think>\n",
    "gemma": None,
    "gemma_3": "<s><start_of_turn>user\nBe brief.\n\nHi!<end_of_turn>\n<start_of_turn>model\n",
    "llama_2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi! [/INST]",
    "llama_3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi!<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": None,
    "phi_3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi!<|end|>\n<|assistant|>\n",
    "qwen_3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n",
    "tulu": "<s><|system|>\nBe brief.\n<|user|>\nHi!\n<|assistant|>\n",
    "vicuna": "Be brief. USER: Hi! ASSISTANT:",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHi!</s>\n<|assistant|>\n",
}
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
REFUSING_SYSTEM = [name for name, text in RENDERED.items() if text is None]


@pytest.fixture
def tokenizer() -> Any:
    """A tokenizer of the embedded policy's own, to do with as one likes."""
    return mavis.embedded.load()[1]


def with_template(tokenizer: Any, name: str) -> Any:
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL.get(name, [])})
    return tokenizer


def test_there_are_twelve_families_of_templates_or_more() -> None:
    assert len(NAMES) >= 12
    assert set(NAMES) == set(RENDERED)


@pytest.mark.parametrize("conversation", [ONE_TURN, THREE_TURNS], ids=["one turn", "three turns"])
@pytest.mark.parametrize("system", [False, True], ids=["no system", "system"])
@pytest.mark.parametrize("name", NAMES)
def test_the_ids_are_those_of_the_tokenizer(
    tokenizer: Any, name: str, system: bool, conversation: list[dict[str, str]]
) -> None:
    with_template(tokenizer, name)
    messages = [SYSTEM, *conversation] if system else conversation
    if system and name in REFUSING_SYSTEM:
        with pytest.raises(PromptError, match="chat template refuses a conversation of system, user"):
            render_prompt(tokenizer, messages)
        return
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    encoded = encode_prompts(tokenizer, [messages])
    assert encoded["input_ids"][0].tolist() == expected
    assert expected.count(tokenizer.bos_token_id) <= 3  # Llama 2 writes one a turn; no template writes two in a row
    assert [tokenizer.bos_token_id] * 2 != expected[:2]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSING_SYSTEM])
def test_every_template_renders_as_its_family_does(tokenizer: Any, name: str) -> None:
    assert render_prompt(with_template(tokenizer, name), [SYSTEM, *ONE_TURN]) == RENDERED[name]


def test_a_batch_of_texts_and_conversations_is_padded_on_the_left(tokenizer: Any) -> None:
    with_template(tokenizer, "llama_3")
    prompts = ["Once upon a time", ONE_TURN, [SYSTEM, *THREE_TURNS]]
    encoded = encode_prompts(tokenizer, prompts)
    for row, prompt in enumerate(prompts):
        alone = encode_prompts(tokenizer, [prompt])["input_ids"][0]
        assert encoded["input_ids"][row][encoded["attention_mask"][row].bool()].tolist() == alone.tolist()
    assert encoded["attention_mask"][:, -1].tolist() == [1, 1, 1]


def test_a_text_that_begins_with_the_bos_token_keeps_one(tokenizer: Any) -> None:
    ids = [encode_prompts(tokenizer, [text])["input_ids"][0].tolist() for text in ("Once", "<s>Once")]
    assert ids[0] == ids[1]
    assert ids[0].count(tokenizer.bos_token_id) == 1


def test_thinking_of_earlier_turns_may_be_left_out_by_a_template(tokenizer: Any) -> None:
    with_template(tokenizer, "qwen_3")
    thought = [*ONE_TURN, {"role": "assistant", "content": "<think>hm</think>\n\nHello."}, *ONE_TURN]
    assert "hm" not in render_prompt(tokenizer, thought)


def test_a_system_message_that_a_template_drops_is_an_error(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(PromptError, match="chat template drops the system message 'Be brief.'"):
        render_prompt(tokenizer, [SYSTEM, *ONE_TURN])


@pytest.mark.parametrize(("system", "user"), [("assistant", "Hi!"), ("Be kind", "Be kind, tell a story")])
def test_a_dropped_message_is_noticed_though_its_text_stands_elsewhere(tokenizer: Any, system: str, user: str) -> None:
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ m.role + m.content }}{% endfor %}assistant"
    )
    with pytest.raises(PromptError, match="chat template drops the system message"):
        render_prompt(tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": user}])


def test_a_template_may_escape_what_a_message_says(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | e }}{% endfor %}"
    assert render_prompt(tokenizer, [{"role": "user", "content": "a < b"}]) == "a &lt; b"


def test_a_token_that_was_added_as_special_ends_a_turn(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    assert turn_end_ids(tokenizer) == {tokenizer.convert_tokens_to_ids("<|end|>")}


def test_strict_alternation_is_an_error_that_says_so(tokenizer: Any) -> None:
    with_template(tokenizer, "mistral")
    with pytest.raises(PromptError, match=r"refuses a conversation of user, user: Conversation roles must alternate"):
        render_prompt(tokenizer, [*ONE_TURN, *ONE_TURN])


def test_a_tokenizer_without_a_template_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(PromptError, match="prompt is a conversation, but the policy's tokenizer has no chat template"):
        render_prompt(tokenizer, ONE_TURN)


def test_the_assistants_last_turn_is_continued_only_if_asked(tokenizer: Any) -> None:
    with_template(tokenizer, "chatml")
    open_reply = [*ONE_TURN, {"role": "assistant", "content": "Well, I"}]
    with pytest.raises(PromptError, match="prompt ends with the assistant's 'Well, I', expected a turn of the user"):
        render_prompt(tokenizer, open_reply)
    rendered = render_prompt(tokenizer, open_reply, continue_final_message=True)
    assert rendered.endswith("<|im_start|>assistant\nWell, I")


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], r"prompt is \[\], expected a text or a list of messages"),
        ([{"role": "user"}], "prompt, message 0 is .* expected a role and a content"),
        (["Hi!"], "prompt, message 0 is 'Hi!', expected a role and a content"),
        ([{"role": "critic", "content": "Hi!"}], "message 0 has role 'critic', expected system, user, assistant"),
        ([{"role": "user", "content": "  "}], "message 0 has content '  ', expected text"),
        ([{"role": "user", "content": None}], "message 0 has content None, expected text"),
        ([*ONE_TURN, SYSTEM], "has a system message at position 1, expected it first"),
        ([SYSTEM], "prompt ends with the system message"),
        ([{"role": "user", "content": [{"type": "image", "url": "a.png"}]}], "content of type image, expected text"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "audio"}]}], "content of type audio"),
    ],
)
def test_what_is_no_conversation_is_refused(tokenizer: Any, conversation: Any, message: str) -> None:
    with_template(tokenizer, "chatml")
    with pytest.raises(PromptError, match=message):
        render_prompt(tokenizer, conversation)


def test_parts_of_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]
    assert as_conversation([{"role": "user", "content": parts}]) == [{"role": "user", "content": "Hi there"}]


def test_a_system_message_is_put_before_conversations_without_one() -> None:
    assert as_conversation("Hi!", system="Be brief.") == [SYSTEM, *ONE_TURN]
    assert as_conversation([SYSTEM, *ONE_TURN], system="Be long.") == [SYSTEM, *ONE_TURN]


def test_the_last_turn_of_the_user_is_at_hand() -> None:
    assert last_user_turn(THREE_TURNS) == "Tell me a story."
    assert last_user_turn("Hi!") == "Hi!"


def test_keys_tell_prompts_apart() -> None:
    same = [{"content": "Hi!", "role": "user"}]
    assert prompt_key(ONE_TURN) == prompt_key(same)
    assert len({prompt_key(prompt) for prompt in ("Hi!", ONE_TURN, [SYSTEM, *ONE_TURN], THREE_TURNS)}) == 4


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama_3", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("zephyr", "</s>"),
        ("llama_2", "</s>"),
        ("phi_3", "<|end|>"),
        ("command_r", "<|END_OF_TURN_TOKEN|>"),
    ],
)
def test_the_token_that_ends_a_turn_is_read_off_the_template(tokenizer: Any, name: str, end: str) -> None:
    with_template(tokenizer, name)
    assert turn_end_ids(tokenizer) == {tokenizer.convert_tokens_to_ids(end)}


def test_a_template_without_an_end_of_turn_has_none(tokenizer: Any) -> None:
    assert turn_end_ids(tokenizer) == set()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert turn_end_ids(tokenizer) == set()


def test_a_tokenizer_without_a_padding_token_encodes_a_batch(tokenizer: Any) -> None:
    expected = encode_prompts(tokenizer, ["Once upon a time", "Once"])
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    encoded = encode_prompts(tokenizer, ["Once upon a time", "Once"])
    mask = expected["attention_mask"]
    assert torch.equal(encoded["attention_mask"], mask)
    assert torch.equal(encoded["input_ids"] * mask, expected["input_ids"] * mask)
