"""`make serve` and the client of the guide: concurrent clients, each with its own weights."""

from __future__ import annotations

import copy
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mavis.critics import Calibration, HiddenStateCritic
from mavis.policies import prompt_ids
from tests.vllm.conftest import build_critic
from tests.vllm.in_vllm.conftest import by_transformers

pytest.importorskip("vllm")

import openai

ROOT = Path(__file__).resolve().parents[3]
GUIDE = ROOT / "docs" / "guides" / "vllm.md"
TEMPLATE = ROOT / "tests" / "policies" / "chat_templates" / "zephyr.jinja"


@pytest.fixture(scope="module")
def critic(story: tuple[Any, Any]) -> HiddenStateCritic:
    """A critic with the demo's objectives and settings, and random heads."""
    critic = build_critic(story[0], ("positive", "dialogue"), memory=8)
    betas = [0.5, 1.0, 2.0, 4.0]
    rows = [[beta**2 for beta in betas]] * 3
    critic.calibration = Calibration(betas, rows, max_new_tokens=16, top_k=None, temperature=1.0)
    return critic


@pytest.fixture(scope="module")
def address(critic: HiddenStateCritic, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server started by `make serve`."""
    folder = tmp_path_factory.mktemp("serve")
    critic.save_pretrained(folder / "critic")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Serve from the environment that runs these tests, however it was made.
    ready = f"{sys.prefix}/.ready"
    command = ["make", "-o", ready, "serve", f"VLLM_VENV={sys.prefix}", f"CRITIC={folder / 'critic'}", f"PORT={port}"]
    command.append(f"SERVE_ARGUMENTS=--chat-template {TEMPLATE}")
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            assert server.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.5)
        else:
            pytest.fail((folder / "log").read_text())
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:  # which closes its connections
        yield client


def test_concurrent_clients_each_get_their_own_weights(
    client: openai.OpenAI, critic: HiddenStateCritic, story: tuple[Any, Any]
) -> None:
    policy, tokenizer = story
    arguments: list[dict[str, Any] | None] = [None]
    arguments += [{"mavis_weights": f"positive={w},dialogue={1 - w}", "mavis_beta": b} for w in (0, 1) for b in (1, 2)]
    arguments += [{"mavis_weights": [w, -w], "mavis_beta": 1.5, "mavis_top_k": 0} for w in (-1.0, 0.5, 1.0)]
    prompt = tokenizer("Once upon a time")["input_ids"]

    def ask(extra: dict[str, Any] | None) -> str:
        body = {"vllm_xargs": extra, "return_token_ids": True} if extra else {"return_token_ids": True}
        answer = client.completions.create(
            model="embedded", prompt=prompt, temperature=0, max_tokens=24, extra_body=body
        )
        return answer.choices[0].token_ids  # type: ignore[attr-defined]

    with ThreadPoolExecutor(16) as many:
        answers = list(many.map(ask, arguments * 2))
    assert answers[: len(arguments)] == answers[len(arguments) :]
    assert len({tuple(ids) for ids in answers}) >= 5
    for extra, ids in zip(arguments, answers, strict=False):
        # A request that names no candidates takes those that the critic was trained with: here, every token.
        extra = {"mavis_top_k": 0} | extra if extra else extra
        expected = by_transformers(policy, critic, prompt, ids, extra, 1.0)
        gaps = expected.max(dim=1).values - expected.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert float(gaps.max()) <= 1e-4


def test_conversations_are_answered_under_their_own_weights(
    client: openai.OpenAI, critic: HiddenStateCritic, story: tuple[Any, Any]
) -> None:
    policy, tokenizer = story
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    messages: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Where is the dog?"}]
    [prompt] = prompt_ids(tokenizer, [messages])

    def ask(weights: str | None) -> tuple[list[int], list[int]]:
        extra = {"mavis_weights": weights, "mavis_beta": 2.0} if weights else None
        body: dict[str, Any] = {"return_token_ids": True} | ({"vllm_xargs": extra} if extra else {})
        answer: Any = client.chat.completions.create(
            model="embedded", messages=messages, temperature=0, max_tokens=24, extra_body=body
        )
        return answer.prompt_token_ids, answer.choices[0].token_ids

    found = {weights: ask(weights) for weights in (None, "positive=1", "dialogue=1", "positive=0.5,dialogue=0.5")}
    for weights, (asked, ids) in found.items():
        assert asked == prompt  # rendered as everywhere else
        extra = {"mavis_weights": weights, "mavis_beta": 2.0, "mavis_top_k": 0} if weights else None
        expected = by_transformers(policy, critic, prompt, ids, extra, 1.0)
        gaps = expected.max(dim=1).values - expected.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert float(gaps.max()) <= 1e-4
    assert len({tuple(ids) for _, ids in found.values()}) >= 3


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"mavis_weights": "positiv=1", "mavis_beta": 1}, "mavis_weights: weights names objective 'positiv'"),
        ({"mavis_weights": "positive", "mavis_beta": 1}, "mavis_weights is 'positive'"),
        ({"mavis_weights": [1, 2, 3], "mavis_beta": 1}, "mavis_weights: weights has shape"),
        ({"mavis_weights": "positive=1", "mavis_beta": "much"}, "mavis_beta is 'much'"),
        ({"mavis_weights": "positive=1", "mavis_target_kl": 2, "mavis_top_k": 3}, "mavis_target_kl: "),
        ({"mavis_strength": 1}, "mavis_strength is not a tilt argument"),
    ],
)
def test_an_invalid_request_is_answered_with_400_and_others_are_unaffected(
    client: openai.OpenAI, extra_args: dict[str, Any], message: str
) -> None:
    def good(_: int) -> str:
        extra = {"mavis_weights": "positive=1", "mavis_beta": 1}
        body = {"model": "embedded", "prompt": "Once", "max_tokens": 16, "temperature": 0}
        return client.completions.create(**body, extra_body={"vllm_xargs": extra}).choices[0].text

    with ThreadPoolExecutor(4) as many:
        others = [many.submit(good, number) for number in range(3)]
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(
                model="embedded", prompt="Once", max_tokens=16, extra_body={"vllm_xargs": extra_args}
            )
        assert caught.value.status_code == 400
        assert message in str(caught.value)
        assert len({other.result() for other in others}) == 1


def test_the_client_of_the_guide_runs_as_written(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    [snippet] = [block for block in re.findall(r"```py\n(.*?)```", guide, flags=re.DOTALL) if "openai" in block]
    assert "http://localhost:8000/v1" in snippet
    exec(compile(snippet.replace("http://localhost:8000/v1", address), str(GUIDE), "exec"), {})
    assert len(capsys.readouterr().out) > 20


def test_the_guide_names_the_variables_and_the_class(critics: Callable[[str], Any]) -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    for name in ("MAVIS_CRITIC", "mavis.vllm.logits_processor:MavisLogitsProcessor", "mavis_critic"):
        assert name in guide
