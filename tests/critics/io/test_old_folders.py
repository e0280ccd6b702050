"""Critics saved by mavis 0.1 load, and give the same tilts bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mavis
from mavis.critics import Critic
from mavis.critics.io.files import FORMAT
from mavis.rollouts.collect import critic_digest

FOLDER = Path(__file__).parent / "critics_of_0_1_0"
PROMPTS = ["Once upon a time", "Lily wanted to play"]
NAMES = ["hidden_state_conditioned", "hidden_state_independent", "value_model_token", "value_model_candidates"]
TOLERANCE = 1e-5
"""Of scores on other processors, where sums may be taken in another order."""


def processor() -> dict[str, str]:
    """Return what determines the order of floating-point operations; several processors share a model name."""
    path = Path("/proc/cpuinfo")
    first = path.read_text(encoding="utf-8").partition("\n\n")[0] if path.is_file() else ""
    info = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    names = ("model name", "cpu family", "model", "stepping")
    versions = {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
    return versions | {name: info.get(name, "unknown") for name in names}


SAME_PROCESSOR = json.loads((FOLDER / "processor.json").read_text(encoding="utf-8")) == processor()


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return mavis.embedded.load()


def generate(loaded: tuple[Any, Any], critic: Critic) -> tuple[Tensor, Tensor, Tensor]:
    """Generate greedily with a tilt: the ids (B, L), the mask of the prompts, and the scores (B, 6, V) of each step."""
    policy, tokenizer = loaded
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    # The temperature was 1 unless given; now it is that of training, 0.8 for these critics.
    tilt = mavis.MavisTilt([0.7, 0.3], critic, beta=3.0, top_k=12, temperature=1.0)
    steps: list[Tensor] = []

    def record(ids: Tensor, scores: Tensor) -> Tensor:
        steps.append(scores)
        return scores

    with critic.attach(policy):
        ids = policy.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            logits_processor=[*tilt, record],
            repetition_penalty=1.0,
        )
    return ids, inputs["attention_mask"], torch.stack(steps, dim=1)


def assert_same_scores(scores: Tensor, stored: Tensor) -> None:
    if SAME_PROCESSOR:
        assert torch.equal(scores, stored)
    else:
        torch.testing.assert_close(scores, stored, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_folder_of_0_1_0_gives_the_stored_tilts(loaded: tuple[Any, Any], name: str) -> None:
    assert json.loads((FOLDER / name / "config.json").read_text(encoding="utf-8"))["format"] == 1
    stored = load_file(FOLDER / f"{name}.safetensors")
    critic = Critic.from_pretrained(FOLDER / name)
    ids, prompt_mask, scores = generate(loaded, critic)
    assert torch.equal(prompt_mask, stored["prompt_mask"])
    assert torch.equal(ids, stored["ids"])
    assert_same_scores(scores, stored["scores"])


@pytest.mark.parametrize("name", NAMES)
def test_folder_of_0_1_0_keeps_its_metadata(name: str) -> None:
    critic = Critic.from_pretrained(FOLDER / name)
    assert critic.objectives == ("positive", "dialogue")
    torch.testing.assert_close(critic.reward_mean, torch.tensor([0.1, 0.2], dtype=torch.float64))
    torch.testing.assert_close(critic.reward_std, torch.tensor([0.5, 2.0], dtype=torch.float64))
    assert float(critic.max_trained_lambda) == (32.0 if critic.conditioned else 0.0)
    assert critic.calibration is not None
    assert critic.calibration.betas == [1.0, 2.0, 4.0]
    assert critic.decoding is not None
    assert critic.decoding.to_json() == {"top_k": None, "temperature": 0.8, "max_new_tokens": 32}
    assert critic.about == {"data": "tests"}


@pytest.mark.parametrize("name", NAMES)
def test_saving_again_writes_the_current_format_with_the_same_tilts(
    loaded: tuple[Any, Any], name: str, tmp_path: Path
) -> None:
    old = Critic.from_pretrained(FOLDER / name)
    old.save_pretrained(tmp_path / name)
    assert FORMAT == 2
    assert json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))["format"] == FORMAT
    new = Critic.from_pretrained(tmp_path / name)
    assert new.settings() == old.settings()
    assert (new.calibration, new.decoding, new.about) == (old.calibration, old.decoding, old.about)
    assert all(torch.equal(tensor, new.state_dict()[key]) for key, tensor in old.state_dict().items())
    assert torch.equal(generate(loaded, new)[2], generate(loaded, old)[2])


@pytest.mark.parametrize("name", NAMES)
def test_folder_of_0_1_0_is_described_without_its_weights(name: str) -> None:
    described, critic = Critic.describe(FOLDER / name), Critic.from_pretrained(FOLDER / name)
    assert described.objectives == critic.objectives
    assert torch.equal(described.max_trained_lambda, critic.max_trained_lambda)


def test_runs_that_the_previous_version_started_recognise_their_critic() -> None:
    # What version 0.1 wrote into the manifests of rollouts for these critics.
    digests = {
        "hidden_state_conditioned": "3788b94bf349cc70",
        "hidden_state_independent": "1bf3f238f45da2ba",
        "value_model_candidates": "2b838d214cd791b8",
        "value_model_token": "4e309aa831d8ec96",
    }
    for name, digest in digests.items():
        assert critic_digest(Critic.from_pretrained(FOLDER / name)) == digest
