"""RewardModel on tiny random classifiers: what is read, in which order, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizerFast,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from mavis.errors import ObjectiveError, PromptError
from mavis.rewards import RewardModel, Signed, check_batch_independence, score

CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
PROMPTS = ["a b c ", "b ", "", "j i h g f e d ", "c c "]
RESPONSES = ["d", "e f g h i j", "a", "b c", "<eos>"]


def logits_alone(folder: Path, text: str) -> torch.Tensor:
    """The logits of one text, straight through transformers: no batch, no padding, no truncation."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Read the very last token: without padding there is none to skip.
    model.config.pad_token_id = None
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0].double()


# Not <eos> for Llama: a causal model that declares it as its padding reads none at the end, by choice.
@pytest.mark.parametrize(
    ("kind", "pad_token"),
    [("llama", "<pad>"), ("llama", None), ("bert", "<pad>"), ("bert", "<eos>"), ("bert", None)],
)
def test_rewards_are_those_of_each_text_alone_in_order(make_folder: Any, kind: str, pad_token: Any) -> None:
    folder = make_folder(kind, pad_token=pad_token)
    expected = [logits_alone(folder, p + r)[0].item() for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert max(expected) - min(expected) > 0.1
    for batch_size in (1, 2, 16):
        rewards = RewardModel(folder, template="concat", batch_size=batch_size)(PROMPTS, RESPONSES)
        assert rewards == pytest.approx(expected, abs=1e-5), batch_size


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_logit_index_difference_and_sign(make_folder: Any, kind: str) -> None:
    folder = make_folder(kind, labels=3)
    logits = torch.stack([logits_alone(folder, p + r) for p, r in zip(PROMPTS, RESPONSES, strict=True)])

    def rewards(**options: Any) -> Any:
        return RewardModel(folder, template="concat", **options)(PROMPTS, RESPONSES)

    assert rewards(output=0) == pytest.approx(logits[:, 0].tolist(), abs=1e-5)
    assert rewards(output=2) == pytest.approx(logits[:, 2].tolist(), abs=1e-5)
    assert rewards(output=[2, 0]) == pytest.approx((logits[:, 2] - logits[:, 0]).tolist(), abs=1e-5)
    assert rewards(output=[2, 0], sign=-1) == pytest.approx(rewards(output=[0, 2]))
    assert rewards(output=1, sign=-1) == [-reward for reward in rewards(output=1)]


def test_truncation_keeps_the_side_that_is_asked_for(make_folder: Any) -> None:
    folder = make_folder()

    def reward(prompt: str, response: str, **options: Any) -> float:
        return RewardModel(folder, template="concat", **options)([prompt], [response])[0]

    cut_left = reward("a b c ", "d e f", max_length=4)
    cut_right = reward("a b c ", "d e f", max_length=4, truncation_side="right")
    assert cut_left == pytest.approx(reward("c ", "d e f"), abs=1e-5)
    assert cut_right == pytest.approx(reward("a b c ", "d"), abs=1e-5)
    assert abs(cut_left - cut_right) > 1e-3


def test_the_chat_template_wraps_prompt_and_response(make_folder: Any) -> None:
    folder = make_folder(chat_template=CHAT_TEMPLATE)
    chat = RewardModel(folder)(["a b"], ["c d"])
    assert chat == pytest.approx([logits_alone(folder, "user : a b assistant : c d")[0].item()], abs=1e-5)
    assert chat != pytest.approx(RewardModel(folder, template="concat")(["a b "], ["c d"]), abs=1e-3)


def test_special_tokens_come_from_the_tokenizer_or_the_chat_template_never_both(make_folder: Any) -> None:
    plain = make_folder(name="plain")
    folder = make_folder(begins_with_eos=True, chat_template=CHAT_TEMPLATE)
    concat = RewardModel(folder, template="concat")(["a b "], ["c d"])
    chat = RewardModel(folder, template="chat")(["a b"], ["c d"])
    assert concat == pytest.approx([logits_alone(plain, "<eos> a b c d")[0].item()], abs=1e-5)
    assert chat == pytest.approx([logits_alone(plain, "user : a b assistant : c d")[0].item()], abs=1e-5)


def test_the_model_loads_at_the_first_call_and_once(make_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder()
    loads = []
    load = RewardModel._load
    monkeypatch.setattr(RewardModel, "_load", lambda self: loads.append(1) or load(self))
    objective = RewardModel(folder, template="concat")
    assert objective([], []) == []
    assert loads == []
    objective(PROMPTS, RESPONSES)
    objective(PROMPTS, RESPONSES)
    assert loads == [1]


def test_a_text_without_any_token_is_scored(make_folder: Any) -> None:
    for kind in ("llama", "bert"):
        folder = make_folder(kind, name=kind)
        assert score({"r": RewardModel(folder, template="concat")}, ["", "a"], ["", ""]).shape == (2, 1)


def test_dtype_is_that_of_the_checkpoint_unless_told(make_folder: Any) -> None:
    folder = make_folder()
    exact = RewardModel(folder, template="concat")(PROMPTS, RESPONSES)
    rough = RewardModel(folder, template="concat", dtype="bfloat16")(PROMPTS, RESPONSES)
    assert rough != exact
    assert rough == pytest.approx(exact, abs=0.2)


def refused(folder: Any, **options: Any) -> str:
    with pytest.raises(ObjectiveError) as caught:
        RewardModel(folder, **options)(["a"], ["b"])
    return str(caught.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path / "nowhere")
    assert message.startswith(f"model is '{tmp_path}/nowhere', which does not exist. Hint: ")


def test_a_folder_without_a_model_is_refused(make_folder: Any) -> None:
    folder = make_folder()
    (folder / "config.json").unlink()
    assert refused(folder, template="concat").startswith(f"reward model '{folder}' cannot be loaded: ")


def test_pickled_weights_are_refused(make_folder: Any) -> None:
    folder = make_folder()
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    message = refused(folder, template="concat")
    assert "holds no *.safetensors, and pickled weights are not read. Hint: " in message
    (folder / "something_else.safetensors").touch()
    assert "cannot be loaded: " in refused(folder, template="concat")


def test_a_language_model_without_a_reward_head_is_refused(make_folder: Any) -> None:
    folder = make_folder()
    config = AutoModelForSequenceClassification.from_pretrained(folder).config
    LlamaForCausalLM(config).save_pretrained(folder)
    assert "lacks the weights score.weight. Hint: " in refused(folder, template="concat")


@pytest.mark.parametrize(("output", "shown"), [(2, "2"), ([0, 5], "[0, 5]")])
def test_an_output_beyond_the_logits_is_refused(make_folder: Any, output: Any, shown: str) -> None:
    message = refused(make_folder(labels=2), template="concat", output=output)
    assert message.startswith(f"output is {shown}, but reward model ")
    assert message.endswith("has 2 logits: 0 (LABEL_0), 1 (LABEL_1). Hint: use indices from 0 to 1.")


def test_a_tokenizer_without_chat_template_is_refused(make_folder: Any) -> None:
    assert "has no chat template. Hint: use template='concat'" in refused(make_folder())


def test_more_tokens_than_positions_are_refused(make_folder: Any) -> None:
    message = refused(make_folder(), template="concat", max_length=513)
    assert message.startswith("max_length is 513, but reward model ")
    assert message.endswith(" reads 512 tokens. Hint: use max_length=512 or less.")


def test_several_logits_need_an_output(make_folder: Any) -> None:
    message = refused(make_folder(labels=2), template="concat")
    assert message.startswith("output is not given, but reward model ")
    assert "has 2 logits: 0 (LABEL_0), 1 (LABEL_1). Hint: name the one that is the reward: output=1" in message


def test_the_only_logit_needs_no_output(make_folder: Any) -> None:
    folder = make_folder()
    plain = RewardModel(folder, template="concat")(PROMPTS, RESPONSES)
    assert plain == RewardModel(folder, template="concat", output=0)(PROMPTS, RESPONSES)


@pytest.mark.parametrize("kept", [[], ["tokenizer_config.json"]])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_folder_without_a_tokenizer_is_refused(make_folder: Any, kind: str, kept: list[str]) -> None:
    folder = make_folder(kind)
    for path in folder.glob("*token*"):
        if path.name not in kept:
            path.unlink()
    message = refused(folder, template="concat")
    assert "cannot be loaded: " in message or "has a tokenizer that knows" in message
    assert "tokenizer" in message.partition(" Hint: ")[2]


def test_a_tokenizer_of_special_tokens_only_is_refused(make_folder: Any) -> None:
    folder = make_folder("bert")
    for path in folder.glob("*token*"):
        path.unlink()
    BertTokenizerFast().save_pretrained(folder)
    message = refused(folder, template="concat")
    assert "has a tokenizer that knows 5 special tokens and no word. Hint: save the tokenizer" in message


def test_a_token_beyond_the_embedding_is_named(make_folder: Any) -> None:
    folder = make_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["k", "l"])
    tokenizer.save_pretrained(folder)
    rewards = RewardModel(folder, template="concat")
    assert len(rewards(["a "], ["b"])) == 1
    with pytest.raises(ObjectiveError, match=r"writes token 17 \('l'\), but the model has embeddings of 16 tokens"):
        rewards(["a ", "b "], ["k", "l c"])


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_an_added_padding_token_without_an_embedding_pads(make_folder: Any, kind: str) -> None:
    folder = make_folder(kind, pad_token=None)
    before = RewardModel(folder, template="concat")(PROMPTS, RESPONSES)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    tokenizer.save_pretrained(folder)
    assert RewardModel(folder, template="concat")(PROMPTS, RESPONSES) == pytest.approx(before, abs=1e-5)


def test_positions_that_are_counted_from_the_padding_are_left_out(make_folder: Any) -> None:
    folder = make_folder("bert", pad_token="<pad>")
    config = RobertaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=20, num_labels=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(folder)
    assert "reads 18 tokens. Hint: use max_length=18 or less." in refused(folder, template="concat", max_length=20)
    long = ["a b c d " * 10]
    assert len(RewardModel(folder, template="concat", max_length=18)(long, ["e"])) == 1


@pytest.mark.parametrize("prompt", ["<eos> a b ", "<eos>a b "])
def test_a_prompt_that_begins_with_the_first_token_gets_no_second(make_folder: Any, prompt: str) -> None:
    folder = make_folder(begins_with_eos=True, bos_token="<eos>")
    once = RewardModel(folder, template="concat")(["a b "], ["c d"])
    assert RewardModel(folder, template="concat")([prompt], ["c d"]) == pytest.approx(once, abs=1e-6)


def test_half_precision_is_compared_at_its_own_rounding(make_folder: Any) -> None:
    rough = RewardModel(make_folder(), template="concat", dtype="bfloat16")
    rewards = score({"rough": rough, "cost": Signed(rough)}, PROMPTS * 4, RESPONSES * 4)
    check_batch_independence({"rough": rough, "cost": Signed(rough)}, PROMPTS * 4, RESPONSES * 4, rewards)
    assert rough.batch_tolerance == Signed(rough).batch_tolerance == 0.05


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("output", -1, "output is -1, but it must be an index or two indices"),
        ("output", [0, 1, 2], "output is [0, 1, 2], but it must be an index or two indices"),
        ("output", "0", "output is '0', but"),
        ("output", True, "output is True, but"),
        (
            "template",
            "chatml",
            "template is 'chatml', but it must be 'auto', 'chat', 'concat' or a text with {response}.",
        ),
        ("template", "{prompt}", "template is '{prompt}', but it must be"),
        ("template", None, "template is None, but it must be"),
        ("truncation_side", "middle", "truncation_side is 'middle', but it must be 'left' or 'right'."),
        ("max_length", 0, "max_length is 0, expected a whole number ≥ 1."),
        ("batch_size", 1.5, "batch_size is 1.5, expected a whole number ≥ 1."),
        ("device", "gpu", "device is 'gpu', which torch does not know."),
        ("dtype", "float31", "dtype is 'float31', which is not a floating-point type of torch."),
        ("dtype", torch.int64, "dtype is torch.int64, which is not a floating-point type of torch."),
        ("sign", 0, "sign is 0, but it must be 1 or -1."),
    ],
)
def test_wrong_options_are_refused_before_anything_loads(option: str, value: Any, message: str) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(ObjectiveError) as caught:
        RewardModel("owner/name", **options)
    assert str(caught.value).startswith(message)
    assert " Hint: " in str(caught.value)


def test_a_conversation_goes_through_the_chat_template_whole(make_folder: Any) -> None:
    folder = make_folder(chat_template=CHAT_TEMPLATE)
    asked = [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": [{"type": "text", "text": "d"}]},
    ]
    text = "user : a b assistant : c user : d assistant : e f"
    expected = [logits_alone(folder, text)[0].item()]
    assert RewardModel(folder)([asked], ["e f"]) == pytest.approx(expected, abs=1e-5)
    begun = [*asked, {"role": "assistant", "content": "e"}]  # that the policy was asked to continue
    assert RewardModel(folder)([begun], [" f"]) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ObjectiveError, match="template is 'concat', but a prompt is a conversation of 3 messages"):
        RewardModel(folder, template="concat")([asked], ["e"])
    with pytest.raises(PromptError, match="has role 'bot'"):
        RewardModel(folder)([[{"role": "bot", "content": "a"}]], ["e"])


def test_what_a_chat_template_refuses_is_said(make_folder: Any) -> None:
    folder = make_folder(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PromptError, match="refuses a conversation of user, assistant: roles must alternate"):
        RewardModel(folder)(["a"], ["b"])


def test_the_length_penalty_is_per_hundred_characters(make_folder: Any) -> None:
    folder = make_folder()
    plain = RewardModel(folder, template="concat")(PROMPTS, RESPONSES)
    expected = [reward - 2 * len(response) / 100 for reward, response in zip(plain, RESPONSES, strict=True)]
    assert RewardModel(folder, template="concat", length_penalty=2.0)(PROMPTS, RESPONSES) == pytest.approx(expected)
    cost = RewardModel(folder, template="concat", length_penalty=2.0, sign=-1)(PROMPTS, RESPONSES)
    assert cost == pytest.approx([-reward for reward in expected])
    with pytest.raises(ObjectiveError, match="length_penalty is nan, expected a finite number"):
        RewardModel(folder, length_penalty=float("nan"))


def trained_with(folder: Path, **settings: Any) -> Path:
    """Write into a folder's config what `train_reward_model` writes."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mavis_reward": settings}))
    return folder


def test_a_checkpoint_is_read_as_it_was_trained(make_folder: Any) -> None:
    plain = make_folder(chat_template=CHAT_TEMPLATE, name="plain")
    folder = trained_with(make_folder(chat_template=CHAT_TEMPLATE), template="concat", max_length=3, length_penalty=2.0)
    given: dict[str, Any] = {"template": "concat", "max_length": 3, "length_penalty": 2.0}
    as_trained = RewardModel(folder)
    assert as_trained(PROMPTS, RESPONSES) == RewardModel(plain, **given)(PROMPTS, RESPONSES)
    assert (as_trained.template, as_trained.max_length) == ("concat", 3)


def test_what_is_given_goes_before_what_the_checkpoint_was_trained_with(make_folder: Any) -> None:
    plain = make_folder(chat_template=CHAT_TEMPLATE, name="plain")
    folder = trained_with(make_folder(chat_template=CHAT_TEMPLATE), template="concat", max_length=3, length_penalty=2.0)
    given: dict[str, Any] = {"max_length": 4, "length_penalty": 0}
    expected = RewardModel(plain, template="concat", **given)(PROMPTS, RESPONSES)
    assert RewardModel(folder, **given)(PROMPTS, RESPONSES) == expected
    with pytest.warns(UserWarning, match="template is 'chat', but reward model .* was trained with 'concat'"):
        rewards = RewardModel(folder, template="chat", **given)(PROMPTS, RESPONSES)
    assert rewards == RewardModel(plain, template="chat", **given)(PROMPTS, RESPONSES)


def test_other_checkpoints_read_512_tokens_of_their_chat_template(make_folder: Any) -> None:
    objective = RewardModel(make_folder(chat_template=CHAT_TEMPLATE))
    objective(["a"], ["b"])
    assert (objective.template, objective.max_length) == ("chat", 512)


def test_a_model_of_fewer_positions_reads_as_many(make_folder: Any) -> None:
    folder = make_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    objective = RewardModel(folder, template="concat")
    assert len(objective(["a b c d " * 10], ["e"])) == 1
    assert objective.max_length == 8
