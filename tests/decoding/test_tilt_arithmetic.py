"""The processor's arithmetic against a reference in double precision, over random and extreme steps.

2,400 steps: shapes, dtypes, bans, strengths up to λ = 1e30, temperatures down to 1e-6, one candidate to all.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mavis import HiddenStateCritic, MavisTilt
from mavis.errors import ConfigError, DecodingError, WeightsError
from mavis.math.mixture import kl_unit
from mavis.rollouts import RolloutSettings
from tests.factories import tiny_llama

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TEMPERATURES = (1.0, 1.0, 0.7, 1.3, 10.0, 0.1, 1e-2, 1e-3, 1e-6)
CASES = 150
"""For each dtype, number of objectives and kind of critic: 150 × 4 × 2 × 2."""


@functools.cache
def critic_of(vocabulary: int, objectives: int, composition: str) -> Any:
    """A critic with random heads that reads states from its attribute `states` instead of a policy."""
    policy = tiny_llama(0, vocab_size=vocabulary, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    names = [f"objective {index}" for index in range(objectives)]
    critic: Any = HiddenStateCritic.for_policy(policy, names, hidden=8, rank=4, composition=composition, seed=1)
    generator = torch.Generator().manual_seed(vocabulary)
    with torch.no_grad():
        for parameter in critic.heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    critic._inputs = lambda prefix_ids: critic.states
    return critic.eval()


def random_step(generator: torch.Generator, dtype: torch.dtype, objectives: int, composition: str) -> Any:
    """Draw scores, a tilt over them, and what the tilt is, one by one."""

    def pick(values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    rows, vocabulary = pick((1, 2, 5)), pick((2, 5, 40, 300))
    scores = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * pick((0.01, 1, 8, 300))
    scores += pick((0.0, -40.0, 1000.0))
    if pick((False, True)):  # ties
        scores = scores.round()
    for row in range(rows):
        allowed = pick((vocabulary, vocabulary, vocabulary // 2 + 1, 2, 1))
        banned = torch.randperm(vocabulary, generator=generator)[: vocabulary - allowed]
        scores[row, banned] = -torch.inf
    scores = scores.to(dtype)
    size = 10.0 ** pick((-6, -1, 0, 0.5, 1, 2, 4, 8, 15, 20, 30))
    lam = torch.rand(rows, objectives, generator=generator, dtype=torch.float64) * 2 - 1
    lam = lam / lam.abs().max() * size
    if rows > 1 and pick((False, True)):
        lam[0] = 0
    critic = critic_of(vocabulary, objectives, composition)
    critic.states = torch.randn(rows, 16, generator=generator)
    top_k = min(pick((None, None, 1, 2, 7, vocabulary)) or vocabulary, vocabulary)
    temperature = pick(TEMPERATURES)
    return critic, scores, lam, None if pick((False, True)) and top_k == vocabulary else top_k, temperature


def check_step(critic: Any, scores: Tensor, lam: Tensor, top_k: int | None, temperature: float) -> Tensor:
    """Compare one step with the definition in double precision, and return it."""
    before, dtype = scores.clone(), scores.dtype
    processor = MavisTilt(lam, critic, beta=1.0, top_k=top_k, temperature=temperature, record_kl=True)
    asked: list[tuple[Tensor | None, Tensor]] = []

    def recorded(prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor) -> Tensor:
        asked.append((candidate_ids, type(critic).tilt(critic, prefix_ids, candidate_ids, lam)))
        return asked[-1][1]

    critic.tilt = recorded
    out = processor(torch.zeros(len(scores), 3, dtype=torch.long), scores)
    assert out.dtype == dtype
    assert out.shape == scores.shape
    assert torch.equal(scores, before), "the input was changed"
    assert not out.isnan().any()
    assert not (out == torch.inf).any()
    assert (out[scores == -torch.inf] == -torch.inf).all(), "a banned token came back"
    assert processor.kl.isfinite().all()
    assert (processor.kl >= 0).all()
    untilted = (lam == 0).all(1)
    assert torch.equal(out[untilted], scores[untilted])
    assert (processor.kl[untilted] == 0).all()
    if bool(untilted.all()):
        return out
    ((ids, tilt),) = asked
    assert tilt.isfinite().all()
    if ids is not None:
        expected_top = scores.topk(ids.shape[1]).values.sort().values
        assert torch.equal(scores.gather(1, ids).sort().values, expected_top)
        outside = torch.ones_like(scores, dtype=torch.bool).scatter_(1, ids, False) & ~untilted[:, None]
        assert (out[outside] == -torch.inf).all(), "a token from outside of the candidates"
    tilted = ~untilted
    logits = (scores if ids is None else scores.gather(1, ids)).double()[tilted] / temperature
    got = (out if ids is None else out.gather(1, ids)).double()[tilted] / temperature
    exact, reference = (logits + tilt.double()[tilted]).log_softmax(-1), (scores.double()[tilted] / temperature)
    precision = torch.finfo(dtype)
    kept = logits > -torch.inf
    size = (logits.masked_fill(~kept, 0).abs() + tilt[tilted].double().abs()).amax(1, keepdim=True)
    working = min(precision.eps, torch.finfo(torch.float32).eps)
    # T · log π is rounded to the dtype: by a part of itself, or of the least number that the dtype has.
    least = 2 * precision.tiny * precision.eps / temperature
    held = kept & (exact * temperature > precision.min)  # others are too small for the dtype
    error = 4 * working * size + 2 * precision.eps * exact.abs() + 1e-6 + least
    assert ((got - exact).abs() <= error)[held].all()
    rounding = 2 * precision.eps * (-got.exp() * got.clamp_min(-1e4)).nansum(1) + least + 1e-5
    assert ((got.exp().sum(1) - 1).abs() <= 2 * rounding).all()
    kl = torch.where(kept, exact.exp() * (exact - logits + reference.logsumexp(-1, keepdim=True)), 0.0).sum(1)
    assert ((processor.kl[tilted, 0].double() - kl).abs() <= (8 * working * size[:, 0] + 1e-4) * (1 + kl)).all()
    return out


@pytest.mark.parametrize("composition", ["independent", "conditioned"])
@pytest.mark.parametrize("objectives", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_steps_are_the_tilted_distribution(dtype: torch.dtype, objectives: int, composition: str) -> None:
    generator = torch.Generator().manual_seed(objectives)
    for _ in range(CASES):
        check_step(*random_step(generator, dtype, objectives, composition))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("composition", ["independent", "conditioned"])
@pytest.mark.parametrize("strength", [1e19, 1e20, 1e30])
@pytest.mark.parametrize("temperature", [1.0, 1e-3, 1e-20])
def test_the_strongest_tilt_leaves_its_best_token(
    dtype: torch.dtype, composition: str, strength: float, temperature: float
) -> None:
    critic = critic_of(40, 3, composition)
    critic.states = torch.randn(2, 16, generator=torch.Generator().manual_seed(5))
    lam = torch.tensor([[1.0, -0.5, 0.2], [0.0, 0.0, -1.0]], dtype=torch.float64) * strength
    scores = torch.randn(2, 40, generator=torch.Generator().manual_seed(6)).to(dtype)
    scores[0, 7:] = -torch.inf
    out = check_step(critic, scores, lam, None, temperature)
    if temperature == 1.0:
        tilt = critic.tilt_from_inputs(critic.states, None, lam.float())
        assert torch.equal(out.argmax(1), tilt.masked_fill(scores == -torch.inf, -torch.inf).argmax(1))


def test_the_unit_of_the_kl_to_come_does_not_overflow() -> None:
    sizes = torch.tensor([[0.0], [1e-30], [1.0], [3.0], [1e19], [1e30], [-1e30]])
    expected = [0.0, 0.0, 0.5, 2.25, 1e19, 1e30, 1e30]
    torch.testing.assert_close(kl_unit(sizes)[:, 0], torch.tensor(expected))


@pytest.mark.parametrize(("weight", "beta"), [(1e39, 1.0), (1e20, 1e15), (-1.0, 1e31), (1e300, 1e300)])
def test_a_strength_beyond_single_precision_is_refused(weight: float, beta: float) -> None:
    with pytest.raises(WeightsError, match=r"beta · weights is .* in size, expected at most 1e\+30"):
        MavisTilt([weight, 0.0, 0.0], critic_of(40, 3, "independent"), beta=beta)


@pytest.mark.parametrize("temperature", [1e-21, 1e-46, math.ulp(0.0)])
def test_a_temperature_that_no_score_survives_is_refused(temperature: float) -> None:
    message = rf"temperature is {temperature}, expected at least 1e-20. Hint: .*greedy"
    with pytest.raises(DecodingError, match=message):
        MavisTilt([1.0, 0.0, 0.0], critic_of(40, 3, "independent"), beta=1.0, temperature=temperature)
    with pytest.raises(ConfigError, match=message):
        RolloutSettings(temperature=temperature)
