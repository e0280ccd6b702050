"""Combinations of vectors: computed by hand, or compared with peft for the methods that it implements."""

from __future__ import annotations

import itertools
import sys
import warnings
from typing import Any

import pytest
import torch

from mavis.errors import MissingPackageError, VectorError
from mavis.policies.fingerprint import Fingerprint
from mavis.vectors import AlignmentVector, combine
from mavis.vectors.emr import elect
from mavis.vectors.model_tensors import Layout

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 2)}


def vector(tensors: dict[str, torch.Tensor], shapes: dict[str, Any]) -> AlignmentVector:
    return AlignmentVector(tensors, Layout("toy", shapes, {}), Fingerprint("toy", 1, 1, "0"))


@pytest.fixture
def three() -> dict[str, AlignmentVector]:
    """Random vectors, the last of which has no tensor `c`."""
    generator = torch.Generator().manual_seed(0)
    made = [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(3)]
    del made[2]["c"]
    return {name: vector(tensors, SHAPES) for name, tensors in zip("xyz", made, strict=True)}


def one_tensor(*rows: list[float]) -> dict[str, AlignmentVector]:
    return {f"t{i}": vector({"a": torch.tensor(row)}, {"a": (len(row),)}) for i, row in enumerate(rows)}


def test_linear_is_the_weighted_sum() -> None:
    vectors = one_tensor([1.0, 2.0], [10.0, -4.0], [100.0, 100.0])
    assert combine(vectors, {"t0": 0.5, "t1": -1.0}).tensors["a"].tolist() == [-9.5, 5.0]
    soup = combine(vectors, dict.fromkeys(vectors, 1 / 4))
    assert soup.tensors["a"].tolist() == [27.75, 24.5]


@pytest.mark.parametrize(
    ("method", "density"),
    [("linear", None), ("emr", None), ("ties", 0.5), ("dare", 0.5), ("dare_ties", 0.5), ("magnitude_prune", 0.5)],
)
def test_coefficients_of_0_change_no_tensor(
    three: dict[str, AlignmentVector], method: Any, density: float | None
) -> None:
    for coefficients in ({}, {"x": 0}, {"x": 0.0, "y": -0.0, "z": 0}):
        assert not combine(three, coefficients, method, density).tensors
    some = combine(three, {"x": 0.7, "y": 0}, method, density)
    named = combine(three, {"z": 0, "x": 0.7}, method, density)
    assert set(some.tensors) == set(SHAPES)
    assert all(torch.equal(tensor, named.tensors[name]) for name, tensor in some.tensors.items())


# EMR


def test_the_sign_and_magnitude_of_each_element_are_elected() -> None:
    one, other, third = torch.tensor([[1.0, -2, 3, 0, 1], [4.0, 1, -1, 0, -1], [-2.0, -1, -1, 0, 0]])
    # sums 3, −2, 1, 0, 0; the largest of those with the elected sign
    assert elect([one, other, third]).tolist() == [4, -2, 3, 0, 0]


def test_emr_masks_and_rescales_by_hand() -> None:
    vectors = one_tensor([1.0, -2.0, 3.0], [4.0, 1.0, -1.0], [-2.0, -1.0, -1.0])
    # τ = [4, −2, 3]; masks [1, 1, 1], [1, 0, 0], [0, 1, 0]; λ = 6/9, 6/4, 4/2
    for name, expected in {"t0": [8 / 3, -4 / 3, 2], "t1": [6, 0, 0], "t2": [0, -4, 0]}.items():
        merged = combine(vectors, {name: 1.0}, "emr").tensors["a"]
        torch.testing.assert_close(merged, torch.tensor(expected, dtype=torch.float32))
    both = combine(vectors, {"t1": 0.5, "t2": -1.0}, "emr").tensors["a"]
    torch.testing.assert_close(both, torch.tensor([3.0, 4.0, 0.0]))


def test_emr_scales_are_computed_over_all_tensors() -> None:
    shapes = {"a": (2,), "b": (1,)}
    one = vector({"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([2.0])}, shapes)
    other = vector({"a": torch.tensor([3.0, -5.0])}, shapes)
    # τ = [3, −5], [2]; the mask of the first [1, 0], [1]; λ = (1 + 1 + 2) / (3 + 2)
    merged = combine({"one": one, "other": other}, {"one": 1}, "emr")
    torch.testing.assert_close(merged.tensors["a"], torch.tensor([2.4, 0.0]))
    torch.testing.assert_close(merged.tensors["b"], torch.tensor([1.6]))


def test_emr_of_one_vector_is_that_vector(three: dict[str, AlignmentVector]) -> None:
    merged = combine({"x": three["x"]}, {"x": 1}, "emr")
    for name, tensor in three["x"].tensors.items():
        torch.testing.assert_close(merged.tensors[name], tensor)


# peft


def rows_of(three: dict[str, AlignmentVector], name: str) -> list[torch.Tensor]:
    return [v.tensors[name] if name in v.tensors else torch.zeros(SHAPES[name]) for v in three.values()]


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_pruning_by_magnitude_matches_peft(three: dict[str, AlignmentVector], method: Any, density: float) -> None:
    peft_utils = pytest.importorskip("peft.utils.merge_utils")
    merged = combine(three, {"x": 1.0, "y": -0.5, "z": 2.0}, method, density)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in SHAPES:
            expected = getattr(peft_utils, method)(rows_of(three, name), torch.tensor([1.0, -0.5, 2.0]), density)
            assert torch.equal(merged.tensors[name], expected)


def test_ties_by_hand() -> None:
    vectors = one_tensor([1.0, -2.0, 3.0, 0.1], [4.0, 1.0, 0.2, -3.0], [-2.0, -1.0, 0.3, 0.1])
    # The two largest of each: [0, −2, 3, 0], [4, 0, 0, −3], [−2, −1, 0, 0]; signs of the sums + − + −
    merged = combine(vectors, dict.fromkeys(vectors, 1.0), "ties", 0.5).tensors["a"]
    torch.testing.assert_close(merged, torch.tensor([4.0, -1.5, 3.0, -3.0]))


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_random_pruning_matches_peft_and_is_reproducible(three: dict[str, AlignmentVector], method: Any) -> None:
    peft_utils = pytest.importorskip("peft.utils.merge_utils")
    coefficients = torch.tensor([1.0, -0.5, 2.0])
    by_name = dict(zip("xyz", coefficients.tolist(), strict=True))
    state = torch.random.get_rng_state()
    merged = combine(three, by_name, method, 0.5, seed=3)
    first = {name: merged.tensors[name] for name in SHAPES}
    again = {name: merged.tensors[name] for name in reversed(SHAPES)}
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in SHAPES)
    other = combine(three, by_name, method, 0.5, seed=4)
    assert not all(torch.equal(first[name], other.tensors[name]) for name in SHAPES)
    for name, tensor in first.items():  # each element is what one choice of kept and dropped gives
        rows = torch.stack(rows_of(three, name))
        possible = []
        for kept in itertools.product([0.0, 1.0], repeat=3):
            pruned = list((rows.movedim(0, -1) * torch.tensor(kept) / 0.5).movedim(-1, 0))
            if method == "dare":
                possible.append(peft_utils.task_arithmetic(pruned, coefficients))
            else:
                signs = peft_utils.calculate_majority_sign_mask(torch.stack(pruned))
                weighted = [row * c for row, c in zip(pruned, coefficients, strict=True)]
                possible.append(peft_utils.disjoint_merge(torch.stack(weighted), signs))
        assert bool(torch.isclose(torch.stack(possible), tensor).any(0).all())


def test_the_mean_of_dare_is_the_sum(three: dict[str, AlignmentVector]) -> None:
    pytest.importorskip("peft")
    coefficients = {"x": 1.0, "y": -0.5}
    drawn = [combine(three, coefficients, "dare", 0.5, seed=seed).tensors["b"] for seed in range(200)]
    spread = torch.stack(drawn).std(0) / 200**0.5
    difference = torch.stack(drawn).mean(0) - combine(three, coefficients).tensors["b"]
    assert bool((difference.abs() < 5 * spread + 1e-6).all())  # a false alarm in a million


def test_without_peft_it_says_what_to_install(
    three: dict[str, AlignmentVector], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft.utils.merge_utils", None)
    with pytest.raises(
        MissingPackageError, match="method 'ties' needs peft, which is not installed. Hint: pip install 'mavis-decoding"
    ):
        combine(three, {"x": 1}, "ties", 0.5)
    assert combine(three, {"x": 1}).tensors


def test_other_generators_are_not_seeded(three: dict[str, AlignmentVector], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("it was seeded"))
    assert combine(three, {"x": 1}, "dare", 0.5).tensors["a"].any()


def test_no_vectors_cannot_be_combined() -> None:
    with pytest.raises(VectorError, match=r"vectors is \{\}. Hint: pass at least one by name"):
        combine({}, {})
