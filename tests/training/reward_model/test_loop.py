"""Training reward models on a preference that tiny models can learn, and how it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel

from mavis.data import Pair
from mavis.errors import DataError, MavisError, ObjectiveError, PromptError, TrainingError
from mavis.rewards import RewardModel
from mavis.training import RewardModelReport, RewardModelSettings, load_backbone, train_reward_model
from mavis.training.reward_model import fit
from tests.factories import word_policy, word_tokenizer
from tests.lock_holder import locked_elsewhere

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
SETTINGS = RewardModelSettings(epochs=4, learning_rate=5e-3, lora_rank=4, held_out=0.2, save_every=7, max_length=64)


def tokenizer_of(chat: bool = False) -> Any:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer


def bert(masked: bool = True) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(word_tokenizer()), max_position_embeddings=64, pad_token_id=0, **sizes)
    return (BertForMaskedLM(config) if masked else BertModel(config)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    size = len(word_tokenizer())
    return GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=1, n_head=2, n_positions=64)).eval()


# If a response were chosen at random, 50 of 50 independent pairs would have to be right by luck in order to reach 0.9:
# the chance of 45 or more is 2e-9.
@pytest.mark.parametrize(
    ("backbone", "rank", "chat"),
    [(word_policy, 4, True), (word_policy, 0, False), (bert, 4, False), (gpt2, 0, True)],
    ids=["llama with adapters", "llama", "bert", "gpt2"],
)
def test_a_preference_is_learnt_and_the_folder_is_an_objective(
    make_pairs: Any, tmp_path: Path, backbone: Any, rank: int, chat: bool
) -> None:
    model = backbone()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    settings = replace(SETTINGS, lora_rank=rank)
    report = train_reward_model(model, tokenizer_of(chat), make_pairs(250, chat=chat), tmp_path / "run", settings)
    assert (report.training_pairs, report.held_out_pairs, report.held_out_prompts) == (200, 50, 50)
    assert report.accuracy >= 0.9
    assert 0 < report.accuracy_error < 0.08
    assert report.log_loss < 0.5
    assert report.gain > 3 * report.gain_error
    assert sum(row["pairs"] for row in report.reliability) == 50
    assert report.template == ("chat" if chat else "concat")
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    objective = RewardModel(report.folder, template=report.template, max_length=64)
    fresh = make_pairs(100, chat=chat, seed=9)
    prompts = [pair.prompt for pair in fresh]
    good, bad = objective(prompts, [p.chosen for p in fresh]), objective(prompts, [p.rejected for p in fresh])
    assert sum(g > b for g, b in zip(good, bad, strict=True)) >= 80  # 6e-10 by chance
    assert json.loads((tmp_path / "run" / "report.json").read_text())["accuracy"] == report.accuracy
    assert not [path for path in (tmp_path / "run").rglob("*.json") if str(tmp_path) in path.read_text()]
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"run.json", "report.json", "model"}
    assert not any(word in name for name in objective._loaded[0].state_dict() for word in ("lora", "original"))  # type: ignore[index]


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    make_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(folder: str, **more: Any) -> Any:
        run = tmp_path / folder
        return train_reward_model(
            word_policy(), tokenizer_of(True), make_pairs(60, chat=True), run, replace(SETTINGS, batch_size=8), **more
        )

    whole = train("whole")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "steps" and done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("cut", progress=stop)
    assert json.loads((tmp_path / "cut" / "checkpoint" / "state.json").read_text())["step"] == 7
    assert not (tmp_path / "cut" / "model").exists()
    steps: list[int] = []
    torch.manual_seed(123)  # what else is drawn plays no part
    resumed = train("cut", progress=lambda stage, done, total: steps.append(done) if stage == "steps" else None)
    assert steps[0] == 7
    for name in ("model.safetensors", "config.json"):
        files = [tmp_path / folder / "model" / name for folder in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    assert resumed.accuracy == whole.accuracy
    monkeypatch.setattr(fit, "fit_pairs", None)
    assert train("cut") == resumed


def test_a_finished_run_that_was_moved_names_its_model_where_it_is(make_pairs: Any, tmp_path: Path) -> None:
    def train(folder: Path) -> RewardModelReport:
        torch.manual_seed(0)
        settings = replace(SETTINGS, epochs=1)
        return train_reward_model(bert(), tokenizer_of(), make_pairs(50), folder, settings)

    first = train(tmp_path / "run")
    assert first.folder == str(tmp_path / "run" / "model")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert train(tmp_path / "moved") == replace(first, folder=str(tmp_path / "moved" / "model"))


def test_a_run_that_was_begun_before_there_was_a_choice_of_precision_resumes(make_pairs: Any, tmp_path: Path) -> None:
    train_reward_model(word_policy(), tokenizer_of(), make_pairs(60), tmp_path / "run", SETTINGS)
    assert "precision" not in json.loads((tmp_path / "run" / "run.json").read_text())["settings"]


def test_micro_batches_only_save_memory(make_pairs: Any, tmp_path: Path) -> None:
    def scores(micro: int | None) -> list[float]:
        settings = replace(SETTINGS, micro_pairs=micro, epochs=1)
        report = train_reward_model(word_policy(), tokenizer_of(), make_pairs(50), tmp_path / f"{micro}", settings)
        return RewardModel(report.folder, template="concat", max_length=64)(["the dog "] * 2, ["good", "bad cat"])

    assert scores(3) == pytest.approx(scores(None), abs=1e-3)


# By chance 40 of 50 pairs would be right once in 80,000 runs.
def test_half_precision_is_that_of_the_products_alone(
    make_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: set[torch.dtype] = set()
    linear = torch.nn.functional.linear

    def recorded(*given: Any) -> torch.Tensor:
        product = linear(*given)
        products.add(product.dtype)
        return product

    def train(precision: str) -> Any:
        products.clear()
        settings = replace(SETTINGS, precision=precision)
        return train_reward_model(word_policy(), tokenizer_of(), make_pairs(250), tmp_path / precision, settings)

    monkeypatch.setattr(torch.nn.functional, "linear", recorded)
    whole = train("float32")
    assert products == {torch.float32}
    half = train("bfloat16")
    assert torch.bfloat16 in products
    saved = load_file(tmp_path / "bfloat16" / "model" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert half.accuracy >= 0.8
    assert half.log_loss == pytest.approx(whole.log_loss, abs=0.1)


def test_a_length_penalty_takes_length_out_of_the_scores(make_pairs: Any, tmp_path: Path) -> None:
    pairs = make_pairs(300, longer=True)
    plain = train_reward_model(word_policy(), tokenizer_of(), pairs, tmp_path / "plain", SETTINGS)
    assert plain.length_correlation > 0.5  # type: ignore[operator]
    assert plain.length_penalty == 0
    assert (plain.baseline, plain.baseline_accuracy) == ("longer", plain.longer_accuracy)
    settings = replace(SETTINGS, length_penalty="auto")
    controlled = train_reward_model(word_policy(), tokenizer_of(), pairs, tmp_path / "controlled", settings)
    # The standard error of a correlation of 60 pairs is 0.13; four of them are passed once in 15,000 runs.
    assert abs(controlled.length_correlation) < 0.52  # type: ignore[arg-type]
    assert abs(controlled.length_correlation) < plain.length_correlation / 2  # type: ignore[arg-type,operator]
    assert controlled.length_penalty == pytest.approx(plain.length_slope, rel=0.5)
    said = "good " * 20
    scores = [
        RewardModel(report.folder, template="concat", max_length=64)(["the "], [said])[0]
        for report in (plain, controlled)
    ]
    assert scores[1] == pytest.approx(scores[0] - controlled.length_penalty, abs=1e-4)  # 100 characters
    fixed = replace(SETTINGS, length_penalty=2.0, epochs=1)
    assert train_reward_model(word_policy(), tokenizer_of(), pairs, tmp_path / "fixed", fixed).length_penalty == 2


def test_label_smoothing_makes_scores_less_sure(make_pairs: Any, tmp_path: Path) -> None:
    def stated(smoothing: float) -> float:
        settings = replace(SETTINGS, label_smoothing=smoothing, epochs=6)
        run = tmp_path / f"{smoothing}"
        report = train_reward_model(word_policy(), tokenizer_of(), make_pairs(150), run, settings)
        return sum(row["stated"] * row["pairs"] for row in report.reliability) / report.held_out_pairs

    assert stated(0.3) < stated(0.0) - 0.1


def test_overlong_texts_lose_their_beginning_and_are_counted(make_pairs: Any, tmp_path: Path) -> None:
    pairs = [Pair("the dog " * 100 + str(n), p.chosen, p.rejected) for n, p in enumerate(make_pairs(50))]
    settings = replace(SETTINGS, max_length=512, epochs=1)
    report = train_reward_model(word_policy(), tokenizer_of(), pairs, tmp_path / "run", settings)
    assert (report.cut_texts, report.max_length) == (100, 128)  # what the policy can read
    objective = RewardModel(report.folder, template="concat", max_length=128)
    assert objective(["cat " * 150], ["good"]) == objective(["dog " * 10 + "cat " * 150], ["good"])


def test_pairs_that_read_the_same_are_left_out(make_pairs: Any, tmp_path: Path) -> None:
    same = [Pair("the ", "xylophone", "zither"), Pair("a ", "one", "xylophone")]
    with pytest.warns(UserWarning, match="1 of 52 pairs are left out: their sides have the same tokens"):
        report = train_reward_model(
            word_policy(), tokenizer_of(), [*make_pairs(50), *same], tmp_path / "run", replace(SETTINGS, epochs=1)
        )
    assert report.training_pairs + report.held_out_pairs == 51


def refused(tmp_path: Path, pairs: Any, *, backbone: Any = None, tokenizer: Any = None, **options: Any) -> MavisError:
    with pytest.raises(MavisError) as caught:
        train_reward_model(
            backbone or word_policy(),
            tokenizer or tokenizer_of(),
            pairs,
            tmp_path / "run",
            replace(SETTINGS, **options),
        )
    assert not (tmp_path / "run" / "model").exists()
    return caught.value


def test_mistakes_are_refused(make_pairs: Any, tmp_path: Path) -> None:
    pairs = make_pairs(40)
    assert isinstance(refused(tmp_path, []), DataError)
    error = refused(tmp_path, make_pairs(40, chat=True))
    assert isinstance(error, PromptError)
    assert error.message.startswith("40 of 40 prompts are conversations and template is 'auto', but the backbone's")
    error = refused(tmp_path, make_pairs(40, chat=True), template="concat")
    assert "template is 'concat', but a prompt is a conversation of 1 messages" in error.message
    error = refused(tmp_path, pairs[:20], held_out=0.1)
    assert isinstance(error, TrainingError)
    assert "held_out is 0.1, which holds out 2 of 20 pairs with 20 different first turns" in error.message
    error = refused(tmp_path, [replace(pair, prompt="the ") for pair in pairs])
    assert "holds out 40 of 40 pairs with 1 different first turns" in error.message
    error = refused(tmp_path, [Pair("the ", "xylophone", "zither")])
    assert "all 1 pairs have two sides of the same" in error.message
    error = refused(tmp_path, pairs, learning_rate=1e30, lora_rank=0)
    assert isinstance(error, TrainingError)
    assert "lower learning_rate, which is 1e+30" in error.hint


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_backbones_that_cannot_be_trained_are_refused(make_pairs: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    pairs = make_pairs(40)
    adapted = get_peft_model(word_policy(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    error = refused(tmp_path, pairs, backbone=adapted)
    assert isinstance(error, ObjectiveError)
    assert "carries adapters" in error.message
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    mamba = MambaForCausalLM(MambaConfig(vocab_size=len(word_tokenizer()), **sizes))
    assert "backbone MambaForCausalLM cannot be a reward model" in refused(tmp_path, pairs, backbone=mamba).message
    with pytest.raises(ObjectiveError, match="backbone is 'nowhere/here', which"):
        load_backbone("nowhere/here")


def test_another_run_in_the_folder_is_refused(make_pairs: Any, tmp_path: Path) -> None:
    def train(count: int, **options: Any) -> Any:
        settings = replace(SETTINGS, epochs=1, **options)
        return train_reward_model(word_policy(), tokenizer_of(), make_pairs(count), tmp_path / "run", settings)

    train(50)
    with pytest.raises(DataError, match=r"holds a reward model with different settings\.label_smoothing\."):
        train(50, label_smoothing=0.1)
    with pytest.raises(DataError, match=r"holds a reward model with different pairs\."):
        train(51)
    with locked_elsewhere(tmp_path / "other"):
        shutil.rmtree(tmp_path / "run")
        with locked_elsewhere(tmp_path / "run"), pytest.raises(DataError, match="is in use by process"):
            train(50)


def test_backbones_in_folders_have_no_head_and_are_the_same_each_time(tmp_path: Path) -> None:
    for name, model in {"policy": word_policy(), "encoder": bert(), "bare": bert(masked=False)}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer_of().save_pretrained(tmp_path / name)
        (one, tokenizer), (other, _) = load_backbone(tmp_path / name), load_backbone(str(tmp_path / name))
        assert tokenizer.get_vocab() == word_tokenizer().get_vocab()
        for key, weight in one.state_dict().items():
            assert torch.equal(weight, other.state_dict()[key]), (name, key)
        embeddings = (each.get_input_embeddings().weight for each in (one, model))
        assert torch.equal(*embeddings)


def test_prefixes_of_a_trained_model_are_scored(make_pairs: Any, tmp_path: Path) -> None:
    report = train_reward_model(
        word_policy(), tokenizer_of(), make_pairs(250), tmp_path / "run", replace(SETTINGS, length_penalty=1.0)
    )
    objective = RewardModel(report.folder, template="concat", max_length=64)
    found = objective.score_prefixes(["the dog was "], ["the good cat"])[0]
    alone = objective(["the dog was "] * 3, ["the", "the good", "the good cat"])
    assert found == pytest.approx(alone, abs=1e-5)
