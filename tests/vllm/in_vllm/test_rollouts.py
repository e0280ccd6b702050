"""Rollouts drawn with vLLM follow the same distributions as those of `generate`."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import torch

from mavis import Critic, MavisError, ValueModelCritic
from mavis.errors import ConfigError, CriticError
from mavis.rewards import Brevity, Positive
from mavis.rollouts import RolloutPlan, RolloutSettings, collect
from mavis.utils.files import read_json
from tests.factories import tiny_llama
from tests.vllm.conftest import build_critic
from tests.vllm.in_vllm.conftest import FALSE_ALARM, distance_from_uniform, exact_logprobs, randomised_rank

pytest.importorskip("vllm")

from mavis.vllm.sampler import VllmSampler

OBJECTIVES = {"good": Positive(), "short": Brevity(8.0)}
PROMPTS = ["Once upon a time", "One day, Tim", "The dog", "Lily and her mom went to the park and"]
SETTINGS = RolloutSettings(max_new_tokens=12, top_k=12, shard_size=16, temperature=1.25, seed=5)
OPTIONS: dict[str, Any] = {"enforce_eager": True, "max_model_len": 256}


@pytest.fixture(scope="module")
def sampler() -> Iterator[VllmSampler]:
    with VllmSampler(**OPTIONS) as one:
        yield one


def tilted_plan(rows: int = 32) -> RolloutPlan:
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    prompts = [PROMPTS[row // 4 % len(PROMPTS)] for row in range(rows)]
    return RolloutPlan(prompts, weights[torch.arange(rows) % 4], torch.full((rows,), 1.5, dtype=torch.float64))


def rows_of(shards: Any) -> list[dict[str, Any]]:
    return [row for shard in shards for row in shard]


def kl_of(logprobs: torch.Tensor, plain: torch.Tensor) -> list[float]:
    return [float(x) for x in torch.where(logprobs.isfinite(), logprobs.exp() * (logprobs - plain), 0.0).sum(1)]


@pytest.mark.parametrize("name", ["plain heads", "conditioned with memory", "value model"])
def test_tilted_rows_are_drawn_from_their_own_distribution_with_its_kl(
    sampler: VllmSampler,
    story: tuple[Any, Any],
    critics: Callable[[str], tuple[Any, Path]],
    tmp_path: Path,
    name: str,
) -> None:
    critic, dice = critics(name)[0], Random(2)
    rows = rows_of(collect(*story, OBJECTIVES, tilted_plan(64), tmp_path, SETTINGS, critic=critic, sampler=sampler))
    ranks, plain_ranks = [], []
    for row in rows:
        arguments = {"mavis_weights": row["weights"], "mavis_beta": 1.5, "mavis_top_k": 12}
        known = story[0], critic, row["prompt_ids"], row["response_ids"]
        plain = exact_logprobs(*known, None, 1.25).double()
        if not any(row["weights"]):
            assert row["kl"] == [0.0] * len(row["response_ids"])
            continue
        logprobs = exact_logprobs(*known, arguments, 1.25).double()
        assert row["kl"] == pytest.approx(kl_of(logprobs, plain), abs=1e-4)
        for step, token in enumerate(row["response_ids"]):
            shift = logprobs[step] - plain[step]
            ranks.append(randomised_rank(logprobs[step], shift, token, dice.random()))
            plain_ranks.append(randomised_rank(plain[step], shift, token, dice.random()))
    far = math.sqrt(math.log(2 / FALSE_ALARM) / (2 * len(ranks)))
    assert distance_from_uniform(ranks) < far
    assert distance_from_uniform(plain_ranks) > far, "the test has no power to tell the tilt from the plain model"


def test_the_reference_is_truncated_to_the_candidates_of_later_iterations(
    sampler: VllmSampler, story: tuple[Any, Any], tmp_path: Path
) -> None:
    plan = RolloutPlan.reference(PROMPTS * 8, 2)
    rows = rows_of(collect(*story, OBJECTIVES, plan, tmp_path, SETTINGS, truncate_reference=True, sampler=sampler))
    for row in rows:
        plain = exact_logprobs(story[0], None, row["prompt_ids"], row["response_ids"], None, 1.25).double()
        values, ids = plain.topk(12)
        for token, kept in zip(row["response_ids"], ids.tolist(), strict=True):
            assert token in kept
        # truncation to the candidates costs −log of their probability mass
        assert row["kl"] == pytest.approx((-values.exp().sum(1).log()).tolist(), abs=1e-4)


def test_untruncated_reference_rows_have_no_kl_and_end_like_those_of_generate(
    sampler: VllmSampler, story: tuple[Any, Any], tmp_path: Path
) -> None:
    policy, tokenizer = story
    settings = RolloutSettings(max_new_tokens=5, top_k=None, shard_size=64, seed=1)
    ends = tokenizer(" was")["input_ids"][-1], tokenizer.eos_token_id
    before = policy.generation_config.eos_token_id
    policy.generation_config.eos_token_id = list(ends)
    try:
        rows = rows_of(
            collect(*story, OBJECTIVES, RolloutPlan.reference(PROMPTS * 16, 2), tmp_path, settings, sampler=sampler)
        )
    finally:
        policy.generation_config.eos_token_id = before
    ended = [row["response_ids"][-1] in ends for row in rows]
    assert any(ended)
    assert not all(ended)
    for row, is_ended in zip(rows, ended, strict=True):
        assert row["kl"] == [0.0] * len(row["response_ids"])
        assert sum(token in ends for token in row["response_ids"]) == is_ended
        assert is_ended or len(row["response_ids"]) == 5


def test_a_lost_shard_is_redrawn_identically(
    sampler: VllmSampler, story: tuple[Any, Any], critics: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    critic = critics("plain heads")[0]

    def run() -> list[dict[str, Any]]:
        shards = collect(*story, OBJECTIVES, tilted_plan(), tmp_path, SETTINGS, critic=critic, sampler=sampler)
        return rows_of(shards)

    first = run()
    shutil.rmtree(tmp_path / "shard-00001")
    assert [row["response_ids"] for row in run()] == [row["response_ids"] for row in first]
    assert len({tuple(row["response_ids"]) for row in first}) > len(first) // 2


def test_trained_critics_and_unsaved_policies_reach_the_engine(story: tuple[Any, Any], tmp_path: Path) -> None:
    """The engine serves a critic that was changed in place, and a policy that was never saved."""
    sizes = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    policy = tiny_llama(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    critic = build_critic(policy, ("good", "short"))
    settings = RolloutSettings(max_new_tokens=1, top_k=None, shard_size=8)
    weights = torch.tensor([[1.0, 0.0]] * 8, dtype=torch.float64)
    plan = RolloutPlan(["Once"] * 8, weights, torch.ones(8, dtype=torch.float64))
    drawn = []
    with VllmSampler(**OPTIONS) as sampler:
        for sign in (1, -1):  # a tilt so strong that one token is left
            with torch.no_grad():
                critic.heads.outer.zero_()
                critic.heads.bias.fill_(sign * 1e3)
            folder = tmp_path / str(sign)
            shards = collect(policy, story[1], OBJECTIVES, plan, folder, settings, critic=critic, sampler=sampler)
            rows = rows_of(shards)
            arguments = {"mavis_weights": [1.0, 0.0], "mavis_beta": 1.0, "mavis_top_k": 0}
            [logprobs] = exact_logprobs(policy, critic, rows[0]["prompt_ids"], rows[0]["response_ids"], arguments, 1.0)
            assert float(logprobs.max()) > -1e-6
            drawn.append({row["response_ids"][0] for row in rows})
            assert drawn[-1] == {int(logprobs.argmax())}
    assert drawn[0] != drawn[1]


def test_a_folder_of_rollouts_from_generate_is_not_resumed(
    sampler: VllmSampler, story: tuple[Any, Any], tmp_path: Path
) -> None:
    plan = RolloutPlan.reference(PROMPTS, 2)
    list(collect(*story, OBJECTIVES, plan, tmp_path, SETTINGS))
    with pytest.raises(MavisError, match="sampler"):
        list(collect(*story, OBJECTIVES, plan, tmp_path, SETTINGS, sampler=sampler))


def test_what_an_engine_cannot_serve_is_refused_before_anything_is_drawn(
    sampler: VllmSampler, story: tuple[Any, Any], critics: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    policy = story[0]
    values = ValueModelCritic.for_policy(policy, ["good", "short"], backbone=policy.config, readout="candidates")
    with pytest.raises(CriticError, match="critic is a value_model with readout 'candidates'"):
        sampler.check(policy, values)
    policy.peft_config = {}
    try:
        with pytest.raises(ConfigError, match="has adapters.*merge_and_unload"):
            sampler.check(policy, None)
    finally:
        del policy.peft_config
    with pytest.raises(ConfigError, match="dtype is 'float16', but the sampler sets it"):
        VllmSampler(dtype="float16")
    long = RolloutSettings(max_new_tokens=250, top_k=None)
    with pytest.raises(ConfigError, match="max_new_tokens is 250, .* have 260 tokens.*max_model_len is 256"):
        sampler.draw(*story, ["Lily and her mom went to the park and"], long, 0)
    with VllmSampler(max_model_len=10**6) as other, pytest.raises(ConfigError, match="vLLM does not start with"):
        other.draw(*story, PROMPTS, SETTINGS, 0)


TRAINER = """
import sys, tempfile
from mavis.policies import embedded
from mavis.vllm.sampler import VllmSampler
from mavis.rollouts import RolloutSettings

if __name__ == "__main__":
    tempfile.tempdir = sys.argv[1]
    sampler = VllmSampler(enforce_eager=True)
    drawn = sampler.draw(*embedded.load(), ["Once upon a time"], RolloutSettings(max_new_tokens=4, top_k=None), 0)
    print("drawn", flush=True)
    sys.stdin.read()
"""


def _environment_with_engine_process() -> dict[str, str]:
    """Return an environment in which the engine is a process of its own, as it is outside these tests."""
    return {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}


def test_an_engine_stops_with_its_trainer_even_if_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text(TRAINER)
    folders = tmp_path / "folders"
    folders.mkdir()
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "trainer.py"), str(folders)],
        env=_environment_with_engine_process() | {"PYTHONPATH": os.getcwd()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as trainer:
        assert trainer.stdout is not None
        assert any(line == "drawn\n" for line in trainer.stdout)
        started = psutil.Process(trainer.pid).children(recursive=True)
        assert any("VLLM" in one.name() or "VLLM" in " ".join(one.cmdline()) for one in started)
        assert list(folders.glob("mavis-vllm-*"))
        trainer.kill()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive
    assert not list(folders.glob("mavis-vllm-*"))


def test_a_closed_sampler_leaves_nothing_behind(story: tuple[Any, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with VllmSampler(enforce_eager=True) as sampler:
        sampler.draw(*story, PROMPTS, SETTINGS, 0)
        [folder] = tmp_path.glob("mavis-vllm-*")
        assert sampler._engine is not None
        sampler.release()
        assert sampler._engine is None
        assert folder.is_dir()
    assert not folder.exists()


def test_a_longer_prompt_than_any_before_gets_a_larger_engine(story: tuple[Any, Any]) -> None:
    with VllmSampler(enforce_eager=True) as sampler:
        for prompt in ("Once", "Once upon a time there was a little girl who went to the park with her dog and"):
            drawn = sampler.draw(story[0], story[1], [prompt], RolloutSettings(max_new_tokens=8, top_k=None), 0)
            longest = len(drawn.prompt_ids[0]) + 8
            assert longest <= sampler._engine.model_config.max_model_len < 2 * longest


def test_the_train_command_uses_an_engine_in_a_process_of_its_own(tmp_path: Path) -> None:
    settings = (
        "sampler=vllm +sampler.options.enforce_eager=true improvement.rollouts=64 improvement.shard_size=64 "
        "improvement.fit.epochs=1 improvement.calibration_samples=0 decoding.max_new_tokens=8"
    )
    command = [sys.executable, "-m", "mavis.cli.train", *settings.split(), f"output={tmp_path / 'run'}"]
    done = subprocess.run(
        command, env=_environment_with_engine_process(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert Critic.from_pretrained(tmp_path / "run" / "critic").objectives == ("positive", "dialogue")
    for iteration in range(2):
        manifest = read_json(tmp_path / "run" / f"iteration-{iteration}" / "rollouts" / "plan.json")
        assert manifest["sampler"] == "vllm"
