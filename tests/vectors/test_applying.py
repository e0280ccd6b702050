"""Vectors applied to a policy: its weights in the block, and their exact restoration afterwards."""

from __future__ import annotations

import copy
import math
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mavis.errors import VectorError
from mavis.vectors import AlignmentVector, Vectors
from mavis.vectors.applying import add_to
from tests.factories import Dequantisable, Opaque, tiny_llama, with_weights_of

Build = Callable[..., Any]
Logits = Callable[[Any], Tensor]

BACKUP = pytest.mark.parametrize("backup", ["cpu", "disk"])
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


# in the block


@TIED
def test_at_0_it_is_the_base_and_at_1_the_aligned_model(build: Build, tuned: Build, logits: Logits, tied: bool) -> None:
    base = build(tied)
    aligned = tuned(base)
    vectors = Vectors({"v": AlignmentVector.between(base, aligned)})
    plain, wanted = logits(base), logits(aligned)
    assert (plain - wanted).abs().max() > 0.05
    with vectors.applied(base, {"v": 1.0}) as policy:
        assert policy is base
        torch.testing.assert_close(logits(base), wanted, atol=1e-6, rtol=0)
    with vectors.applied(base, {"v": 0.0}):
        assert torch.equal(logits(base), plain)
    with vectors.applied(base, {}):
        assert torch.equal(logits(base), plain)
    assert torch.equal(logits(base), plain)


def test_of_folders_at_1_it_is_the_aligned_model_bit_for_bit_in_bf16(
    build: Build, tuned: Build, saved: Callable[..., Path]
) -> None:
    base = build(dtype=torch.bfloat16)
    aligned = tuned(base)
    vectors = Vectors({"v": AlignmentVector.between(saved(base, "b"), saved(aligned, "a"))})
    with vectors.applied(base, {"v": 1}):
        assert all(torch.equal(base.get_parameter(name), tensor) for name, tensor in aligned.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_any_finite_coefficient_can_be_applied(build: Build, tuned: Build, dtype: torch.dtype) -> None:
    base = build(dtype=dtype)
    v, w = (AlignmentVector.between(base, tuned(base, seed=seed)) for seed in (1, 2))
    own = {name: tensor.clone() for name, tensor in base.named_parameters()}
    for one, other in [(0.5, -1.0), (-3, 0.25), (2.5, 7)]:
        with Vectors({"v": v, "w": w}).applied(base, {"w": other, "v": one}):
            for name, tensor in base.named_parameters():
                exact = own[name].double() + one * v.tensors[name].double() + other * w.tensors[name].double()
                assert tensor.dtype == dtype
                torch.testing.assert_close(tensor, exact.to(dtype), atol=1e-6, rtol=torch.finfo(dtype).eps)


def test_a_vector_transfers_to_another_policy(build: Build, tuned: Build, before: Any) -> None:
    base = build()
    vector = AlignmentVector.between(base, tuned(base))
    later = tuned(base, seed=5)
    vector.check(later)
    assert not vector.is_from(later)
    expected = {name: tensor + vector.tensors[name] for name, tensor in later.named_parameters()}
    was = before(later)
    with Vectors({"v": vector}).applied(later, {"v": 1}):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in later.named_parameters())
    was.assert_unchanged()


# afterwards


@BACKUP
@TIED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_tensor_is_restored(
    build: Build, tuned: Build, before: Any, temporary: Path, dtype: torch.dtype, tied: bool, backup: str
) -> None:
    policy = build(tied, dtype).requires_grad_(True)
    vectors = Vectors({"v": AlignmentVector.between(policy, tuned(policy))})
    was = before(policy)
    for coefficient in (1.0, -0.3, 1e3, 0):
        applied = vectors.applied(policy, {"v": coefficient}, backup=backup)
        with applied:
            changed = not torch.equal(policy.lm_head.weight, was.tensors["lm_head.weight"])
            assert changed == (coefficient != 0)
            assert all(parameter.requires_grad for parameter in policy.parameters())
            assert (policy.lm_head.weight is policy.model.embed_tokens.weight) == tied
        was.assert_unchanged()
    with applied:  # it can be entered again
        pass
    was.assert_unchanged()
    assert not list(temporary.iterdir())


@BACKUP
def test_only_tensors_that_the_vector_changes_are_backed_up(
    build: Build, tuned: Build, temporary: Path, backup: str
) -> None:
    policy = build()
    vectors = Vectors({"v": AlignmentVector.between(policy, tuned(policy, only="q_proj"))})
    with vectors.applied(policy, {"v": 1}, backup=backup):
        assert len(list(temporary.rglob("*.safetensors"))) == (2 if backup == "disk" else 0)


@BACKUP
def test_an_exception_in_the_block_changes_nothing(
    build: Build, tuned: Build, before: Any, temporary: Path, backup: str
) -> None:
    policy = build(tied=True, dtype=torch.bfloat16)
    vectors = Vectors({"v": AlignmentVector.between(policy, tuned(policy))})
    was = before(policy)
    with pytest.raises(KeyboardInterrupt), vectors.applied(policy, {"v": 1}, backup=backup):
        raise KeyboardInterrupt
    was.assert_unchanged()
    with vectors.applied(policy, {"v": 1}):
        pass


@BACKUP
def test_an_exception_on_entering_changes_nothing(
    build: Build, tuned: Build, before: Any, temporary: Path, backup: str
) -> None:
    policy = build()
    vector = AlignmentVector.between(policy, tuned(policy))
    tensors = dict(vector.tensors) | {"model.norm.weight": torch.full((16,), 3e38)}
    with torch.no_grad():
        policy.model.norm.weight.fill_(3e38)
    was = before(policy)
    vectors = Vectors({"v": AlignmentVector(tensors, vector.layout, vector.base)})
    with pytest.raises(VectorError, match="'model.norm.weight' plus the vectors overflows torch.float32"):
        with vectors.applied(policy, {"v": 1}, backup=backup):
            pytest.fail("nothing was wrong")
    was.assert_unchanged()
    assert not list(temporary.iterdir())
    with vectors.applied(policy, {"v": 0.1}):
        pass
    was.assert_unchanged()


def test_changes_in_the_block_are_undone_as_well(build: Build, tuned: Build, before: Any) -> None:
    policy = build()
    vectors = Vectors({"v": AlignmentVector.between(policy, tuned(policy))})
    was = before(policy)
    with vectors.applied(policy, {"v": 1}), torch.no_grad():
        policy.lm_head.weight.zero_()
    was.assert_unchanged()


def test_a_policy_that_is_converted_in_the_block_is_restored(build: Build, tuned: Build) -> None:
    policy = build()
    vectors = Vectors({"v": AlignmentVector.between(policy, tuned(policy))})
    with vectors.applied(policy, {"v": 1}):
        policy.double()
    assert all(torch.equal(t, p) for t, p in zip(policy.parameters(), build().double().parameters(), strict=True))


def test_inference_mode_and_compiled_policies_work(build: Build, tuned: Build, before: Any) -> None:
    policy = build()
    vectors = Vectors({"v": AlignmentVector.between(policy, tuned(policy))})
    was = before(policy)
    with torch.inference_mode(), vectors.applied(policy, {"v": 1}):
        pass
    was.assert_unchanged()
    compiled = torch.compile(policy, backend="eager")
    with vectors.applied(compiled, {"v": 1}):
        assert not torch.equal(policy.lm_head.weight, was.tensors["lm_head.weight"])
        with pytest.raises(VectorError, match="applied already"), vectors.applied(policy, {"v": 1}):
            pass
    was.assert_unchanged()


# one at a time


@pytest.mark.parametrize("coefficient", [0.5, 0.0])
def test_a_policy_has_one_application_at_a_time(build: Build, tuned: Build, before: Any, coefficient: float) -> None:
    policy = build()
    vector = AlignmentVector.between(policy, tuned(policy))
    outer, inner = Vectors({"v": vector, "w": vector}), Vectors({"x": vector})
    was = before(policy)
    with outer.applied(policy, {"v": 1, "w": 1}):
        inside = before(policy)
        with pytest.raises(VectorError, match="has vectors applied already: 'v', 'w'. Hint: leave that block first"):
            with inner.applied(policy, {"x": coefficient}):
                pytest.fail("it was applied")
        inside.assert_unchanged()
    was.assert_unchanged()
    with inner.applied(policy, {"x": coefficient}):
        pass


def test_two_contexts_cannot_overlap(build: Build, tuned: Build, before: Any) -> None:
    policy = build()
    vectors = Vectors({"v": AlignmentVector.between(policy, tuned(policy))})
    was = before(policy)
    one, other = vectors.applied(policy, {"v": 1}), vectors.applied(policy, {"v": -1})
    with pytest.raises(VectorError, match="not applied"):
        one.__exit__(None, None, None)
    one.__enter__()
    for again in (one, other):
        with pytest.raises(VectorError, match="applied already"):
            again.__enter__()
    with pytest.raises(VectorError, match="not applied"):
        other.__exit__(None, None, None)
    one.__exit__(None, None, None)
    was.assert_unchanged()


def test_threads_apply_vectors_one_at_a_time(build: Build, tuned: Build, before: Any) -> None:
    policy = build()
    vectors = Vectors({"v": AlignmentVector.between(policy, tuned(policy))})
    was, start, refused = before(policy), threading.Barrier(4), []

    def apply(coefficient: float) -> None:
        start.wait()
        for _ in range(5):
            try:
                with vectors.applied(policy, {"v": coefficient}):
                    pass
            except VectorError as error:
                refused.append(error.message)

    threads = [threading.Thread(target=apply, args=(i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("applied already" in message for message in refused)
    was.assert_unchanged()


def test_two_policies_are_independent(build: Build, tuned: Build, logits: Logits) -> None:
    base = build()
    vectors = Vectors({"v": AlignmentVector.between(base, tuned(base))})
    other = copy.deepcopy(base)
    with vectors.applied(base, {"v": 1}), vectors.applied(other, {"v": -1}):
        assert not torch.equal(logits(base), logits(other))
    assert torch.equal(logits(base), logits(other))


# errors


def test_a_policy_that_does_not_fit_is_refused_unchanged(build: Build, tuned: Build, before: Any) -> None:
    base = build()
    vectors = Vectors({"v": AlignmentVector.between(base, tuned(base))})
    for other in (build(vocab_size=44), build(num_hidden_layers=3), build(tied=True), build(intermediate_size=32)):
        was = before(other)
        with pytest.raises(VectorError, match="policy does not fit the vector: '(model|lm_head)"):
            with vectors.applied(other, {"v": 1}):
                pytest.fail("it was applied")
        was.assert_unchanged()


@pytest.mark.parametrize(
    ("coefficients", "options", "message"),
    [
        ({"v": math.nan}, {}, "the coefficient of 'v' is nan, expected a finite number"),
        ({"v": -math.inf}, {}, "the coefficient of 'v' is -inf, expected a finite number"),
        ({"v": "much"}, {}, "the coefficient of 'v' is 'much', expected a finite number"),
        ({"w": 1}, {}, "coefficients names unknown vector 'w'. Hint: known: v"),
        ({"vv": 1}, {}, "coefficients names unknown vector 'vv'. Hint: "),
        ([1.0], {}, "coefficients is a list"),
        ({"v": 1}, {"backup": "gpu"}, "backup is 'gpu'. Hint: "),
        ({"v": 1}, {"method": "tie"}, "method is 'tie'. Hint: did you mean 'ties'?"),
        ({"v": 1}, {"method": "ties"}, "density is None and method is 'ties', which needs a density"),
        ({"v": 1}, {"density": 0.5}, "density is 0.5 and method is 'linear', which takes no density"),
        ({"v": 1}, {"method": "ties", "density": 0}, "density is 0.0, expected more than 0 and at most 1"),
        ({"v": 1}, {"method": "ties", "density": math.nan}, "density is nan, expected a finite number"),
    ],
)
def test_invalid_arguments_are_refused(
    build: Build, tuned: Build, coefficients: Any, options: dict[str, Any], message: str
) -> None:
    policy = build()
    vectors = Vectors({"v": AlignmentVector.between(policy, tuned(policy))})
    with pytest.raises(VectorError, match=message):
        vectors.applied(policy, coefficients, **options)


def test_quantised_weights_are_refused(build: Build, tuned: Build) -> None:
    base = build()
    vectors = Vectors({"v": AlignmentVector.between(base, tuned(base))})
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(VectorError, match="'lm_head.weight' is torch.int8, to which vectors cannot be added"):
        with vectors.applied(base, {"v": 1}):
            pytest.fail("it was applied")


def test_vectors_have_names_and_one_layout(build: Build, tuned: Build, tmp_path: Path) -> None:
    base, wide = build(), build(hidden_size=32)
    vector = AlignmentVector.between(base, tuned(base))
    vector.save(tmp_path / "v")
    vectors = Vectors({"folder": tmp_path / "v", "vector": vector})
    assert list(vectors) == ["folder", "vector"]
    assert (vectors["folder"] - vectors["vector"]).norm() == 0
    for wrong in ({}, [vector]):
        with pytest.raises(VectorError, match="Hint: pass at least one by name"):
            Vectors(wrong)  # type: ignore[arg-type]
    with pytest.raises(
        VectorError, match="vector 'w' does not fit vector 'v': 'model.embed_tokens.weight' is of shape"
    ):
        Vectors({"v": vector, "w": AlignmentVector.between(wide, tuned(wide))})


# errors in the block, or on leaving it


def fail_once(monkeypatch: pytest.MonkeyPatch, at: int, error: type[BaseException]) -> None:
    """Make restoring the `at`-th tensor fail, once."""
    copy_, calls = Tensor.copy_, 0

    def broken(self: Tensor, *arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return copy_(self, *arguments)

    monkeypatch.setattr(Tensor, "copy_", broken)


@BACKUP
@pytest.mark.parametrize("at", [1, 5, 21])
def test_an_interrupt_while_restoring_is_raised_afterwards(
    build: Build, tuned: Build, before: Any, temporary: Path, monkeypatch: pytest.MonkeyPatch, backup: str, at: int
) -> None:
    policy = build()
    vectors = Vectors({"v": AlignmentVector.between(policy, tuned(policy))})
    was = before(policy)
    with pytest.raises(KeyboardInterrupt), vectors.applied(policy, {"v": 1}, backup=backup):
        fail_once(monkeypatch, at, KeyboardInterrupt)
    was.assert_unchanged()
    assert not list(temporary.iterdir())
    monkeypatch.undo()
    with vectors.applied(policy, {"v": 1}):
        pass


@BACKUP
def test_tensors_that_cannot_be_restored_are_named_and_can_be_retried(
    build: Build, tuned: Build, before: Any, monkeypatch: pytest.MonkeyPatch, backup: str
) -> None:
    policy = build()
    vectors = Vectors({"v": AlignmentVector.between(policy, tuned(policy))})
    was = before(policy)
    applied = vectors.applied(policy, {"v": 1}, backup=backup)
    applied.__enter__()
    fail_once(monkeypatch, 3, RuntimeError)
    with pytest.raises(VectorError, match=r"could not be restored: '[^']+' \(RuntimeError\)"):
        applied.__exit__(None, None, None)
    now = policy.state_dict()
    assert sum(not torch.equal(now[name], tensor) for name, tensor in was.tensors.items()) == 1
    with pytest.raises(VectorError, match="applied already"), vectors.applied(policy, {"v": 1}):
        pass
    applied.__exit__(None, None, None)
    was.assert_unchanged()
    with vectors.applied(policy, {"v": 1}):
        pass


@BACKUP
def test_tensors_are_restored_under_an_adapter_added_in_the_block(build: Build, tuned: Build, backup: str) -> None:
    peft = pytest.importorskip("peft")
    policy = build()
    vectors = Vectors({"v": AlignmentVector.between(policy, tuned(policy))})
    own = {name: (tensor, tensor.clone()) for name, tensor in policy.named_parameters()}
    with vectors.applied(policy, {"v": 1}, backup=backup):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj", "down_proj"]), policy)
    assert all(torch.equal(tensor, before) for tensor, before in own.values())
    assert {id(tensor) for tensor, _ in own.values()} <= {id(tensor) for tensor in policy.parameters()}


def test_resized_embeddings_are_named_and_the_rest_is_restored(build: Build, tuned: Build) -> None:
    policy = build()
    vectors = Vectors({"v": AlignmentVector.between(policy, tuned(policy))})
    own = {name: tensor.clone() for name, tensor in policy.named_parameters()}
    with pytest.raises(VectorError, match="could not be restored") as raised, vectors.applied(policy, {"v": 1}):
        policy.resize_token_embeddings(44)
    for name, tensor in policy.named_parameters():
        assert (repr(name) in str(raised.value)) == (tensor.shape != own[name].shape)
        assert tensor.shape != own[name].shape or torch.equal(tensor, own[name])


def test_an_interrupt_on_entering_leaves_the_policy_free(
    build: Build, tuned: Build, before: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = build()
    vectors = Vectors({"v": AlignmentVector.between(policy, tuned(policy))})
    was = before(policy)
    fail_once(monkeypatch, 4, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt), vectors.applied(policy, {"v": 1}):
        pytest.fail("it was interrupted")
    monkeypatch.undo()
    was.assert_unchanged()
    with vectors.applied(policy, {"v": 1}):
        pass


# shared memory


def test_two_parameters_at_one_address_are_tied(build: Build, tuned: Build, before: Any) -> None:
    policy = build()
    shared = policy.model.embed_tokens.weight
    policy.lm_head.weight = torch.nn.Parameter(shared.detach(), requires_grad=False)
    assert policy.lm_head.weight is not shared
    vector = AlignmentVector.between(policy, tuned(build(tied=True)))
    assert "lm_head.weight" not in vector.tensors
    was = before(policy)
    for backup in ("cpu", "disk"):
        with Vectors({"v": vector}).applied(policy, {"v": 1}, backup=backup):  # type: ignore[arg-type]
            now = was.tensors["lm_head.weight"] + vector.tensors["model.embed_tokens.weight"]
            assert torch.equal(policy.lm_head.weight, now)
        was.assert_unchanged()


def test_overlapping_tensors_are_refused_unchanged(build: Build, tuned: Build, before: Any) -> None:
    policy = build()
    vectors = Vectors({"v": AlignmentVector.between(policy, tuned(policy))})
    memory = torch.randn(17)
    for one, other in [(torch.ones(1).expand(16), torch.ones(16)), (memory[:16], memory[1:])]:
        policy.model.norm.weight = torch.nn.Parameter(one, requires_grad=False)
        policy.model.layers[0].input_layernorm.weight = torch.nn.Parameter(other, requires_grad=False)
        was = before(policy)
        with (
            pytest.raises(
                VectorError,
                match="elements of 'model.norm.weight' that share memory|has .* in memory that overlaps 'model",
            ),
            vectors.applied(policy, {"v": 1}),
        ):
            pytest.fail("it was applied")
        was.assert_unchanged()


# chunked sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_chunked_sum_equals_the_whole_sum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, difference = (torch.randn(7, 5, generator=generator) for _ in range(2))
    weight = weight.to(dtype)
    exact = torch.promote_types(dtype, torch.float32)
    expected = (weight.to(exact) + difference.to(exact)).to(dtype)
    monkeypatch.setattr("mavis.vectors.applying._CHUNK_SIZE", 8)
    for layout in (weight.clone(), weight.t().contiguous().t()):
        add_to(layout, difference, "w")
        assert torch.equal(layout, expected)


def test_an_infinite_weight_does_not_hide_an_overflow() -> None:
    weight = torch.tensor([math.inf, 3e38])
    with pytest.raises(VectorError, match="'w' plus the vectors overflows torch.float32"):
        add_to(weight, torch.tensor([0.0, 3e38]), "w")
    weight = torch.tensor([math.inf, 1.0])
    add_to(weight, torch.tensor([0.0, 1.0]), "w")
    assert weight.tolist() == [math.inf, 2.0]


# other policies, and full disks


def test_a_policy_that_is_a_folder_is_refused(build: Build, tuned: Build) -> None:
    base = build()
    vectors = Vectors({"v": AlignmentVector.between(base, tuned(base))})
    with pytest.raises(VectorError, match="policy is a str, expected a model"):
        vectors.applied("folder", {"v": 1})


def test_a_policy_built_in_inference_mode_works(build: Build, tuned: Build) -> None:
    with torch.inference_mode():
        policy = build()
        own = [tensor.clone() for tensor in policy.parameters()]
    vectors = Vectors({"v": AlignmentVector.between(policy, tuned(build()))})
    with vectors.applied(policy, {"v": 1}):
        assert not torch.equal(next(policy.parameters()), own[0])
    assert all(torch.equal(tensor, before) for tensor, before in zip(policy.parameters(), own, strict=True))


def test_a_full_disk_is_reported(
    build: Build, tuned: Build, before: Any, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    policy = build()
    vector = AlignmentVector.between(policy, tuned(policy))
    was = before(policy)
    monkeypatch.setattr("mavis.vectors.applying.save_file", full)
    monkeypatch.setattr("mavis.vectors.tensor_files.save_file", full)
    with pytest.raises(VectorError, match="No space left on device"):
        with Vectors({"v": vector}).applied(policy, {"v": 1}, backup="disk"):
            pytest.fail("it was applied")
    was.assert_unchanged()
    with pytest.raises(VectorError, match="writing .* failed: .*No space left on device"):
        vector.save(temporary / "v")
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("kind", [Opaque, Dequantisable])
def test_weights_of_a_quantised_class_are_refused(kind: type[Opaque]) -> None:
    base, aligned, quantised = tiny_llama(), tiny_llama(seed=1), with_weights_of(kind)
    with pytest.raises(VectorError, match=f"is {kind.__name__} in base, .*without quantisation"):
        AlignmentVector.between(quantised, aligned)
    vectors = Vectors({"v": AlignmentVector.between(base, aligned)})
    with pytest.raises(VectorError, match=f"is {kind.__name__}, to which vectors cannot be added"):
        with vectors.applied(quantised, {"v": 1}):
            pytest.fail("it was applied")
