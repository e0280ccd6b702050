"""The tilted distribution of one step, against its closed form and its invariances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mavis.errors import DecodingError
from mavis.math.kl import step_kl
from mavis.math.tilt import tilted_logprobs, top_candidates

finite = st.floats(-20, 20, width=32)


def rows(length: int):
    return arrays("float32", (3, length), elements=finite).map(torch.from_numpy)


@given(rows(7), arrays("float32", (3, 7, 2), elements=st.floats(-3, 3, width=32)).map(torch.from_numpy))
def test_with_every_token_a_candidate_it_is_the_closed_form(logits: torch.Tensor, values: torch.Tensor) -> None:
    lam = torch.tensor([0.7, 1.9])
    expected = torch.softmax(logits.double(), -1) * torch.exp((values.double() * lam).sum(-1))
    expected = expected / expected.sum(-1, keepdim=True)
    got = tilted_logprobs(logits, (values * lam).sum(-1)).exp()
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_tilt_is_added_after_the_division_by_the_temperature(temperature: float) -> None:
    logits, tilt = torch.tensor([[1.0, 2.0, -torch.inf]]), torch.tensor([[0.5, -0.25, 9.0]])
    weight = torch.tensor([1 / temperature + 0.5, 2 / temperature - 0.25]).exp()
    torch.testing.assert_close(
        tilted_logprobs(logits, tilt, temperature).exp(), torch.tensor([[*(weight / weight.sum()), 0.0]])
    )


@given(rows(6), rows(6), st.floats(-50, 50))
def test_a_constant_added_to_all_values_changes_nothing(
    logits: torch.Tensor, tilt: torch.Tensor, constant: float
) -> None:
    torch.testing.assert_close(
        tilted_logprobs(logits, tilt + constant), tilted_logprobs(logits, tilt), atol=1e-4, rtol=1e-4
    )


@given(rows(8), rows(8), st.lists(st.floats(0, 5), min_size=2, max_size=6))
def test_expected_value_and_kl_never_fall_as_beta_rises(
    logits: torch.Tensor, values: torch.Tensor, betas: list[float]
) -> None:
    logits, values = logits.double(), values.double()
    reference = torch.log_softmax(logits, -1)
    value, kl = [], []
    for beta in sorted(betas):
        logprobs = tilted_logprobs(logits, beta * values)
        value.append((logprobs.exp() * values).sum(-1))
        kl.append(step_kl(logprobs, reference))
    for series in (torch.stack(value), torch.stack(kl)):
        assert (series.diff(dim=0) >= -1e-9).all()


@settings(max_examples=60)
@given(st.integers(1, 6), st.sampled_from([5, 64, 512, 576, 1280, 1300]), st.data())
def test_candidates_are_the_top_k_even_with_ties_and_bans(k: int, vocabulary: int, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-4, 5, (3, vocabulary), generator=generator).float()
    scores[torch.rand(scores.shape, generator=generator) < 0.3] = -torch.inf
    k = min(k, vocabulary)
    before = scores.clone()
    values, ids = top_candidates(scores, k)
    assert torch.equal(scores, before)
    assert torch.equal(values.sort().values, scores.topk(k).values.sort().values)
    assert torch.equal(scores.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("top_k", [0, -1, 9])
def test_a_number_of_candidates_beyond_the_vocabulary_is_refused(top_k: int) -> None:
    with pytest.raises(DecodingError, match=rf"top_k is {top_k}, but the policy has 8 tokens.*Hint: use top_k=None"):
        top_candidates(torch.zeros(2, 8), top_k)
