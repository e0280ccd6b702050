"""The recipe of the embedded policy, on a generated corpus and teacher."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mavis.errors import ConfigError, DataError, PolicyError
from mavis.policies.save import save_policy
from mavis.utils.files import read_json
from recipes.embedded_policy.corpus import (
    BOS,
    EOS,
    PAD,
    SEPARATOR,
    Story,
    normalise,
    read_shards,
    read_stories,
    sample_shards,
    split_tail,
    train_tokenizer,
)
from recipes.embedded_policy.main import main, run
from recipes.embedded_policy.pretrain import (
    IGNORED,
    Packing,
    Recipe,
    Shape,
    batch_rows,
    build_policy,
    encode,
    pretrain,
    targets_of,
    token_loss,
)

SHAPE = Shape(hidden=16, layers=1, heads=2, key_value_heads=1, intermediate=24, context=32)
VOCABULARY = 280


def recipe_of(**changes: Any) -> Recipe:
    tiny = {"steps": 12, "rows": 2, "micro_rows": 2, "length": 16, "warmup": 2, "save_every": 5}
    return Recipe(**{**tiny, "report_every": 4, "bfloat16": False, **changes})


@pytest.fixture(scope="module")
def stories() -> list[str]:
    rng = random.Random(0)
    people, things = ["Lily", "Tom", "Bob's dog", "Zoë"], ["ball", "“red” hat", "cake", "boat", "tree"]
    return [
        f"Once upon a time, {rng.choice(people)} had a {rng.choice(things)}.\nNumber {i} was big!" for i in range(80)
    ]


@pytest.fixture(scope="module")
def tokenizer(stories: list[str]) -> Any:
    return train_tokenizer(stories, VOCABULARY, SHAPE.context)


@pytest.fixture(scope="module")
def teacher(stories: list[str], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Random weights sample broken characters only, which are dropped; a few steps make it write words.
    policy = build_policy(tokenizer, SHAPE, seed=1)
    real = Packing(encode([Story(text) for text in stories], tokenizer), 32, 1)
    list(pretrain(policy, real, None, recipe_of(steps=40, rows=4, length=32)))
    folder = tmp_path_factory.mktemp("teacher") / "lm"
    save_policy(folder, policy, tokenizer)
    return folder


# --- text


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert once.split() == normalise(text).split()


def test_stories_are_read_in_order_and_a_cut_character_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_bytes(f"\n One  day. \r\n\nTwo.\n{SEPARATOR}\n{SEPARATOR}\nCafé".encode()[:-1])
    assert read_stories(file) == ["One day.\nTwo.", "Caf"]
    with pytest.raises(DataError, match="not a file"):
        read_stories(tmp_path / "none.txt")
    file.write_text(SEPARATOR)
    with pytest.raises(DataError, match="no story"):
        read_stories(file)


@given(
    st.lists(st.text("abé", min_size=1, max_size=9), min_size=2, max_size=30, unique=True),
    st.floats(0.01, 0.45),
)
def test_the_tail_is_held_out_and_disjoint_from_training(unique: list[str], share: float) -> None:
    stories = [unique[-1], *unique]  # a copy of a held-out story stands in the training part
    train, heldout = split_tail(stories, share)
    assert heldout == stories[-len(heldout) :]
    assert train == [story for story in unique if story not in heldout]
    assert train
    size = sum(len(story.encode()) for story in heldout)
    assert len(heldout) == 1 or size <= share * sum(len(story.encode()) for story in stories)


def test_something_is_left_to_train_on() -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        split_tail(["one"], 0.5)
    with pytest.raises(DataError, match="share is 1"):
        split_tail(["one", "two"], 1.0)


# --- tokenizer


@given(st.text())
@settings(max_examples=200)
def test_the_tokenizer_is_lossless(tokenizer: Any, text: str) -> None:
    if any(special in text for special in (BOS, EOS, PAD)):
        return
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_tokenizer_is_the_same_after_saving(tokenizer: Any, stories: list[str], teacher: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(teacher)
    assert loaded(stories).input_ids == tokenizer(stories).input_ids
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (BOS, EOS, PAD)
    assert loaded.padding_side == "left"
    assert loaded.clean_up_tokenization_spaces is False
    assert len(loaded) == VOCABULARY
    with pytest.raises(ConfigError, match="at least 259"):
        train_tokenizer(stories, 100, 32)
    with pytest.raises(ConfigError, match="the texts give"):
        train_tokenizer(["a"], 400, 32)


def test_an_unfinished_story_has_no_end(tokenizer: Any) -> None:
    whole, cut = encode([Story("Bob had a hat."), Story("Bob had a hat.", whole=False)], tokenizer)
    assert whole[-1] == tokenizer.eos_token_id
    assert whole[:-1].tolist() == cut.tolist()
    assert whole[0] == tokenizer.bos_token_id


# --- packing


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 7), st.integers(0, 3))
def test_packing_predicts_each_token_once_per_epoch(sizes: list[int], length: int, seed: int) -> None:
    ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    encoded = [torch.arange(a, b, dtype=torch.int16) for a, b in itertools.pairwise(ends)]
    if ends[-1] < 2:
        with pytest.raises(DataError):
            Packing(encoded, length, seed)
        return
    packing = Packing(encoded, length, seed)
    for epoch in (1, 0):
        rows = torch.stack([packing.row(epoch * packing.rows + i) for i in range(packing.rows)])
        predicted = rows[:, 1:][rows[:, 1:] != IGNORED].tolist()
        assert sorted([rows[0, 0].item(), *predicted]) == list(range(ends[-1]))
        assert torch.equal(rows[1:, 0], rows[:-1, -1])


def test_real_rows_are_evenly_spread() -> None:
    real = Packing([torch.zeros(50, dtype=torch.int16)], 4, 0)
    sampled = Packing([torch.ones(50, dtype=torch.int16)], 4, 0)
    recipe = Recipe(steps=16, rows=2, micro_rows=1, length=4, real_share=0.25, decay=0.5, decay_real_share=0.75)
    kinds = torch.cat([batch_rows(real, sampled, recipe, step)[:, 0] for step in range(16)])
    assert (kinds.view(8, 4) == 0).sum(1).tolist() == [1, 1, 1, 1, 3, 3, 3, 3]
    assert torch.equal(batch_rows(None, sampled, recipe, 0)[:, 0], torch.ones(2))
    assert torch.equal(batch_rows(real, None, recipe, 0)[:, 0], torch.zeros(2))
    with pytest.raises(DataError):
        batch_rows(None, None, recipe, 0)


@given(st.integers(1, 40), st.integers(1, 3), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_every_row_is_read_once(steps: int, rows: int, share: float, decay_share: float, decay: float) -> None:
    real, sampled = (Packing([torch.arange(500, dtype=torch.int16) + k * 1000], 1, 0) for k in range(2))
    recipe = Recipe(steps, rows, 1, 1, real_share=share, decay_real_share=decay_share, decay=decay, warmup=1)
    read = torch.cat([batch_rows(real, sampled, recipe, step)[:, 0] for step in range(steps)]).tolist()
    for offset in (0, 1000):
        mine = [token - offset for token in read if token // 1000 == offset // 1000]
        assert mine == list(range(len(mine)))


# --- teacher


def test_sampling_follows_the_teacher_and_its_seed(teacher: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from recipes.embedded_policy.corpus import load_teacher, sample_stories

    shard = {"rows": 4, "length": 30, "temperature": 1.0, "seed": 7}
    first, second = list(sample_shards(teacher, tmp_path / "a", range(2), **shard))
    again = list(sample_shards(teacher, tmp_path / "b", range(1, 2), **shard))
    assert first.read_bytes() != second.read_bytes() == again[0].read_bytes()
    assert read_shards([first, second])
    before = first.stat().st_mtime_ns
    assert list(sample_shards(teacher, tmp_path / "a", range(2), **shard)) == [first, second]
    assert first.stat().st_mtime_ns == before

    # At a temperature near 0 sampling is greedy decoding, which `generate` knows how to do.
    model, tokenizer = load_teacher(teacher)
    texts = sample_stories(model, tokenizer, 1, 30, 1e-6, torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    start = torch.tensor([[tokenizer.bos_token_id]])
    greedy = plain.generate(
        start, attention_mask=torch.ones_like(start), do_sample=False, max_length=30, eos_token_id=None
    )
    inside = [t for t in greedy[0].tolist() if t not in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    raw = tokenizer.decode(inside, skip_special_tokens=True)
    assert normalise(raw).startswith("".join(story.text for story in texts[:1]))
    with pytest.raises(PolicyError, match="not a folder"):
        load_teacher(tmp_path / "none")
    first.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read_shards([first])


# --- training


def test_a_resumed_run_equals_an_unbroken_one(tokenizer: Any, stories: list[str], tmp_path: Path) -> None:
    recipe = recipe_of()
    real = Packing(encode([Story(text) for text in stories], tokenizer), recipe.length, 1)
    whole = build_policy(tokenizer, SHAPE, seed=0)
    reports = list(pretrain(whole, real, None, recipe))
    assert [report.step for report in reports] == [4, 8, 12]
    assert reports[-1].loss < reports[0].loss

    interrupted = build_policy(tokenizer, SHAPE, seed=0)
    for report in pretrain(interrupted, real, None, recipe, tmp_path / "checkpoint"):
        if report.step == 8:  # the last checkpoint is that of step 5
            break
    resumed = build_policy(tokenizer, SHAPE, seed=99)
    again = list(pretrain(resumed, real, None, recipe, tmp_path / "checkpoint"))
    assert again[-1].step == 12
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=1e-6, atol=1e-7, msg=name)
    kinds = {file.suffix for file in (tmp_path / "checkpoint").rglob("*") if file.is_file()}
    assert kinds == {".json", ".safetensors"}

    other = build_policy(tokenizer, Shape(32, 1, 2, 1, 24, 32), seed=0)
    with pytest.raises(ConfigError, match="cannot be resumed"):
        next(pretrain(other, real, None, recipe, tmp_path / "checkpoint"))


def test_micro_rows_do_not_change_the_result(tokenizer: Any, stories: list[str]) -> None:
    real = Packing(encode([Story(text) for text in stories], tokenizer), 16, 1)
    found = []
    for micro in (1, 2):
        policy = build_policy(tokenizer, SHAPE, seed=0)
        list(pretrain(policy, real, None, recipe_of(steps=2, micro_rows=micro)))
        found.append(policy.model.embed_tokens.weight)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_rates_rise_stay_and_fall_to_zero() -> None:
    recipe = recipe_of(steps=10, warmup=2, decay=0.5)
    assert [recipe.rate(s) for s in range(10)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    for wrong in ({"steps": 0}, {"micro_rows": 3}, {"real_share": 2.0}, {"decay": -1.0}):
        with pytest.raises(ConfigError):
            recipe_of(**wrong)


def test_padding_has_no_loss(tokenizer: Any) -> None:
    policy = build_policy(tokenizer, SHAPE, seed=0)
    row = torch.tensor([[0, 5, 6, 7]])
    longer = torch.tensor([[0, 5, 6, 7, IGNORED, IGNORED]])
    torch.testing.assert_close(token_loss(policy, row), token_loss(policy, longer))


def test_bos_is_given_and_never_predicted(tokenizer: Any) -> None:
    row = torch.tensor([[0, 5, 0, 6, IGNORED]])
    assert targets_of(row, tokenizer.bos_token_id).tolist() == [[5, IGNORED, 6, IGNORED]]


# --- command


def test_the_command_runs_and_says_what_is_missing(stories: list[str], teacher: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config: Any = OmegaConf.load(Path(__file__).parents[2] / "recipes" / "embedded_policy" / "pretrain.yaml")
    del config["hydra"]
    with pytest.raises(ConfigError, match="corpus is not set"):
        run(config)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(f"\n{SEPARATOR}\n".join(stories), encoding="utf-8")
    tiny = {
        "corpus": str(corpus),
        "teacher": str(teacher),
        "work": str(tmp_path / "work"),
        "output": str(tmp_path / "policy"),
        "threads": torch.get_num_threads(),
        "sample": {"shards": 2, "rows": 3, "length": 16},
        "tokenizer": {"vocabulary": VOCABULARY},
        "shape": vars(SHAPE),
        "recipe": vars(recipe_of(steps=3, report_every=1)),
        "evaluate_every": 2,
        "evaluate_stories": 2,
    }
    config = OmegaConf.merge(config, tiny)
    policy = AutoModelForCausalLM.from_pretrained(run(config))
    assert policy.config.vocab_size == VOCABULARY
    assert len(list((tmp_path / "work" / "shards").glob("*.jsonl"))) == 2
    assert "is_local" not in (tmp_path / "policy" / "tokenizer_config.json").read_text()
    assert read_json(tmp_path / "work" / "run.json")["steps"] == 3
    with pytest.raises(ConfigError, match="stage is"):
        run(OmegaConf.merge(config, {"stage": "dance"}))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["mavis-pretrain", "hydra/job_logging=none", "hydra/hydra_logging=none"])
    with pytest.raises(SystemExit, match="2 processes were started, but this recipe runs in one. Hint"):
        main()
