"""A fingerprint knows the same weights in any precision, and tells other weights apart."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import mavis
from mavis.policies import Fingerprint
from mavis.policies.applied_vectors import AppliedVectors, vectors_of_policies
from mavis.vectors import AlignmentVector
from tests.factories import Dequantisable, Opaque, tiny_llama, with_weights_of

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = list(product(PRECISIONS, PRECISIONS))


def spread_policy() -> Any:
    """A policy with weights of every magnitude, beyond the range of float16 on both sides."""
    policy = tiny_llama()
    with torch.no_grad():
        for weight in policy.parameters():
            weight.copy_(torch.randn_like(weight) * torch.exp2(torch.empty_like(weight).uniform_(-32, 12)))
    return policy


def test_weights_beyond_the_range_of_float16_match_what_it_makes_of_them() -> None:
    policy = spread_policy()
    with torch.no_grad():
        policy.lm_head.weight.mul_(1e4)
    half = in_precision(policy, torch.float16)
    assert bool(half.lm_head.weight.isinf().any())
    assert Fingerprint.of(policy).matches(Fingerprint.of(half))
    with torch.no_grad():
        policy.lm_head.weight.neg_()
    assert not Fingerprint.of(policy).matches(Fingerprint.of(half))


def policies() -> dict[str, Any]:
    return {"embedded": mavis.embedded.load()[0], "tiny": tiny_llama(), "spread": spread_policy()}


def in_precision(policy: Any, dtype: torch.dtype) -> Any:
    return copy.deepcopy(policy).to(dtype)


@pytest.mark.parametrize("name", ["embedded", "tiny", "spread"])
@pytest.mark.parametrize(("trained", "served"), PAIRS, ids=str)
def test_the_same_weights_in_another_precision_match(
    name: str, trained: torch.dtype, served: torch.dtype, tmp_path: Path
) -> None:
    policy = policies()[name]
    first = in_precision(policy, trained)
    critic = mavis.HiddenStateCritic.for_policy(first, ["a"], hidden=4, rank=4)
    critic.save_pretrained(tmp_path / "critic")
    loaded, second = mavis.Critic.from_pretrained(tmp_path / "critic"), in_precision(policy, served)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.attach(second).detach()
    assert loaded.fingerprint.matches(Fingerprint.of(second))


@pytest.mark.parametrize(("trained", "served"), PAIRS, ids=str)
def test_other_weights_do_not_match_in_any_precision(trained: torch.dtype, served: torch.dtype) -> None:
    policy = mavis.embedded.load()[0]
    tuned = copy.deepcopy(policy)
    torch.manual_seed(0)
    with torch.no_grad():  # as after fine-tuning: every weight a little
        for weight in tuned.parameters():
            weight.add_(0.02 * weight.std() * torch.randn_like(weight))
    fingerprint, other = Fingerprint.of(in_precision(policy, trained)), in_precision(tuned, served)
    assert not fingerprint.matches(Fingerprint.of(other))
    with pytest.warns(UserWarning, match="shape but not the weights"):
        fingerprint.check(other)


def test_the_embedded_critic_knows_its_policy_in_every_precision() -> None:
    policy = mavis.embedded.load()[0]
    critic = mavis.Critic.from_pretrained(mavis.embedded.critic_path())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in PRECISIONS:
            critic.attach(in_precision(policy, dtype)).detach()


def test_what_version_0_1_saved_matches_as_before_and_says_what_float16_hides() -> None:
    policy = mavis.embedded.load()[0]
    old = Fingerprint("llama", 128, 2048, "80d4df1fd927c378")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        old.check(policy)
        old.check(in_precision(policy, torch.bfloat16))
    with pytest.warns(UserWarning, match="in float16, to which .* cannot compare .* Load the policy in bfloat16"):
        old.check(in_precision(policy, torch.float16))


def test_vectors_on_a_policy_in_float16_are_noticed() -> None:
    policy = mavis.embedded.load()[0]
    fingerprint, half = Fingerprint.of(policy), in_precision(policy, torch.float16)
    vectors_of_policies[half] = AppliedVectors(("kind",), Fingerprint.of(half).weights)
    with pytest.warns(UserWarning, match="'kind'"):
        fingerprint.check(half)


def test_a_vector_knows_its_base_in_float16(tmp_path: Path) -> None:
    base, aligned = tiny_llama(), tiny_llama(seed=1)
    vector = AlignmentVector.between(base, aligned)
    vector.save(tmp_path / "vector")
    loaded = AlignmentVector.load(tmp_path / "vector")
    assert loaded.is_from(in_precision(base, torch.float16))
    assert not loaded.is_from(in_precision(aligned, torch.float16))


def test_manifests_and_comparisons_leave_the_sample_out() -> None:
    fingerprint = Fingerprint.of(tiny_llama())
    assert fingerprint == replace(fingerprint, sample="")
    assert list(fingerprint.to_json()) == ["model_type", "hidden_size", "vocab_size", "weights"]
    assert Fingerprint(**json.loads(json.dumps(fingerprint.to_json_with_sample()))).sample == fingerprint.sample


@pytest.mark.parametrize("sample", ["float16:", "float16:!", "float16:AAA=", "bfloat16:AAAA"])
def test_an_edited_sample_matches_nothing(sample: str) -> None:
    half = Fingerprint.of(tiny_llama().to(torch.float16))
    assert not replace(half, weights="other", sample=sample).matches(half)


def test_weights_that_cannot_be_read_leave_the_fingerprint_to_the_others() -> None:
    policy, other = with_weights_of(Opaque), with_weights_of(Opaque)
    fingerprint = Fingerprint.of(policy)
    assert fingerprint.matches(Fingerprint.of(other))
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    assert not fingerprint.matches(Fingerprint.of(other))


def test_quantised_weights_are_dequantised_for_the_fingerprint() -> None:
    assert Fingerprint.of(with_weights_of(Dequantisable)) == Fingerprint.of(tiny_llama())


@pytest.mark.parametrize("kind", [Opaque, Dequantisable])
def test_a_critic_can_be_built_for_quantised_layers(kind: type[Opaque]) -> None:
    critic = mavis.HiddenStateCritic.for_policy(with_weights_of(kind), ["a"], hidden=4, rank=4)
    assert critic.projection is not None
    assert critic.projection.in_features == 16
