"""vLLM draws from the distribution that `MavisTilt` computes in transformers, however requests are scheduled."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from mavis.vllm.recurrent_memory import PreemptedMemories
from tests.vllm.in_vllm.conftest import (
    CRITICS,
    FALSE_ALARM,
    by_transformers,
    distance_from_uniform,
    engine,
    exact_logprobs,
    processor_of,
    randomised_rank,
)

pytest.importorskip("vllm")

from vllm import SamplingParams, TokensPrompt
from vllm.sampling_params import StructuredOutputsParams


@pytest.fixture(scope="module", params=list(CRITICS))
def served(request: Any, critics: Callable[[str], tuple[Any, Path]]) -> Iterator[tuple[Any, Any]]:
    """A critic, and an engine that serves it with scarce resources.

    14 blocks of 32 tokens hold about seven responses, so requests are preempted. Prompts are prefilled in chunks of 32
    tokens, and shared beginnings are cached.
    """
    critic, folder = critics(request.param)
    with engine(
        folder,
        block_size=32,
        num_gpu_blocks_override=14,
        max_num_batched_tokens=32,
        max_num_seqs=16,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
    ) as llm:
        yield critic, llm


def mixed_requests(prompts: list[list[int]], count: int, seed: int = 0) -> list[tuple[list[int], dict[str, Any]]]:
    """Combine prompts with all kinds of weights, strengths, candidates, temperatures and lengths, and with no tilt."""
    dice = Random(seed)
    requests = []
    for number in range(count):
        extra = None
        if number % 5:
            extra = {
                "mavis_weights": dice.choice([[1.0, 0.0], [0.3, 0.7], "good=-0.5,short=1.0", {"short": 2.0}]),
                "mavis_beta": dice.choice([0.5, 1.0, 2.0]),
                "mavis_top_k": dice.choice([1, 7, 40, 0]),
            }
        settings = {
            "temperature": dice.choice([0.7, 1.0, 1.3, 0.0]),
            "max_tokens": dice.randint(4, 40),
            "extra_args": extra,
        }
        requests.append((prompts[number % len(prompts)], settings))
    return requests


def preemptions(llm: Any) -> float:
    return float(sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"))


def test_64_mixed_requests_have_the_log_probabilities_of_transformers(
    served: tuple[Any, Any], story: tuple[Any, Any], prompts: list[list[int]]
) -> None:
    critic, llm = served
    policy = story[0]
    requests = mixed_requests(prompts, 64)
    before = preemptions(llm)
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt, _ in requests],
        [SamplingParams(**settings, logprobs=60) for _, settings in requests],
        use_tqdm=False,
    )
    assert preemptions(llm) > before
    assert any(output.num_cached_tokens for output in outputs)
    worst, ranks, plain_ranks = 0.0, [], []
    dice = Random(1)
    for (prompt, settings), output in zip(requests, outputs, strict=True):
        response, extra, greedy = output.outputs[0], settings["extra_args"], settings["temperature"] == 0
        temperature = settings["temperature"] or 1.0
        ids = list(response.token_ids)
        expected = by_transformers(policy, critic, prompt, ids, extra, temperature)
        plain = exact_logprobs(policy, critic, prompt, ids, None, temperature).double()
        for step, found in enumerate(response.logprobs):
            for token, logprob in found.items():
                wanted = float(expected[step, token])
                if math.isinf(wanted):
                    assert logprob.logprob == wanted
                else:
                    worst = max(worst, abs(logprob.logprob - wanted))
            top_k = (extra or {}).get("mavis_top_k", 0)
            if top_k:
                assert sum(math.isfinite(logprob.logprob) for logprob in found.values()) == top_k
            if greedy:  # the most likely token, up to ties in fp32, although other rows are sampled
                assert float(expected[step].max() - expected[step, ids[step]]) <= 1e-4
            elif extra is not None and top_k != 1:
                shift = expected[step] - plain[step]
                ranks.append(randomised_rank(expected[step], shift, ids[step], dice.random()))
                plain_ranks.append(randomised_rank(plain[step], shift, ids[step], dice.random()))
    assert worst <= 1e-3, worst
    # The randomised rank of a drawn token, ordered by how much the tilt favours it, is uniform under the distribution.
    far = math.sqrt(math.log(2 / FALSE_ALARM) / (2 * len(ranks)))
    assert distance_from_uniform(ranks) < far
    assert distance_from_uniform(plain_ranks) > far, "the test has no power to tell the tilt from the plain model"


def test_greedy_requests_take_the_most_likely_token_of_the_tilted_distribution(
    served: tuple[Any, Any], story: tuple[Any, Any], prompts: list[list[int]]
) -> None:
    critic, llm = served
    arguments = [
        {"mavis_weights": [1.0, -0.5], "mavis_beta": beta, "mavis_top_k": k} for beta in (0, 1, 2) for k in (5, 0)
    ]
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=prompts[number]) for number in range(len(arguments))],
        [SamplingParams(temperature=0, max_tokens=24, extra_args=extra) for extra in arguments],
        use_tqdm=False,
    )
    different = set()
    for number, (extra, output) in enumerate(zip(arguments, outputs, strict=True)):
        ids = list(output.outputs[0].token_ids)
        expected = by_transformers(story[0], critic, prompts[number], ids, extra, 1.0)
        gaps = expected.max(dim=1).values - expected.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert float(gaps.max()) <= 1e-4  # the most likely, up to ties in fp32
        different.add(
            bool(
                (exact_logprobs(story[0], critic, prompts[number], ids, None, 1.0).argmax(1) != torch.tensor(ids)).any()
            )
        )
    assert different == {False, True}  # β = 0 is the plain model, and the others are not


def test_children_of_one_request_each_have_their_own_memory(
    served: tuple[Any, Any], story: tuple[Any, Any], prompts: list[list[int]]
) -> None:
    critic, llm = served
    extra = {"mavis_weights": "good=1,short=-1", "mavis_beta": 1.0, "mavis_top_k": 0}
    params = SamplingParams(temperature=1.0, max_tokens=20, n=6, logprobs=0, extra_args=extra)
    [output] = llm.generate(TokensPrompt(prompt_token_ids=prompts[0]), params, use_tqdm=False)
    assert len({tuple(one.token_ids) for one in output.outputs}) > 1
    for one in output.outputs:
        ids = list(one.token_ids)
        expected = by_transformers(story[0], critic, prompts[0], ids, extra, 1.0)
        for step, token in enumerate(ids):
            assert one.logprobs[step][token].logprob == pytest.approx(float(expected[step, token]), abs=1e-3)


EXTRA = {"mavis_weights": [1.0, 0.0], "mavis_beta": 2.0, "mavis_top_k": 8}


def draw(llm: Any, prompt: list[int], **settings: Any) -> Any:
    """Draw one response of eight tokens under the same tilt."""
    params = SamplingParams(**({"temperature": 1.0, "max_tokens": 8, "logprobs": 60, "extra_args": EXTRA} | settings))
    return llm.generate(TokensPrompt(prompt_token_ids=prompt), params, use_tqdm=False)[0]


def finite(response: Any) -> list[set[int]]:
    """Return the tokens with a finite log-probability at every step."""
    return [{token for token, one in found.items() if math.isfinite(one.logprob)} for found in response.logprobs]


def test_prompt_logprobs_work_with_a_tilt(
    served: tuple[Any, Any], story: tuple[Any, Any], prompts: list[list[int]]
) -> None:
    critic, llm = served
    output = draw(llm, prompts[3], prompt_logprobs=2)
    assert len(output.prompt_logprobs) == len(prompts[3])
    ids = list(output.outputs[0].token_ids)
    expected = by_transformers(story[0], critic, prompts[3], ids, EXTRA, 1.0)
    for step, token in enumerate(ids):
        assert output.outputs[0].logprobs[step][token].logprob == pytest.approx(float(expected[step, token]), abs=1e-3)


def test_tokens_banned_before_the_tilt_stay_banned(
    served: tuple[Any, Any], story: tuple[Any, Any], prompts: list[list[int]]
) -> None:
    _, llm = served
    tokenizer = story[1]
    allowed = set(range(5, 45))
    tokens = finite(draw(llm, prompts[3], allowed_token_ids=sorted(allowed)).outputs[0])
    assert all(some <= allowed and len(some) == 8 for some in tokens)
    [first] = finite(draw(llm, prompts[3], max_tokens=1).outputs[0])
    banned = min(first)
    assert banned not in finite(draw(llm, prompts[3], max_tokens=1, bad_words=[tokenizer.decode(banned)]).outputs[0])[0]
    [without] = finite(draw(llm, prompts[3], max_tokens=1, logit_bias={banned: -100.0}).outputs[0])
    assert banned not in without
    assert len(without) == 8
    end = tokenizer.eos_token_id
    assert not any(end in some for some in finite(draw(llm, prompts[3], min_tokens=8).outputs[0]))
    choice = StructuredOutputsParams(choice=["Tim", "Lily"])
    for number in range(4):
        response = draw(llm, prompts[number], max_tokens=16, structured_outputs=choice).outputs[0]
        assert response.text in ("Tim", "Lily")


def test_penalties_and_top_k_of_the_request_act_on_the_tilted_distribution(
    served: tuple[Any, Any], story: tuple[Any, Any], prompts: list[list[int]]
) -> None:
    critic, llm = served
    response = draw(llm, prompts[5], presence_penalty=0.7).outputs[0]
    ids = list(response.token_ids)
    expected = by_transformers(story[0], critic, prompts[5], ids, EXTRA, 1.0)
    for step, found in enumerate(response.logprobs):
        penalised = expected[step].clone()
        penalised[sorted(set(ids[:step]))] -= 0.7
        penalised = torch.log_softmax(penalised, 0)
        for token, one in found.items():
            assert one.logprob == pytest.approx(float(penalised[token]), abs=1e-3)
    response = draw(llm, prompts[5], top_k=3).outputs[0]
    expected = by_transformers(story[0], critic, prompts[5], list(response.token_ids), EXTRA, 1.0)
    for step, some in enumerate(finite(response)):
        assert some == set(expected[step].topk(3).indices.tolist())


def test_a_soak_of_500_requests_with_cancellations_leaves_nothing_behind(
    served: tuple[Any, Any], story: tuple[Any, Any], prompts: list[list[int]]
) -> None:
    critic, llm = served
    requests, core, dice = mixed_requests(prompts, 500, seed=3), llm.llm_engine, Random(4)
    for number, (_, settings) in enumerate(requests):
        if number < 250 and number % 12 != 1:  # at first few requests are tilted, and batches are often plain
            settings["extra_args"] = None
    waiting, running, finished, cancelled = list(range(500)), set(), {}, set()
    while waiting or core.has_unfinished_requests():
        while waiting and len(running) < 24 and dice.random() < 0.7:
            number = waiting.pop(0)
            prompt, settings = requests[number]
            settings = settings | {"max_tokens": dice.randint(1, 24), "logprobs": 0}
            core.add_request(f"soak-{number}", TokensPrompt(prompt_token_ids=prompt), SamplingParams(**settings))
            running.add(number)
        if dice.random() < 0.02:  # all requests are preempted and recomputed in the same step
            core.reset_prefix_cache(reset_running_requests=True)
        if running and dice.random() < 0.1:
            number = dice.choice(sorted(running))
            core.abort_request([f"soak-{number}"])
            running.discard(number)
            cancelled.add(number)
        for output in core.step():
            if output.finished:
                number = int(output.request_id.partition("-")[2])
                running.discard(number)
                finished.setdefault(number, output.outputs[0])
    assert set(finished) | cancelled == set(range(500))
    assert len(cancelled) > 20
    for number, response in finished.items():
        if number in cancelled:
            continue
        prompt, settings = requests[number]
        ids = list(response.token_ids)
        temperature = settings["temperature"] or 1.0
        expected = exact_logprobs(story[0], critic, prompt, ids, settings["extra_args"], temperature)
        for step, token in enumerate(ids):
            assert response.logprobs[step][token].logprob == pytest.approx(float(expected[step, token]), abs=1e-3)
    llm.generate(TokensPrompt(prompt_token_ids=prompts[0]), SamplingParams(max_tokens=1), use_tqdm=False)
    del finished, output
    gc.collect()
    batch = processor_of(llm)._batch
    assert batch.tilted == []
    assert not batch.any_tilted
    assert [kept for kept in gc.get_objects() if isinstance(kept, PreemptedMemories)] == []


def test_plain_requests_are_the_plain_model_bit_for_bit(
    served: tuple[Any, Any], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, llm = served
    processor, seen = processor_of(llm), []
    apply = type(processor).apply

    def spy(self: Any, logits: torch.Tensor) -> torch.Tensor:
        before = logits.clone()
        tilted = apply(self, logits)
        seen.append(tilted is logits and torch.equal(logits, before))
        return tilted

    monkeypatch.setattr(type(processor), "apply", spy)
    plain = SamplingParams(temperature=1.0, max_tokens=6, extra_args={"mavis_weights": [0, 0], "mavis_beta": 3})
    llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts[:4]], plain, use_tqdm=False)
    assert seen
    assert all(seen)
