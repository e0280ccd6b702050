"""Merged folders: a base plus vectors, as a model that transformers loads."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from mavis.errors import VectorError
from mavis.vectors import AlignmentVector, Vectors

Build = Callable[..., Any]
Saved = Callable[..., Path]


def read(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)


@pytest.mark.parametrize("limit", ["1GB", "3KB"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merged_folder_is_the_policy_with_the_vectors_applied(
    build: Build, tuned: Build, saved: Saved, tmp_path: Path, dtype: torch.dtype, tied: bool, limit: str
) -> None:
    base = build(tied, dtype)
    folder = saved(base, "base", max_shard_size=limit)
    v, w = (AlignmentVector.between(folder, saved(tuned(base, seed=seed), f"a{seed}")) for seed in (1, 2))
    vectors = Vectors({"v": v, "w": w})
    assert vectors.merge(folder, {"v": 0.7, "w": -1.5}, tmp_path / "merged") == tmp_path / "merged"
    merged = read(tmp_path / "merged")
    with vectors.applied(base, {"v": 0.7, "w": -1.5}):
        assert merged.dtype == dtype
        for name, tensor in base.state_dict().items():
            assert torch.equal(merged.state_dict()[name], tensor), name
    assert {path.name for path in (tmp_path / "merged").iterdir()} - {path.name for path in folder.iterdir()} == {
        "mavis_merge.json"
    }
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


def test_interpolation_ends_at_both_models(
    build: Build, tuned: Build, saved: Saved, tmp_path: Path, logits: Callable[[Any], torch.Tensor]
) -> None:
    base = build()
    one, other = tuned(base, seed=1), tuned(base, seed=2)
    folder = saved(base, "base")
    vectors = Vectors({"one": AlignmentVector.between(base, one), "other": AlignmentVector.between(base, other)})
    for share, end in [(0.0, other), (1.0, one)]:
        vectors.merge(folder, {"one": share, "other": 1 - share}, tmp_path / f"{share}")
        torch.testing.assert_close(logits(read(tmp_path / f"{share}")), logits(end), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("method", "density"), [("emr", None), ("ties", 0.4), ("dare", 0.4)])
def test_every_method_applies_and_merges_alike(
    build: Build, tuned: Build, saved: Saved, tmp_path: Path, method: Any, density: float | None
) -> None:
    base = build()
    folder = saved(base, "base")
    vectors = Vectors({str(seed): AlignmentVector.between(base, tuned(base, seed=seed)) for seed in (1, 2)})
    options: dict[str, Any] = {"method": method, "density": density}
    merged = read(vectors.merge(folder, {"1": 1.0}, tmp_path / "merged", **options))
    with vectors.applied(base, {"1": 1.0}, **options):
        assert all(torch.equal(merged.get_parameter(name), t) for name, t in base.named_parameters())


def test_tokenizer_and_configs_are_copied_and_other_weights_are_not(
    tiny_folder: Path, tiny_policy: Any, make_other_policy: Any, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_folder.iterdir():
        (base / path.name).symlink_to(path)  # as in the hub's cache
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "README.md", ".gitattributes", "x.gguf"):
        (base / name).write_text("{}")
    for name in ("notes.txt", "train.log", "trainer_state.json", "training_args.json", "prompts.jsonl", "secret.env"):
        (base / name).write_text("{}")
    (base / "LICENSE").write_text("MIT")
    (base / "modeling_tiny.py").write_text("")
    vectors = Vectors({"v": AlignmentVector.between(tiny_policy, make_other_policy())})
    merged = vectors.merge(base, {"v": 1}, tmp_path / "merged")
    assert {path.name for path in merged.iterdir()} == {path.name for path in tiny_folder.iterdir()} | {
        "LICENSE",
        "modeling_tiny.py",
        "mavis_merge.json",
    }
    assert not any(path.is_symlink() for path in merged.iterdir())
    assert AutoTokenizer.from_pretrained(merged)("the dog").input_ids == [12, 20]
    with safe_open(merged / "model.safetensors", "pt") as one, safe_open(base / "model.safetensors", "pt") as other:
        assert one.metadata() == other.metadata()
        assert one.keys() == other.keys()
    again = AlignmentVector.between(tiny_folder, merged)
    assert (again - vectors["v"]).norm() < 1e-5 * again.norm()


def test_merging_is_atomic_and_overwrites_nothing(build: Build, tuned: Build, saved: Saved, tmp_path: Path) -> None:
    base = build()
    folder, vector = saved(base, "base"), AlignmentVector.between(base, tuned(base))
    vectors = Vectors({"v": vector})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(VectorError, match="plus the vectors overflows torch.float32. Hint: use smaller coefficients"):
        vectors.merge(folder, {"v": 1e300}, tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before
    for taken in (folder, folder / "config.json"):
        with pytest.raises(VectorError, match="output is .* which exists. Hint: name a new folder"):
            vectors.merge(folder, {"v": 1}, taken)
    with pytest.raises(VectorError, match="base is a model in memory"):
        vectors.merge(base, {"v": 1}, tmp_path / "merged")
    with pytest.raises(VectorError, match="base does not fit the vector: 'model.embed_tokens.weight' is of shape"):
        vectors.merge(saved(build(vocab_size=44), "other"), {"v": 1}, tmp_path / "merged")
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 40


def test_a_merged_model_is_replaced_but_not_by_itself(build: Build, tuned: Build, saved: Saved, tmp_path: Path) -> None:
    base = build()
    folder = saved(base, "base")
    vectors = Vectors({"v": AlignmentVector.between(base, tuned(base))})
    first = read(vectors.merge(folder, {"v": 1}, tmp_path / "merged")).lm_head.weight
    (tmp_path / "merged" / "model.safetensors").chmod(0o600)
    second = read(vectors.merge(folder, {"v": 0.5}, tmp_path / "merged")).lm_head.weight
    assert not torch.equal(first, second)
    assert stat.S_IMODE((tmp_path / "merged" / "model.safetensors").stat().st_mode) == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged"]
    with pytest.raises(VectorError, match="output is .* which exists"):
        vectors.merge(tmp_path / "merged", {"v": 1}, tmp_path / "merged")


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", ""])
def test_an_index_that_points_out_of_its_folder_is_refused(
    build: Build, tuned: Build, saved: Saved, tmp_path: Path, name: str
) -> None:
    base = build()
    vectors = Vectors({"v": AlignmentVector.between(base, tuned(base))})
    folder = saved(base, "base", max_shard_size="3KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(VectorError, match=r"index\.json' is corrupt"):
        vectors.merge(folder, {"v": 1}, tmp_path / "merged")


def test_an_index_next_to_an_unsharded_file_is_stale(build: Build, tuned: Build, saved: Saved, tmp_path: Path) -> None:
    base, old = build(), build(seed=9)
    folder = saved(old, "base", max_shard_size="3KB")
    index = (folder / "model.safetensors.index.json").read_bytes()
    shards = {path.name: path.read_bytes() for path in folder.glob("model-*")}
    saved(base, "base")
    (folder / "model.safetensors.index.json").write_bytes(index)
    for name, content in shards.items():
        (folder / name).write_bytes(content)
    assert torch.equal(read(folder).lm_head.weight, base.lm_head.weight)  # as transformers reads it
    vector = AlignmentVector.between(folder, tuned(base))
    assert vector.is_from(base)
    merged = Vectors({"v": vector}).merge(folder, {"v": 1}, tmp_path / "merged")
    assert {path.name for path in merged.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "mavis_merge.json",
    }
    assert (read(merged).lm_head.weight - base.lm_head.weight).abs().max() < 1
