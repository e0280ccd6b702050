"""Vectors: the difference of two models, its arithmetic, and its folder."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mavis.errors import VectorError
from mavis.policies.fingerprint import Fingerprint
from mavis.vectors import AlignmentVector
from mavis.vectors.model_tensors import Layout

Build = Callable[..., Any]
Saved = Callable[..., Path]

LAYOUT = Layout("toy", {"a": (2,), "b": (1,), "c": (1,)}, {})
BASE = Fingerprint("toy", 1, 1, "0")


def toy(**tensors: list[float]) -> AlignmentVector:
    return AlignmentVector({name: torch.tensor(values) for name, values in tensors.items()}, LAYOUT, BASE)


def numbers(vector: AlignmentVector) -> dict[str, list[float]]:
    return {name: tensor.tolist() for name, tensor in vector.tensors.items()}


# between


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_models_and_folders_give_the_same_vector(
    build: Build, tuned: Build, saved: Saved, dtype: torch.dtype, tied: bool, sharded: bool
) -> None:
    base = build(tied, dtype)
    aligned = tuned(base)
    size = {"max_shard_size": "3KB"} if sharded else {}
    folders = saved(base, "base", **size), saved(aligned, "aligned", **size)
    assert (folders[0] / "model.safetensors.index.json").exists() == sharded
    parameters = dict(aligned.named_parameters())
    assert ("lm_head.weight" in parameters) != tied
    for one, other in [(base, aligned), folders, (base, folders[1]), (folders[0], aligned)]:
        vector = AlignmentVector.between(one, other)
        assert set(vector.tensors) == set(parameters)
        assert vector.layout.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
        assert vector.is_from(base)
        assert vector.is_from(folders[0])
        assert not vector.is_from(aligned)
        vector.check(folders[1])
        assert vector.base == Fingerprint.of(base)
        for name, after in parameters.items():
            exact = after.float() - base.get_parameter(name).float()
            in_memory = not isinstance(one, Path) or not isinstance(other, Path)
            assert torch.equal(vector.tensors[name], exact.to(dtype).float() if in_memory else exact), name


def test_of_two_precisions_the_difference_is_in_float32(build: Build, tuned: Build) -> None:
    base = build()
    aligned = tuned(base).to(torch.bfloat16)
    vector = AlignmentVector.between(base, aligned)
    for name, tensor in vector.tensors.items():
        assert torch.equal(tensor, aligned.get_parameter(name).float() - base.get_parameter(name))


def test_unchanged_tensors_are_left_out(build: Build, tuned: Build, saved: Saved) -> None:
    base = build()
    aligned = tuned(base, only="q_proj")
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
    assert list(AlignmentVector.between(base, aligned).tensors) == names
    assert list(AlignmentVector.between(saved(base, "b"), saved(aligned, "a")).tensors) == names
    nothing = AlignmentVector.between(base, copy.deepcopy(base))
    assert not nothing.tensors
    assert nothing.norm() == 0


def test_a_vector_of_models_does_not_change_with_them(build: Build, tuned: Build) -> None:
    base = build()
    aligned = tuned(base)
    vector = AlignmentVector.between(base, aligned)
    norm = vector.norm()
    with torch.no_grad():
        for model in (base, aligned):
            model.lm_head.weight.zero_()
    assert vector.norm() == norm > 0


def test_files_that_hold_a_tied_tensor_twice_are_read_as_transformers_reads_them(
    build: Build, tuned: Build, saved: Saved
) -> None:
    base = build(tied=True)
    folder, other = saved(base, "b"), saved(tuned(base), "a")
    tensors = load_file(folder / "model.safetensors")
    twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(twice, folder / "model.safetensors", metadata={"format": "pt"})
    assert AlignmentVector.between(folder, other).layout.tied
    twice["lm_head.weight"] += 1
    save_file(twice, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VectorError, match="'lm_head.weight' is tied to 'model.embed_tokens.weight' and not of shape"):
        AlignmentVector.between(folder, other)


def test_files_without_the_base_models_prefix_are_read(build: Build, tuned: Build, saved: Saved) -> None:
    base = build(tied=True)
    aligned = tuned(base)
    folder = saved(base, "b")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    assert list(AlignmentVector.between(folder, aligned).tensors) == list(
        AlignmentVector.between(base, aligned).tensors
    )


MISMATCHES = {
    "vocabulary": ({"vocab_size": 44}, r"'model.embed_tokens.weight' is of shape (44, 16) and not of shape (40, 16)"),
    "width": ({"hidden_size": 32}, r"and not of shape (40, 16); 'model.layers.0.self_attn.q_proj.weight'"),
    "depth": ({"num_hidden_layers": 1}, r"'model.layers.1.self_attn.q_proj.weight' is missing and not of shape"),
    "more": (
        {"num_hidden_layers": 3},
        r"'model.layers.2.self_attn.q_proj.weight' is of shape (16, 16) and not missing",
    ),
    "ties": ({"tied": True}, r"'lm_head.weight' is tied to 'model.embed_tokens.weight' and not of shape (40, 16)"),
}


@pytest.mark.parametrize(("sizes", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_models_that_do_not_match_are_refused_by_name(
    build: Build, tuned: Build, saved: Saved, sizes: dict[str, Any], message: str
) -> None:
    base, other = build(), build(**sizes)
    for aligned in (other, saved(other, "other")):
        with pytest.raises(VectorError, match="aligned does not fit base: ") as raised:
            AlignmentVector.between(base, aligned)
        assert message in str(raised.value)
    vector = AlignmentVector.between(base, tuned(base))
    with pytest.raises(VectorError, match="policy does not fit the vector: "):
        vector.check(other)
    with pytest.raises(VectorError, match="one vector does not fit another: "):
        vector + AlignmentVector.between(other, tuned(other))


def test_another_architecture_of_the_same_shapes_is_refused(build: Build, tuned: Build) -> None:
    base = build()
    vector = AlignmentVector.between(base, tuned(base))
    base.config.model_type = "mistral"
    with pytest.raises(VectorError, match="policy does not fit the vector: it is 'mistral' and not 'llama'"):
        vector.check(base)


def test_a_difference_that_is_not_finite_is_refused(build: Build, tuned: Build) -> None:
    aligned = tuned(build())
    with torch.no_grad():
        aligned.lm_head.weight[0, 0] = math.nan
    with pytest.raises(VectorError, match="not finite in 'lm_head.weight'"):
        AlignmentVector.between(build(), aligned)


def test_a_model_without_weights_or_with_an_adapter_is_refused(build: Build, tuned: Build) -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(VectorError, match="aligned has 'model.embed_tokens.weight' on device 'meta'"):
        AlignmentVector.between(build(), build().to("meta"))
    with pytest.raises(VectorError, match="base is a int. Hint: pass a model"):
        AlignmentVector.between(3, build())  # type: ignore[arg-type]
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), tuned(build()))
    adapted.peft_config = {}
    adapted.peft_config["default"] = None
    with pytest.raises(VectorError, match="with an adapter. Hint: .*merge_and_unload"):
        AlignmentVector.between(build(), adapted)


def test_a_folder_that_cannot_be_read_is_refused(build: Build, tuned: Build, saved: Saved, tmp_path: Path) -> None:
    base = build()
    folder, good = saved(base, "b"), saved(tuned(base), "a")
    with pytest.raises(VectorError, match="base is 'nowhere', which is not a folder"):
        AlignmentVector.between("nowhere", good)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VectorError, match="which has no config.json"):
        AlignmentVector.between(tmp_path / "empty", good)
    complete = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(complete[:3000])
    with pytest.raises(VectorError, match="corrupt or truncated"):
        AlignmentVector.between(folder, good)
    tensors = load_file(good / "model.safetensors")
    renamed = {name: tensor for name, tensor in tensors.items() if "norm" not in name} | {"odd": torch.zeros(1)}
    save_file(renamed, folder / "model.safetensors")
    with pytest.raises(
        VectorError, match=r"hold no 'model.layers.0.input_layernorm.weight', .* but 'odd'. Hint: .*load"
    ):
        AlignmentVector.between(folder, good)
    save_file(tensors | {"lm_head.weight": torch.zeros(3, 16)}, folder / "model.safetensors")
    with pytest.raises(VectorError, match=r"'lm_head.weight' has shape \(3, 16\), but its config.json says \(40, 16\)"):
        AlignmentVector.between(folder, good)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(VectorError, match="holds pytorch_model.bin, which is never read"):
        AlignmentVector.between(folder, good)
    (folder / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(VectorError, match="of which no causal LM can be built"):
        AlignmentVector.between(folder, good)


def test_a_changed_folder_is_detected(build: Build, tuned: Build, saved: Saved) -> None:
    base = build()
    folder, other = saved(base, "b"), saved(tuned(base), "a")
    vector = AlignmentVector.between(folder, other)
    saved(build(num_hidden_layers=1), "a")
    with pytest.raises(VectorError, match="has changed since it was opened"):
        vector.norm()


# save and load


@pytest.mark.parametrize("limit", ["1GB", "3KB"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_vectors_round_trip(build: Build, tuned: Build, tmp_path: Path, tied: bool, limit: str) -> None:
    base = build(tied)
    vector = AlignmentVector.between(base, tuned(base))
    vector.save(tmp_path / "v", max_shard_size=limit)
    assert (len(list((tmp_path / "v").glob("*.safetensors"))) > 1) == (limit == "3KB")
    assert {path.suffix for path in (tmp_path / "v").iterdir()} == {".json", ".safetensors"}
    loaded = AlignmentVector.load(tmp_path / "v")
    assert (loaded.layout, loaded.base, list(loaded.tensors)) == (vector.layout, vector.base, list(vector.tensors))
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in vector.tensors.items())
    (0.5 * loaded).save(tmp_path / "half", dtype=torch.bfloat16)
    half = AlignmentVector.load(tmp_path / "half")
    for name, tensor in vector.tensors.items():
        assert torch.equal(half.tensors[name], (tensor * 0.5).bfloat16().float())


def test_a_vector_that_changes_nothing_is_saved_too(build: Build, tmp_path: Path) -> None:
    AlignmentVector.between(build(), build()).save(tmp_path / "v")
    assert AlignmentVector.load(tmp_path / "v").norm() == 0


def test_saving_is_atomic(build: Build, tuned: Build, tmp_path: Path) -> None:
    base = build()
    vector = AlignmentVector.between(base, tuned(base))
    broken = AlignmentVector({**vector.tensors, "lm_head.weight": None}, vector.layout, vector.base)  # type: ignore[dict-item]
    with pytest.raises(AttributeError):
        broken.save(tmp_path / "v")
    assert not list(tmp_path.iterdir())
    (0.5 * vector).save(tmp_path / "v")
    with pytest.raises(AttributeError):
        broken.save(tmp_path / "v")
    assert AlignmentVector.load(tmp_path / "v").norm() == pytest.approx(vector.norm() / 2)
    vector.save(tmp_path / "v")
    assert AlignmentVector.load(tmp_path / "v").norm() == vector.norm()
    base.save_pretrained(tmp_path / "model")
    with pytest.raises(VectorError, match="which exists. Hint: name a new folder"):
        vector.save(tmp_path / "model")
    with pytest.raises(VectorError, match="dtype is torch.int8"):
        vector.save(tmp_path / "w", dtype=torch.int8)


def test_a_folder_without_a_vector_is_refused(build: Build, tuned: Build, saved: Saved, tmp_path: Path) -> None:
    base = build()
    with pytest.raises(VectorError, match="which is not an alignment vector"):
        AlignmentVector.load(saved(base, "b"))
    AlignmentVector.between(base, tuned(base)).save(tmp_path / "v", max_shard_size="3KB")

    def broken(name: str) -> Path:
        shutil.copytree(tmp_path / "v", tmp_path / name)
        return tmp_path / name

    config = json.loads((tmp_path / "v" / "config.json").read_text())
    for changes, message in [
        ({"format": 2}, "has vector format 2; this version reads 1"),
        ({"names": config["names"][1:]}, "does not match its config.json"),
        ({"layout": {}}, "is corrupt"),
    ]:
        folder = broken(next(iter(changes)))
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(VectorError, match=message):
            AlignmentVector.load(folder)
    folder = broken("missing")
    next(folder.glob("*00002*")).unlink()
    with pytest.raises(VectorError, match="has no model-00002"):
        AlignmentVector.load(folder)


# arithmetic


def test_vector_arithmetic() -> None:
    v, w = toy(a=[1.0, -2.0], b=[4.0]), toy(a=[0.5, 0.5], c=[3.0])
    assert numbers(v + w) == {"a": [1.5, -1.5], "b": [4.0], "c": [3.0]}
    assert numbers(v - w) == {"a": [0.5, -2.5], "b": [4.0], "c": [-3.0]}
    assert numbers(-v) == {"a": [-1.0, 2.0], "b": [-4.0]}
    assert numbers(v * 3) == numbers(3 * v) == numbers(np.float64(3) * v) == {"a": [3.0, -6.0], "b": [12.0]}
    assert numbers(v / 4) == {"a": [0.25, -0.5], "b": [1.0]}
    assert numbers(0.5 * v - w) == {"a": [0.0, -1.5], "b": [2.0], "c": [-3.0]}
    assert numbers(v) == {"a": [1.0, -2.0], "b": [4.0]}


def test_the_laws_of_a_vector_space_hold() -> None:
    u, v, w = toy(a=[1.0, 2.0]), toy(a=[-3.0, 0.5], b=[2.0]), toy(b=[1.0], c=[-8.0])
    assert numbers(v + w) == numbers(w + v)
    assert numbers((u + v) + w) == numbers(u + (v + w))
    assert numbers(2 * (v + w)) == numbers(2 * v + 2 * w)
    assert numbers((2 + 3) * v) == numbers(2 * v + 3 * v)
    assert numbers(v - w) == numbers(v + -w)
    assert (v - v).norm() == 0


def test_norm_and_cosine() -> None:
    v, w = toy(a=[3.0, 0.0], b=[4.0]), toy(a=[0.0, 2.0], b=[4.0], c=[4.0])
    assert v.norm() == 5
    assert w.norm() == 6
    assert v.cosine(w) == pytest.approx(16 / 30)
    assert v.cosine(-2 * v) == pytest.approx(-1)
    with pytest.raises(VectorError, match="zero, which has no direction"):
        v.cosine(0 * v)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, True], ids=str)
def test_a_factor_that_is_not_finite_is_refused(number: float) -> None:
    with pytest.raises(VectorError, match=f"factor is {number}, expected a finite number"):
        number * toy(b=[1.0])
    with pytest.raises(VectorError, match=f"divisor is {number}, expected a finite number"):
        toy(b=[1.0]) / number


def test_other_operations_are_refused() -> None:
    v = toy(b=[1.0])
    with pytest.raises(VectorError, match="divisor is 0"):
        v / 0
    for wrong in (lambda: v * v, lambda: v + 1, lambda: v * "2", lambda: v / v):
        with pytest.raises(TypeError):
            wrong()  # type: ignore[no-untyped-call]


def test_a_combination_of_several_bases_has_no_base(build: Build, tuned: Build) -> None:
    one, other = build(), build(seed=3)
    v, w = AlignmentVector.between(one, tuned(one)), AlignmentVector.between(other, tuned(other))
    assert (v - 2 * v).is_from(one)
    assert not (v + w).is_from(one)
    assert not (v + w).is_from(other)
    assert repr(v) == f"AlignmentVector(llama, 21 of 21 tensors, base {Fingerprint.of(one).weights})"


# numbers at the edge, and files that are broken


def test_an_infinity_in_both_models_is_no_difference(build: Build, tuned: Build, saved: Saved) -> None:
    base = build()
    aligned = tuned(base)
    with torch.no_grad():
        for model in (base, aligned):
            model.lm_head.weight[0, 0] = -math.inf
    for one, other in [(base, aligned), (saved(base, "b"), saved(aligned, "a"))]:
        vector = AlignmentVector.between(one, other)
        assert vector.tensors["lm_head.weight"][0, 0] == 0
        assert math.isfinite(vector.norm())


def test_a_number_that_overflows_the_dtype_is_not_saved(tmp_path: Path) -> None:
    vector = toy(a=[1.0, 1e5])
    with pytest.raises(VectorError, match="'a' overflows torch.float16. Hint: save it as bfloat16"):
        vector.save(tmp_path / "v", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    vector.save(tmp_path / "v", dtype=torch.bfloat16)


def test_a_replaced_file_is_detected(build: Build, tuned: Build, saved: Saved) -> None:
    base = build()
    folder, other = saved(base, "b"), saved(tuned(base), "a")
    vector = AlignmentVector.between(folder, other)
    file = other / "model.safetensors"
    status = file.stat()
    shutil.copyfile(folder / "model.safetensors", other / "new")
    os.utime(other / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other / "new", file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    with pytest.raises(VectorError, match="has changed since it was opened"):
        vector.norm()


@pytest.mark.parametrize("index", ["[]", '{"weight_map": {"a": 3}}', '{"weight_map": ["a"]}', "{"])
def test_an_invalid_index_is_corrupt(build: Build, tuned: Build, saved: Saved, index: str) -> None:
    folder = saved(build(), "b", max_shard_size="3KB")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(VectorError, match="index.json' is corrupt"):
        AlignmentVector.between(folder, tuned(build()))


@pytest.mark.parametrize("config", ["[]", "{", "3"])
def test_an_invalid_adapter_config_is_corrupt(build: Build, tmp_path: Path, config: str) -> None:
    pytest.importorskip("peft")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(VectorError, match="adapter_config.json' is corrupt.*Hint: save the adapter again"):
        AlignmentVector.between(build(), tmp_path)
