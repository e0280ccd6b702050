"""Alignment: what it learns and writes, and that interruptions change nothing."""

from __future__ import annotations

import copy
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mavis.errors import (
    ConfigError,
    DataError,
    MavisError,
    MissingPackageError,
    ObjectiveError,
    PolicyError,
    WeightsError,
)
from mavis.rollouts import RolloutPlan, collect, draw_prompts
from mavis.training import AlignReport, AlignSettings, align
from tests.factories import Opaque

PROMPTS = ["once upon a time", "the dog", "she said", "the little old man ran", "he was"]
SETTINGS = AlignSettings(
    steps=12,
    learning_rate=3e-3,
    beta=4.0,
    max_new_tokens=8,
    reference_samples=128,
    evaluation_samples=256,
    save_every=4,
)
# PEFT uses names that transformers has renamed.
LORA = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Start = Callable[..., AlignReport]


class Stop(Exception):
    """Interrupts a run."""


@pytest.fixture
def start(tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any) -> Start:
    """`align` on the tiny policy, for "good"."""

    def call(folder: Path, settings: AlignSettings = SETTINGS, **options: Any) -> AlignReport:
        arguments: dict[str, Any] = {
            "policy": tiny_policy,
            "tokenizer": tiny_tokenizer,
            "objectives": {"good": tiny_objectives["good"]},
            "weights": [1.0],
            "prompts": PROMPTS,
        }
        return align(**(arguments | options), folder=folder, settings=settings)

    return call


@pytest.fixture(scope="module")
def uninterrupted(
    tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[AlignReport, Path]:
    """One run from beginning to end, for two objectives, measured on prompts of its own."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    before = {name: tensor.clone() for name, tensor in tiny_policy.state_dict().items()}
    config, attributes = tiny_policy.config.to_dict(), set(vars(tiny_policy))
    report = align(
        tiny_policy,
        tiny_tokenizer,
        tiny_objectives,
        {"good": 1.0, "brevity": 0.1},
        PROMPTS,
        folder,
        SETTINGS,
        evaluation_prompts=["a cat", "they saw the old house"],
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_policy.state_dict().items())
    assert tiny_policy.config.to_dict() == config
    assert set(vars(tiny_policy)) == attributes
    return report, folder


def responses_of(policy: Any, tokenizer: Any, objectives: Any, prompts: Sequence[str], folder: Path) -> list[str]:
    """What `align` samples for the metrics of its report."""
    rows = draw_prompts(prompts, SETTINGS.evaluation_samples, SETTINGS.seed + 2)
    plan = RolloutPlan.reference(rows, len(objectives))
    shards = collect(policy, tokenizer, objectives, plan, folder, SETTINGS.sampling(2))
    return [text for shard in shards for text in shard["response"]]


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


# what is learnt


def test_the_reward_rises_and_costs_kl(uninterrupted: tuple[AlignReport, Path]) -> None:
    """Six standard errors of a difference: a false alarm in a thousand million."""
    report, _ = uninterrupted
    error = report.reward_error * 2**0.5
    assert report.reward_after - report.reward_before > 6 * error
    assert report.rewards_after["good"] > report.rewards_before["good"] + 6 * error
    assert report.kl > 10 * report.kl_error > 0
    for when in ("before", "after"):
        rewards = getattr(report, f"rewards_{when}")
        assert getattr(report, f"reward_{when}") == pytest.approx(rewards["good"] + 0.1 * rewards["brevity"])
    assert report.goal == pytest.approx(report.reward_after - report.kl / SETTINGS.beta)
    assert report.evaluated_on == "evaluation prompts"


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_the_optimum_of_one_step_is_found_at_the_strength_that_was_asked_for(
    start: Start, tiny_policy: Any, tiny_tokenizer: Any, tmp_path: Path, method: Any
) -> None:
    """With one token a response, π* ∝ π_ref exp(β R) is known: most of J* is reached, at about the KL of π*."""

    def letters(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float(len(response.strip())) for response in responses]

    settings = replace(
        SETTINGS, method=method, max_new_tokens=1, beta=2.0, steps=60, batch_size=32, learning_rate=1e-3, save_every=60
    )
    report = start(tmp_path / "run", settings, objectives={"letters": letters}, prompts=["the dog"])

    def logprobs(policy: Any) -> Tensor:
        with torch.no_grad():
            logits = policy(**tiny_tokenizer(["the dog"], return_tensors="pt")).logits[0, -1]
        return torch.log_softmax(logits.double(), -1)

    reference = logprobs(tiny_policy)
    words = tiny_tokenizer.batch_decode([[token] for token in range(len(reference))], skip_special_tokens=True)
    rewards = (torch.tensor(letters([], words)).double() - report.mean["letters"]) / report.std["letters"]

    def goal_and_kl(policy: Tensor) -> tuple[float, float]:
        kl = float((policy.exp() * (policy - reference)).sum())
        return float((policy.exp() * rewards).sum()) - kl / settings.beta, kl

    nothing, _ = goal_and_kl(reference)
    best, far = goal_and_kl(torch.log_softmax(reference + settings.beta * rewards, -1))
    goal, kl = goal_and_kl(logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")))
    assert kl == pytest.approx(report.kl, rel=1e-4)
    assert goal - nothing > 0.85 * (best - nothing)
    assert far / 1.3 < kl < 1.3 * far


def test_no_step_has_no_kl(start: Start, tmp_path: Path) -> None:
    report = start(tmp_path / "run", replace(SETTINGS, steps=0))
    assert report.kl == 0.0
    assert report.rewards_after == report.rewards_before
    assert report.evaluated_on == "training prompts"


def test_small_steps_have_a_small_kl(start: Start, tmp_path: Path) -> None:
    report = start(tmp_path / "run", replace(SETTINGS, steps=1, learning_rate=1e-6))
    assert 0 < report.kl < 1e-4


# what is written


def test_the_policy_is_a_folder_that_gives_the_same_responses(
    uninterrupted: tuple[AlignReport, Path], tiny_objectives: Any, tmp_path: Path
) -> None:
    report, folder = uninterrupted
    assert report.folder == str(folder / "policy")
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    responses = responses_of(
        policy, tokenizer, tiny_objectives, ["a cat", "they saw the old house"], tmp_path / "again"
    )
    good = (torch.tensor(tiny_objectives["good"]([], responses)).double() - report.mean["good"]) / report.std["good"]
    assert float(good.mean()) == pytest.approx(report.rewards_after["good"], abs=1e-6)


def test_nothing_is_pickled_and_no_temporary_file_left(uninterrupted: tuple[AlignReport, Path]) -> None:
    report, folder = uninterrupted
    assert {path.name for path in folder.iterdir()} == {
        "policy",
        "reference-rollouts",
        "report.json",
        "responses-after",
        "responses-before",
        "run.json",
    }
    assert not {Path(name).suffix for name in files_in(folder)} - {".json", ".safetensors", ".arrow"}
    assert not [path for path in folder.rglob("*.json") if str(folder) in path.read_text()]
    assert json.loads((folder / "report.json").read_text())["kl"] == report.kl


@LORA
def test_an_adapter_is_a_folder_that_gives_the_same_responses(
    start: Start, tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, tmp_path: Path
) -> None:
    from peft import PeftModel

    report = start(tmp_path / "run", replace(SETTINGS, lora_rank=4, learning_rate=1e-2, micro_rows=16))
    assert report.folder == str(tmp_path / "run" / "adapter")
    assert report.reward_after - report.reward_before > 6 * report.reward_error * 2**0.5
    assert {Path(name).suffix for name in files_in(tmp_path / "run" / "adapter")} <= {".json", ".safetensors", ".md"}
    adapted = PeftModel.from_pretrained(copy.deepcopy(tiny_policy), tmp_path / "run" / "adapter").eval()
    objectives = {"good": tiny_objectives["good"]}
    responses = responses_of(adapted, tiny_tokenizer, objectives, PROMPTS, tmp_path / "again")
    good = (torch.tensor(objectives["good"]([], responses)).double() - report.mean["good"]) / report.std["good"]
    assert float(good.mean()) == pytest.approx(report.rewards_after["good"], abs=1e-6)


def test_a_policy_in_half_precision_is_trained_and_stays_in_it(
    start: Start, make_other_policy: Callable[[], Any], tmp_path: Path
) -> None:
    policy = make_other_policy().to(torch.bfloat16)
    report = start(tmp_path / "run", replace(SETTINGS, steps=2, evaluation_samples=8), policy=policy)
    assert report.kl > 0
    weights = load_file(tmp_path / "run" / "policy" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


# going on


@LORA
@pytest.mark.parametrize("rank", [0, 2])
def test_an_interrupted_run_resumes_to_the_same_weights(start: Start, tmp_path: Path, rank: int) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("steps", 3):
            raise Stop

    settings = replace(SETTINGS, steps=4, save_every=2, evaluation_samples=32, lora_rank=rank)
    whole = start(tmp_path / "whole", settings)
    with pytest.raises(Stop):
        start(tmp_path / "run", settings, progress=stop)
    assert files_in(tmp_path / "run" / "checkpoint") == {
        "optimizers.safetensors",
        "state.json",
        "weights.safetensors",
    }
    done: list[tuple[str, int]] = []
    again = start(tmp_path / "run", settings, progress=lambda stage, at, total: done.append((stage, at)))
    assert [at for stage, at in done if stage == "steps"] == [2, 3, 4]
    name = Path("adapter/adapter_model.safetensors" if rank else "policy/model.safetensors")
    weights, expected = load_file(tmp_path / "run" / name), load_file(tmp_path / "whole" / name)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert (again.kl, again.reward_after) == (whole.kl, whole.reward_after)


def test_a_finished_run_returns_its_report_at_once(
    uninterrupted: tuple[AlignReport, Path], start: Start, tiny_objectives: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, folder = uninterrupted
    module = sys.modules["mavis.training.alignment.loop"]  # by its path, it is the function of that name
    monkeypatch.setattr(module, "collect", lambda *_, **__: pytest.fail("it samples again"))
    weights, evaluation = {"good": 1.0, "brevity": 0.1}, ["a cat", "they saw the old house"]
    again = start(folder, objectives=tiny_objectives, weights=weights, evaluation_prompts=evaluation)
    assert again == report


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        ({"settings": replace(SETTINGS, beta=2.0)}, "settings.beta"),
        ({"weights": {"good": 0.5, "brevity": 0.1}}, "weights.good"),
        ({"prompts": ["the cat"]}, "prompts"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(
    uninterrupted: tuple[AlignReport, Path], start: Start, tiny_objectives: Any, other: dict[str, Any], differing: str
) -> None:
    same = {
        "objectives": tiny_objectives,
        "weights": {"good": 1.0, "brevity": 0.1},
        "evaluation_prompts": ["a cat", "they saw the old house"],
    }
    with pytest.raises(
        DataError, match=f"holds an alignment with different {differing}. Hint: name a new output folder"
    ):
        start(uninterrupted[1], **(same | other))


# the process and its surroundings


def test_the_state_of_the_process_is_restored(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("CI", raising=False)  # where TRL would keep quiet of its own accord
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(
        "huggingface_hub.utils._telemetry._start_telemetry_thread", lambda: pytest.fail("it uses the network")
    )

    def state() -> list[Any]:
        return [
            torch.random.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # type: ignore[index,union-attr]  # noqa: NPY002
            constants.HF_HUB_DISABLE_TELEMETRY,
            dict(os.environ),
        ]

    torch.manual_seed(5)
    before = state()
    start(tmp_path / "run", replace(SETTINGS, steps=1, evaluation_samples=8))
    assert state() == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("missing", ["trl", "peft"])
def test_a_missing_extra_is_named(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.delitem(sys.modules, "mavis.training.alignment.reinforce", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingPackageError, match="align needs TRL and PEFT.*pip install 'mavis-decoding\\[align\\]'"):
        start(tmp_path / "run")
    assert not (tmp_path / "run").exists()


# refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": {"god": 1.0}}, WeightsError, "weights names objective 'god', but the run has: good."),
        ({"weights": [1.0, 2.0]}, WeightsError, "weights has shape (1, 2), but the run has 1 objectives: good."),
        ({"weights": [0.0]}, WeightsError, "expected one row that is not all 0"),
        ({"weights": [[1.0], [2.0]]}, WeightsError, "expected one row that is not all 0"),
        ({"objectives": {}}, ObjectiveError, "objectives is empty"),
        ({"prompts": []}, DataError, "prompts is empty"),
        ({"evaluation_prompts": []}, DataError, "evaluation_prompts is empty"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(
    start: Start, tmp_path: Path, options: dict[str, Any], error: type[MavisError], message: str
) -> None:
    with pytest.raises(error) as raised:
        start(tmp_path / "run", **options)
    assert message in raised.value.message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"method": "ppo"}, "method is 'ppo'"),
        ({"steps": -1}, "steps is -1, expected a whole number ≥ 0"),
        ({"samples": 1}, "samples is 1, expected a whole number ≥ 2"),
        ({"batch_size": 2.0}, "batch_size is 2.0, expected a whole number ≥ 1"),
        ({"micro_rows": 5}, "micro_rows is 5, which does not divide batch_size × samples = 32"),
        ({"beta": 0.0}, "beta is 0.0, expected a finite number > 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"lora_rank": True}, "lora_rank is True"),
    ],
)
def test_a_setting_out_of_range_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        replace(SETTINGS, **setting)
    assert message in raised.value.message


def test_an_objective_that_never_varies_is_refused(start: Start, tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match="'same' gives every one of the 128 reference responses the same reward"):
        start(tmp_path / "run", objectives={"same": lambda prompts, responses: [1.0] * len(responses)})


@LORA
def test_policies_that_cannot_be_trained_are_refused(
    start: Start, make_other_policy: Callable[[], Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(make_other_policy(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    with pytest.raises(PolicyError, match="carries adapters already"):
        start(tmp_path / "run", policy=adapted)
    quantised = make_other_policy()
    weight = quantised.model.layers[0].mlp.up_proj.weight
    quantised.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(PolicyError, match="quantised.*lora_rank=16"):
        start(tmp_path / "run", policy=quantised)
    quantised = make_other_policy()
    layer = quantised.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.as_subclass(Opaque), requires_grad=False)
    with pytest.raises(PolicyError, match="quantised.*lora_rank=16"):
        start(tmp_path / "run", policy=quantised)
    endless = copy.deepcopy(tiny_tokenizer)
    endless.eos_token = None
    with pytest.raises(PolicyError, match="no end token"):
        start(tmp_path / "run", tokenizer=endless)
