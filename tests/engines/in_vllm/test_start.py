"""What is refused at start-up, by name and with the reason, and what a request is refused for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mavis import ValueModelCritic, embedded
from mavis.errors import CriticError, MavisError
from tests.engines.conftest import build_critic
from tests.engines.in_vllm.conftest import PROCESSOR, engine

pytest.importorskip("vllm")

from vllm import EngineArgs, SamplingParams, TokensPrompt
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.logits_processor import LogitsProcessor as LogitsLayer

from mavis.engines.vllm import CatchingLogitsLayer, MavisLogitsProcessor, _caught


def start(critic: Path | None, **options: Any) -> MavisLogitsProcessor:
    """Build the processor as an engine does before it loads its model."""
    more = {} if critic is None else {"additional_config": {"mavis_critic": str(critic)}}
    arguments = {"model": str(embedded.path()), "dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    config = EngineArgs(**(arguments | more | options)).create_engine_config()
    return MavisLogitsProcessor(config, torch.device("cpu"), False)


@pytest.fixture
def folder(critics: Callable[[str], tuple[Any, Path]]) -> Path:
    return critics("plain heads")[1]


def test_without_a_critic_the_engine_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAVIS_CRITIC", raising=False)
    with pytest.raises(CriticError, match="no critic is named.*Hint: set MAVIS_CRITIC=<critic folder>"):
        start(None)


def test_the_engines_own_setting_goes_before_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAVIS_CRITIC", str(tmp_path / "nowhere"))
    start(folder)
    with pytest.raises(CriticError, match="nowhere.*does not exist"):
        start(None)
    monkeypatch.setenv("MAVIS_CRITIC", str(folder))
    start(None)
    with pytest.raises(CriticError, match="elsewhere.*does not exist"):
        start(tmp_path / "elsewhere")


def other_model(tmp_path: Path, **changes: Any) -> Path:
    """Write a model that is the embedded one but for its weights and what is changed."""
    config = LlamaConfig.from_pretrained(embedded.path(), **changes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("changes", [{"vocab_size": 2176}, {"hidden_size": 64, "num_attention_heads": 2}])
def test_a_model_of_another_shape_is_refused(folder: Path, tmp_path: Path, changes: dict[str, int]) -> None:
    with pytest.raises(CriticError, match="hidden size 128 and 2048 tokens, but the served model"):
        start(folder, model=str(other_model(tmp_path, **changes)), skip_tokenizer_init=True)


def test_a_model_with_other_weights_warns(folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has the shape but not the weights of the policy that critic"):
        start(folder, model=str(other_model(tmp_path)), skip_tokenizer_init=True)


def test_a_value_model_is_refused_by_name(story: tuple[Any, Any], tmp_path: Path) -> None:
    ValueModelCritic.for_policy(story[0], ["good"]).save(tmp_path / "critic")
    with pytest.raises(CriticError, match="is a value_model, whose trunk keeps keys.*Hint: .*mavis distill"):
        start(tmp_path / "critic")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
        ({"enable_lora": True}, "enable_lora is True"),
    ],
)
def test_what_a_tilt_cannot_follow_is_refused(folder: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(CriticError, match=named):
        start(folder, **options)


def test_a_memory_wants_every_token_to_be_seen(critics: Callable[[str], tuple[Any, Path]]) -> None:
    _, folder = critics("memory")
    config = EngineArgs(
        model=str(embedded.path()), dtype="float32", additional_config={"mavis_critic": str(folder)}
    ).create_engine_config()
    MavisLogitsProcessor(config, torch.device("cpu"), False)
    config.scheduler_config.async_scheduling = True
    with pytest.raises(CriticError, match="async_scheduling is on"):
        MavisLogitsProcessor(config, torch.device("cpu"), False)


def test_vllm_itself_refuses_speculative_decoding_and_pooling(folder: Path) -> None:
    from vllm.v1.sample.logits_processor import build_logitsprocs

    config = EngineArgs(
        model=str(embedded.path()),
        dtype="float32",
        max_model_len=256,
        additional_config={"mavis_critic": str(folder)},
        speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2},
    ).create_engine_config()
    with pytest.raises(ValueError, match="not supported when speculative decoding"):
        build_logitsprocs(config, torch.device("cpu"), False, False, (PROCESSOR,))
    with pytest.raises(ValueError, match="Pooling models do not support"):
        build_logitsprocs(config, torch.device("cpu"), False, True, (PROCESSOR,))


def test_the_layer_that_models_are_built_with_is_the_one_that_catches() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        assert type(LogitsLayer(8)) is CatchingLogitsLayer


@pytest.fixture(scope="module")
def served(critics: Callable[[str], tuple[Any, Path]]) -> Iterator[Any]:
    with engine(critics("memory")[1]) as llm:
        yield llm


@pytest.mark.parametrize(
    ("extra_args", "named"),
    [
        ({"mavis_weights": "goood=1", "mavis_beta": 1}, "mavis_weights: weights names objective 'goood'"),
        ({"mavis_weights": "good=1", "mavis_beta": -1}, "mavis_beta: "),
        ({"mavis_weights": "good=1", "mavis_target_kl": 1}, "mavis_target_kl: "),
        ({"mavis_weights": "good=1", "mavis_beta": 1, "mavis_top_k": 3000}, "mavis_top_k is 3000"),
        ({"mavis_weight": "good=1"}, "mavis_weight is no argument"),
    ],
)
def test_a_mistake_is_refused_naming_the_argument_and_the_engine_goes_on(
    served: Any, prompts: list[list[int]], extra_args: dict[str, Any], named: str
) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        served.generate(
            TokensPrompt(prompt_token_ids=prompts[0]), SamplingParams(extra_args=extra_args), use_tqdm=False
        )
    assert named in str(caught.value)
    good = SamplingParams(max_tokens=2, extra_args={"mavis_weights": "good=1", "mavis_beta": 1})
    [output] = served.generate(TokensPrompt(prompt_token_ids=prompts[0]), good, use_tqdm=False)
    assert len(output.outputs[0].token_ids) <= 2


def test_rows_that_do_not_match_are_an_error_and_never_a_guess(
    served: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mavis.engines.batch import TiltedBatch

    batch = TiltedBatch(build_critic(embedded.load()[0], ("good", "short")))
    monkeypatch.setattr(TiltedBatch, "any_tilted", True)
    batch.size = 2
    processor = MavisLogitsProcessor.__new__(MavisLogitsProcessor)
    processor._batch = batch
    for states in (None, torch.zeros(3, 128)):
        _caught.states = states
        with pytest.raises(MavisError, match="the engine gives 2 rows of logits for 2 requests"):
            processor.apply(torch.zeros(2, 2048))
