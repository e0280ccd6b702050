"""vLLM engines for the tests, and the distributions that transformers computes for the same responses."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, Qwen2Config

from mavis import MavisTilt, ValueModelCritic, embedded
from mavis.math.tilt import tilted_logprobs, top_candidates
from mavis.policies.state_capture import forward_states
from mavis.vllm.request_arguments import parse_tilt
from tests.vllm.conftest import build_critic

PROCESSOR = "mavis.vllm.logits_processor:MavisLogitsProcessor"
FALSE_ALARM = 1e-6
"""The probability that a statistical test fails although the code is correct."""
HAS_VLLM = find_spec("vllm") is not None

if HAS_VLLM:
    # The engine runs in this process, so that tests can inspect it, and uses no network.
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with warnings.catch_warnings():  # vLLM's dependencies warn when they are imported
        warnings.simplefilter("ignore")
        import vllm.entrypoints.llm  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need vLLM, and ignore warnings of vLLM itself."""
    known = (
        "ignore:.torch.distributed.reduce_op. is deprecated:FutureWarning",
        "ignore:max_rollback_tokens is deprecated:DeprecationWarning",
    )
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.filterwarnings(*known))


@pytest.fixture(scope="session")
def story() -> tuple[Any, Any]:
    """The embedded policy and its tokenizer."""
    return embedded.load()


CRITICS: dict[str, dict[str, Any]] = {
    "plain heads": {},
    "memory": {"memory": 8},
    "conditioned": {"composition": "conditioned"},
    "conditioned with memory": {"composition": "conditioned", "memory": 8},
    "value model": {
        "backbone": Qwen2Config(
            vocab_size=2048,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.2,
        ),
    },
}


@pytest.fixture(scope="session")
def critics(story: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A function that returns a critic of the embedded policy by name, and its folder."""
    built: dict[str, tuple[Any, Path]] = {}

    def get(name: str) -> tuple[Any, Path]:
        if name not in built:
            critic = build_critic(story[0], ("good", "short"), **CRITICS[name])
            folder = tmp_path_factory.mktemp("critic") / "critic"
            critic.save_pretrained(folder)
            built[name] = critic, folder
        return built[name]

    return get


@contextmanager
def engine(critic: Path | None, **options: Any) -> Iterator[Any]:
    """Run an engine in this process while the block lasts."""
    from vllm import LLM

    more = {} if critic is None else {"additional_config": {"mavis_critic": str(critic)}}
    llm = LLM(
        **{
            "model": str(embedded.path()),
            "dtype": "float32",
            "enforce_eager": True,
            "seed": 0,
            "max_model_len": 256,
            "max_logprobs": -1,
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": False,
            "logits_processors": [PROCESSOR] if critic is not None else None,
        }
        | more
        | options
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def processor_of(llm: Any) -> Any:
    """Return the processor of an engine in this process."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    processors = worker.model_runner.input_batch.logitsprocs.non_argmax_invariant
    return next(one for one in processors if type(one).__name__ == "MavisLogitsProcessor")


def arguments_of(extra_args: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the arguments of a request to those of `MavisTilt`."""
    weights = extra_args["mavis_weights"]
    if isinstance(weights, str):
        weights = {name: float(value) for name, value in (part.split("=") for part in weights.split(","))}
    top_k = extra_args.get("mavis_top_k", 40)
    return {"weights": weights, "beta": extra_args["mavis_beta"], "top_k": top_k or None}


class _Forced(LogitsProcessor):
    """Records the distribution after the tilt, and forces a given response."""

    def __init__(self, response: Sequence[int], temperature: float) -> None:
        self.response, self.temperature = list(response), temperature
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logprobs.append(torch.log_softmax(scores[0].double() / self.temperature, 0))
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.response[len(self.logprobs) - 1]] = 0.0
        return forced


def by_transformers(
    policy: Any,
    critic: Any,
    prompt: Sequence[int],
    response: Sequence[int],
    extra_args: Mapping[str, Any] | None,
    temperature: float,
) -> Tensor:
    """Force a response through `generate` under `MavisTilt`, and return log π of every step (T, V)."""
    forced = _Forced(response, temperature)
    ids = torch.tensor([list(prompt)])
    end = policy.generation_config.eos_token_id
    with critic.attach(policy):
        processors: list[Any] = [forced]
        if extra_args is not None:
            processors.insert(0, MavisTilt(critic=critic, temperature=temperature, **arguments_of(extra_args)))
        policy.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=len(response),
            eos_token_id=end if end not in response[:-1] else None,
            logits_processor=processors,
        )
    return torch.stack(forced.logprobs)


@torch.no_grad()
def exact_logprobs(
    policy: Any,
    critic: Any,
    prompt: Sequence[int],
    response: Sequence[int],
    extra_args: Mapping[str, Any] | None,
    temperature: float,
) -> Tensor:
    """Compute the same (T, V) in one forward pass over the whole response."""
    states, logits = forward_states(policy, input_ids=torch.tensor([[*prompt, *response]]), use_cache=False)
    steps = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
    states, logits = states[:, steps], logits[0, steps]
    tilt = parse_tilt(extra_args, temperature, critic)
    if tilt is None:
        return torch.log_softmax(logits / temperature, -1)
    if isinstance(critic, ValueModelCritic):
        ids = torch.tensor([[*prompt, *response]])
        inputs = critic.rollout_inputs(ids, torch.ones_like(ids, dtype=torch.bool), states[..., :0])[0]
    else:
        inputs = critic.response_inputs(states)[0]
    values, ids = top_candidates(logits, tilt.top_k) if tilt.top_k else (logits, None)
    lam = tilt.lam.expand(len(inputs), -1)
    logprobs = tilted_logprobs(values, critic.tilt_from_inputs(inputs, ids, lam), temperature)
    return torch.full_like(logits, -torch.inf).scatter_(1, ids, logprobs) if ids is not None else logprobs


def randomised_rank(logprobs: torch.Tensor, order: torch.Tensor, drawn: int, share: float) -> float:
    """Return P(order < order of the drawn token) plus a random share of P(equal order), uniform under `logprobs`."""
    probabilities = logprobs.exp()
    below, same = probabilities[order < order[drawn]].sum(), probabilities[order == order[drawn]].sum()
    return float(below + share * same)


def distance_from_uniform(ranks: list[float]) -> float:
    """Return the Kolmogorov–Smirnov distance, which exceeds ε with probability at most 2 exp(−2nε²)."""
    ordered = torch.tensor(sorted(ranks), dtype=torch.float64)
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float(torch.maximum((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))


@pytest.fixture(scope="session")
def prompts(story: tuple[Any, Any]) -> list[list[int]]:
    """Sixteen prompts of different lengths; the last four share a beginning that is longer than a prefill chunk."""
    tokenizer = story[1]
    openings = (embedded.path() / "openings.txt").read_text(encoding="utf-8").splitlines()
    texts = openings[:12]
    long = " ".join(openings[12:24])
    texts += [f"{long} {openings[24 + number]}" for number in range(4)]
    return [tokenizer(text)["input_ids"] for text in texts]
