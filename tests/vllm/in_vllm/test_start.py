"""Unsupported engines and critics are refused at start-up, and invalid requests when they arrive."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mavis import ValueModelCritic, embedded
from mavis.errors import CriticError, MavisError
from tests.vllm.conftest import build_critic
from tests.vllm.in_vllm.conftest import PROCESSOR, engine

pytest.importorskip("vllm")

from vllm import EngineArgs, SamplingParams, TokensPrompt
from vllm.config import KVTransferConfig
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.logits_processor import LogitsProcessor as LogitsLayer
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.sample.logits_processor import BatchUpdate

from mavis.vllm.logits_processor import CapturingLogitsLayer, MavisLogitsProcessor, _captured


def start(critic: Path | None, **options: Any) -> MavisLogitsProcessor:
    """Build the processor as an engine does, before it loads its model."""
    more = {} if critic is None else {"additional_config": {"mavis_critic": str(critic)}}
    arguments = {"model": str(embedded.path()), "dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    config = EngineArgs(**(arguments | more | options)).create_engine_config()
    return MavisLogitsProcessor(config, torch.device("cpu"), False)


@pytest.fixture
def folder(critics: Callable[[str], tuple[Any, Path]]) -> Path:
    return critics("plain heads")[1]


def test_without_a_critic_the_engine_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAVIS_CRITIC", raising=False)
    with pytest.raises(CriticError, match="no critic is configured.*Hint: set MAVIS_CRITIC=<folder>"):
        start(None)


def test_the_engines_own_setting_takes_precedence_over_the_environment(
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
    """Save a random model with the configuration of the embedded one, except for some changes."""
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


def test_a_value_model_that_reads_every_candidate_is_refused_by_name(story: tuple[Any, Any], tmp_path: Path) -> None:
    ValueModelCritic.for_policy(story[0], ["good"], readout="candidates").save_pretrained(tmp_path / "critic")
    with pytest.raises(CriticError, match="is a value_model with readout 'candidates'.*Hint: .*mavis distill"):
        start(tmp_path / "critic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
        ({"enable_lora": True}, "enable_lora is True"),
    ],
)
def test_unsupported_engine_features_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CriticError, match=message):
        start(folder, **options)


def test_a_critic_with_a_memory_refuses_features_that_hide_tokens(critics: Callable[[str], tuple[Any, Path]]) -> None:
    _, folder = critics("memory")
    config = EngineArgs(
        model=str(embedded.path()), dtype="float32", additional_config={"mavis_critic": str(folder)}
    ).create_engine_config()
    MavisLogitsProcessor(config, torch.device("cpu"), False)
    config.scheduler_config.async_scheduling = True
    with pytest.raises(CriticError, match="async_scheduling is enabled.*Hint: pass --no-async-scheduling"):
        MavisLogitsProcessor(config, torch.device("cpu"), False)
    config.scheduler_config.async_scheduling = False
    config.kv_transfer_config = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    with pytest.raises(CriticError, match="kv_transfer_config is enabled"):
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


def test_the_first_tilted_request_can_join_while_plain_ones_leave(folder: Path) -> None:
    processor = start(folder)
    tilted = SamplingParams(extra_args={"mavis_weights": [1.0, 0.0], "mavis_beta": 1.0, "mavis_top_k": 8})
    plain = SamplingParams()
    processor.update_state(BatchUpdate(5, removed=[], added=[(at, plain, [1], []) for at in range(5)], moved=[]))
    # Two leave and one joins: vLLM refills the lower row, and lists only the other, which is the last, as removed.
    processor.update_state(BatchUpdate(4, removed=[4], added=[(2, tilted, [1], [])], moved=[]))
    _captured.states = torch.randn(4, 128)
    logits = processor.apply(torch.randn(4, 2048))
    assert logits.isfinite().sum(dim=1).tolist() == [2048, 2048, 8, 2048]


def test_each_engine_of_a_process_validates_against_its_own_critic(
    story: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MAVIS_CRITIC", raising=False)

    def engine_front(folder: Path, *objectives: str) -> InputProcessor:
        shutil.rmtree(folder, ignore_errors=True)
        build_critic(story[0], objectives).save_pretrained(folder)
        arguments = {"model": str(embedded.path()), "dtype": "float32", "max_model_len": 256}
        more = {"logits_processors": [PROCESSOR], "additional_config": {"mavis_critic": str(folder)}}
        return InputProcessor(EngineArgs(**arguments, **more).create_engine_config())

    def ask(front: InputProcessor, objective: str) -> None:
        extra_args = {"mavis_weights": f"{objective}=1", "mavis_beta": 1}
        front._validate_params(SamplingParams(extra_args=extra_args), ("generate",))

    one, two = engine_front(tmp_path / "one", "good", "short"), engine_front(tmp_path / "two", "kind", "long")
    for front, own, other in ((one, "good", "kind"), (two, "kind", "good"), (one, "short", "long")):
        ask(front, own)
        with pytest.raises(VLLMValidationError, match=f"names objective '{other}'"):
            ask(front, other)
    later = engine_front(tmp_path / "one", "new", "short")  # trained again into the same folder
    ask(later, "new")


def test_the_newer_model_runner_refuses_the_processor_at_start_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"model": str(embedded.path()), "dtype": "float32", "logits_processors": [PROCESSOR]}
    config = EngineArgs(**arguments, additional_config={"mavis_critic": str(folder)}).create_engine_config()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="MavisLogitsProcessor is not a subclass of vllm.v1.worker.gpu"):
        InputProcessor(config)


def test_models_are_built_with_the_capturing_logits_layer() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        assert type(LogitsLayer(8)) is CapturingLogitsLayer


@pytest.fixture(scope="module")
def served(critics: Callable[[str], tuple[Any, Path]]) -> Iterator[Any]:
    with engine(critics("memory")[1]) as llm:
        yield llm


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"mavis_weights": "goood=1", "mavis_beta": 1}, "mavis_weights: weights names objective 'goood'"),
        ({"mavis_weights": "good=1", "mavis_beta": -1}, "mavis_beta: "),
        ({"mavis_weights": "good=1", "mavis_target_kl": 1}, "mavis_target_kl: "),
        ({"mavis_weights": "good=1", "mavis_beta": 1, "mavis_top_k": 3000}, "mavis_top_k is 3000"),
        ({"mavis_weight": "good=1"}, "mavis_weight is not a tilt argument"),
    ],
)
def test_an_invalid_request_is_refused_and_the_engine_keeps_serving(
    served: Any, prompts: list[list[int]], extra_args: dict[str, Any], message: str
) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        served.generate(
            TokensPrompt(prompt_token_ids=prompts[0]), SamplingParams(extra_args=extra_args), use_tqdm=False
        )
    assert message in str(caught.value)
    good = SamplingParams(max_tokens=2, extra_args={"mavis_weights": "good=1", "mavis_beta": 1})
    [output] = served.generate(TokensPrompt(prompt_token_ids=prompts[0]), good, use_tqdm=False)
    assert len(output.outputs[0].token_ids) <= 2


def test_hidden_states_that_do_not_match_the_rows_are_an_error(folder: Path) -> None:
    processor = start(folder)
    tilted = SamplingParams(extra_args={"mavis_weights": [1.0, 0.0], "mavis_beta": 1.0})
    processor.update_state(BatchUpdate(2, removed=[], added=[(at, tilted, [1], []) for at in range(2)], moved=[]))
    for states in (None, torch.zeros(3, 128)):
        _captured.states = states
        with pytest.raises(MavisError, match="the engine has 2 rows of logits for 2 requests"):
            processor.apply(torch.zeros(2, 2048))
