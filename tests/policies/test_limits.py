"""Token ids without an embedding and positions beyond a learnt table are refused before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CodeGenConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    OPTConfig,
)

import mavis
from mavis.errors import ConfigError, DecodingError, MavisError, PolicyError
from mavis.evaluation import EvaluationSettings
from mavis.policies import load_policy, save_policy
from mavis.policies.limits import embedding_rows, learnt_positions
from mavis.rollouts import RolloutPlan, RolloutSettings, collect
from mavis.training import (
    AlignSettings,
    DistillSettings,
    FitSettings,
    ImprovementSettings,
    RegressionSettings,
    align,
    distill,
    improve,
)
from tests.factories import SPECIAL, WORDS, llama_config, tiny_llama, word_policy, word_tokenizer

WORDS_KNOWN = len(SPECIAL) + len(WORDS)
POSITIONS = 16
NAMES = ["short"]


def short(prompts: Any, responses: Any) -> list[float]:
    return [-float(len(response)) for response in responses]


def with_positions(seed: int = 0) -> Any:
    """A policy that has learnt `POSITIONS` positions."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": POSITIONS}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    policy: Any = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=WORDS_KNOWN, **sizes, **ends))
    return policy.eval().requires_grad_(False)


def with_added_padding() -> Any:
    """A tokenizer whose padding the policy has no embedding of."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == WORDS_KNOWN
    return tokenizer


def with_added_word() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["hello"])
    return tokenizer


def critic_for(policy: Any) -> Any:
    return mavis.HiddenStateCritic.for_policy(policy, NAMES, hidden=4, rank=4, composition="independent")


def trunk_critic_for(policy: Any) -> Any:
    return mavis.ValueModelCritic.for_policy(
        policy, NAMES, backbone=with_positions().config, hidden=4, rank=4, composition="independent"
    )


Run = Callable[[Any, Any, Any, list[str], int, Path], Any]


def run_collect(policy: Any, tokenizer: Any, critic: Any, prompts: list[str], length: int, folder: Path) -> Any:
    plan = RolloutPlan(prompts, torch.ones(len(prompts), 1).double(), torch.ones(len(prompts)).double())
    settings = RolloutSettings(max_new_tokens=length, top_k=None)
    return list(collect(policy, tokenizer, {"short": short}, plan, folder, settings, critic=critic))


def run_improve(policy: Any, tokenizer: Any, critic: Any, prompts: list[str], length: int, folder: Path) -> Any:
    settings = ImprovementSettings(
        composition="independent",
        iterations=1,
        rollouts=8,
        calibration_samples=1,
        sampling=RolloutSettings(max_new_tokens=length),
        fit=FitSettings(epochs=1),
    )
    return list(improve(policy, tokenizer, critic, {"short": short}, prompts, folder, settings))


def run_distill(policy: Any, tokenizer: Any, critic: Any, prompts: list[str], length: int, folder: Path) -> Any:
    settings = DistillSettings(
        rollouts=4, sampling=RolloutSettings(max_new_tokens=length), fit=RegressionSettings(epochs=1), candidates=4
    )
    return distill(critic_for(policy), critic, policy, tokenizer, prompts, folder, settings)


def run_align(policy: Any, tokenizer: Any, critic: Any, prompts: list[str], length: int, folder: Path) -> Any:
    settings = AlignSettings(steps=0, reference_samples=8, evaluation_samples=2, max_new_tokens=length)
    return align(policy, tokenizer, {"short": short}, [1.0], prompts, folder, settings)


def run_evaluate(policy: Any, tokenizer: Any, critic: Any, prompts: list[str], length: int, folder: Path) -> Any:
    sampling = RolloutSettings(max_new_tokens=length, top_k=None)
    settings = EvaluationSettings(1, (1.0,), samples=2, reference_samples=4, speed_repeats=0, sampling=sampling)
    return mavis.evaluate(policy, tokenizer, critic, {"short": short}, prompts, folder, settings)


def run_respond(policy: Any, tokenizer: Any, critic: Any, prompts: list[str], length: int, folder: Path) -> Any:
    return mavis.respond(policy, tokenizer, prompts, critic=critic, weights=[1.0], beta=1.0, max_new_tokens=length)


RUNS: list[Run] = [run_collect, run_improve, run_distill, run_align, run_evaluate, run_respond]
WITH_CRITIC = [run for run in RUNS if run is not run_align]


@pytest.fixture(params=RUNS, ids=lambda run: run.__name__)
def run(request: pytest.FixtureRequest) -> Any:
    return request.param


def refusal(run: Callable[[], Any], folder: Path, kind: type[MavisError]) -> str:
    with pytest.raises(kind) as caught:
        run()
    assert not folder.exists()  # nothing was sampled, and no folder is claimed
    return str(caught.value)


class TestTokens:
    def test_padding_without_embedding_is_refused_before_sampling(self, run: Run, tmp_path: Path) -> None:
        policy, tokenizer, folder = word_policy(), with_added_padding(), tmp_path / "run"
        prompts = ["the dog", "a"]
        error = refusal(lambda: run(policy, tokenizer, critic_for(policy), prompts, 4, folder), folder, PolicyError)
        assert f"pads with token {WORDS_KNOWN} ('[PAD]')" in error
        assert f"embeddings of {WORDS_KNOWN} tokens" in error
        assert "tokenizer.pad_token = tokenizer.eos_token" in error

    def test_a_word_without_embedding_is_refused_before_sampling(self, run: Run, tmp_path: Path) -> None:
        policy, tokenizer, folder = word_policy(), with_added_word(), tmp_path / "run"
        prompts = ["the dog"] * 40 + ["hello"]
        error = refusal(lambda: run(policy, tokenizer, critic_for(policy), prompts, 4, folder), folder, PolicyError)
        assert f"token {WORDS_KNOWN} ('hello')" in error

    def test_resized_embeddings_are_accepted(self, run: Run, tmp_path: Path) -> None:
        policy, tokenizer = word_policy(), with_added_word()
        policy.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        run(policy, tokenizer, critic_for(policy), ["the dog", "hello"], 4, tmp_path / "run")

    @pytest.mark.parametrize("wrong", [40, -1])
    def test_generate_names_an_id_without_embedding(self, wrong: int) -> None:
        policy = tiny_llama()
        with pytest.raises(DecodingError, match=f"token id {wrong}, .* embeddings of 40 tokens"):
            mavis.generate(policy, torch.tensor([[1, wrong, 3]]), critic=critic_for(policy), weights=[1.0], beta=1.0)

    def test_generate_names_padding_without_embedding_where_responses_end_apart(self) -> None:
        policy = tiny_llama(pad_token_id=None, eos_token_id=2)
        policy.generation_config.pad_token_id = 40
        critic, ids = critic_for(policy), torch.tensor([[1, 3], [1, 5]])
        arguments: dict[str, Any] = {"critic": critic, "weights": [1.0], "beta": 1.0, "max_new_tokens": 4}
        assert len(mavis.generate(policy, ids[:1], **arguments)) == 1  # nothing follows a single response
        with pytest.raises(DecodingError, match="pad_token_id .* is 40"):
            mavis.generate(policy, ids, **arguments)
        assert len(mavis.generate(policy, ids, pad_token_id=0, **arguments)) == 2

    def test_rollouts_pad_with_the_tokenizer_where_the_policy_has_no_embedding_of_its_own(self, tmp_path: Path) -> None:
        policy, tokenizer = word_policy(), word_tokenizer()
        prompts = ["the dog", "a"] * 8
        expected = run_collect(policy, tokenizer, critic_for(policy), prompts, 12, tmp_path / "one")
        policy.generation_config.pad_token_id = WORDS_KNOWN
        shards = run_collect(policy, tokenizer, critic_for(policy), prompts, 12, tmp_path / "other")
        assert [shard["response"] for shard in shards] == [shard["response"] for shard in expected]

    def test_a_loaded_policy_pads_with_what_it_has_an_embedding_of(self, tmp_path: Path) -> None:
        save_policy(tmp_path / "policy", word_policy(), with_added_padding())
        policy, tokenizer = load_policy(tmp_path / "policy")
        assert tokenizer.pad_token_id == tokenizer.eos_token_id < embedding_rows(policy)


class TestPositions:
    PROMPTS = ("the dog", "a " * 9 + "dog")  # of 2 and of 10 tokens

    def test_rollouts_beyond_learnt_positions_are_refused_before_sampling(self, run: Run, tmp_path: Path) -> None:
        policy, folder = with_positions(), tmp_path / "run"
        critic = critic_for(policy)
        error = refusal(
            lambda: run(policy, word_tokenizer(), critic, list(self.PROMPTS), 7, folder), folder, ConfigError
        )
        assert "max_new_tokens is 7 and the longest prompt has 10 tokens" in error
        assert "policy has learnt 16 positions" in error

    def test_rollouts_up_to_the_last_position_run(self, run: Run, tmp_path: Path) -> None:
        policy = with_positions()
        run(policy, word_tokenizer(), critic_for(policy), list(self.PROMPTS), 6, tmp_path / "run")

    @pytest.mark.parametrize("run", WITH_CRITIC, ids=lambda run: run.__name__)
    def test_the_positions_of_a_value_model_count_too(self, run: Run, tmp_path: Path) -> None:
        policy, folder = word_policy(), tmp_path / "run"
        critic, prompts = trunk_critic_for(policy), list(self.PROMPTS)
        error = refusal(lambda: run(policy, word_tokenizer(), critic, prompts, 7, folder), folder, ConfigError)
        assert "value model has learnt 16 positions" in error
        run(policy, word_tokenizer(), critic, prompts, 6, folder)

    def test_generate_refuses_the_first_length_that_does_not_fit(self) -> None:
        policy = with_positions()
        policy.generation_config.eos_token_id = None
        inputs = word_tokenizer()(list(self.PROMPTS), return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        arguments: dict[str, Any] = {"critic": critic_for(policy), "weights": [1.0], "beta": 1.0}
        assert mavis.generate(policy, inputs, max_new_tokens=7, **arguments).shape == (2, 17)
        with pytest.raises(DecodingError, match=r"max_new_tokens is 8 and the longest prompt has 10 .* 16 positions"):
            mavis.generate(policy, inputs, max_new_tokens=8, **arguments)
        with pytest.raises(DecodingError, match="max_new_tokens is 8"):
            mavis.generate(policy, inputs, max_length=18, **arguments)

    def test_padding_has_no_position(self) -> None:
        policy = with_positions()
        policy.generation_config.eos_token_id = None
        ids, mask = torch.zeros(1, 14, dtype=torch.long), torch.zeros(1, 14, dtype=torch.long)
        ids[:, -2:], mask[:, -2:] = 7, 1
        arguments: dict[str, Any] = {"critic": critic_for(policy), "weights": [1.0], "beta": 1.0}
        inputs = {"input_ids": ids, "attention_mask": mask}
        assert mavis.generate(policy, inputs, max_new_tokens=15, **arguments).shape == (1, 29)

    @pytest.mark.parametrize("readout", ["token", "candidates"])
    def test_generate_counts_the_positions_of_a_value_model(self, readout: Any) -> None:
        policy = tiny_llama(vocab_size=WORDS_KNOWN, eos_token_id=None)
        critic = mavis.ValueModelCritic.for_policy(
            policy, NAMES, backbone=with_positions().config, readout=readout, composition="independent"
        )
        arguments: dict[str, Any] = {"critic": critic, "weights": [1.0], "beta": 1.0, "top_k": 4}
        ids = torch.full((1, 10), 7)
        assert mavis.generate(policy, ids, max_new_tokens=6, **arguments).shape == (1, 16)
        with pytest.raises(DecodingError, match="value model has learnt 16 positions"):
            mavis.generate(policy, ids, max_new_tokens=7, **arguments)


SMALL: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES: dict[str, Any] = {
    "gpt2": GPT2Config(n_positions=POSITIONS, n_layer=1, n_embd=16, n_head=2, **SMALL),
    "bigcode": GPTBigCodeConfig(n_positions=POSITIONS, n_layer=1, n_embd=16, n_head=2, **SMALL),
    "gptj": GPTJConfig(n_positions=POSITIONS, n_layer=1, n_embd=16, n_head=2, rotary_dim=4, **SMALL),
    "codegen": CodeGenConfig(n_positions=POSITIONS, n_layer=1, n_embd=16, n_head=4, rotary_dim=4, **SMALL),
    "neo": GPTNeoConfig(
        max_position_embeddings=POSITIONS, num_layers=1, attention_types=[[["global"], 1]], hidden_size=16,
        num_heads=2, **SMALL,
    ),
    "opt": OPTConfig(
        max_position_embeddings=POSITIONS, num_hidden_layers=1, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16,
        num_attention_heads=2, **SMALL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_family_with_a_table_reads_its_positions_and_no_more(family: str) -> None:
    torch.manual_seed(0)
    policy: Any = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    assert learnt_positions(policy) == POSITIONS
    policy(torch.full((1, POSITIONS), 7))
    with pytest.raises((IndexError, RuntimeError)):
        policy(torch.full((1, POSITIONS + 1), 7))


@torch.no_grad()
def test_rotary_positions_have_no_table() -> None:
    policy = tiny_llama(max_position_embeddings=POSITIONS)
    assert llama_config(max_position_embeddings=POSITIONS).max_position_embeddings == POSITIONS
    assert learnt_positions(policy) is None
    policy(torch.full((1, POSITIONS + 1), 7))
