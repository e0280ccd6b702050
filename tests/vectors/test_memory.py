"""Peak memory: counted in tensors, and as reported by the operating system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mavis.vectors import AlignmentVector, Vectors
from mavis.vectors.tensor_files import StoredTensors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def most_read(monkeypatch: pytest.MonkeyPatch) -> dict[Path, int]:
    """The maximum number of tensors of each folder that were in memory at once."""
    now: dict[Path, int] = {}
    most: dict[Path, int] = {}
    read = StoredTensors.__getitem__

    def counted(self: StoredTensors, name: str) -> Tensor:
        tensor = read(self, name).clone()  # with its own lifetime
        folder = self.folder
        now[folder] = now.get(folder, 0) + 1
        most[folder] = max(most.get(folder, 0), now[folder])
        weakref.finalize(tensor, lambda: now.update({folder: now[folder] - 1}))
        return tensor

    monkeypatch.setattr(StoredTensors, "__getitem__", counted)
    return most


def test_of_two_folders_one_tensor_of_each_is_read_at_a_time(
    build: Callable[..., Any],
    tuned: Callable[..., Any],
    saved: Callable[..., Path],
    most_read: dict[Path, int],
    tmp_path: Path,
) -> None:
    base = build()
    folder, other = saved(base, "b", max_shard_size="3KB"), saved(tuned(base), "a")
    vector = AlignmentVector.between(folder, other)
    assert most_read == {folder: 1, other: 1}
    combined = 0.5 * vector - vector / 4
    assert (combined.norm(), vector.cosine(vector)) == (pytest.approx(vector.norm() / 4), pytest.approx(1))
    assert set(most_read.values()) <= {1, 2}
    most_read.clear()
    with Vectors({"v": vector}).applied(base, {"v": 0.5}):
        pass
    assert most_read == {folder: 1, other: 1}
    vector.save(tmp_path / "v")
    most_read.clear()
    Vectors({"v": tmp_path / "v"}).merge(folder, {"v": 0.5}, tmp_path / "merged")
    assert most_read == {folder: 1, tmp_path / "v": 1}


MEASURED = """
import json, sys
from pathlib import Path
import torch
from transformers import LlamaForCausalLM
from mavis.vectors import AlignmentVector, Vectors
from tests.factories import llama_config

torch.set_num_threads(1)

def make_model(seed, dtype, layers):
    config = llama_config(
        vocab_size=1000, hidden_size=384, intermediate_size=768, num_hidden_layers=layers, num_attention_heads=4
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model = model.to_empty(device="cpu").requires_grad_(False)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.uniform_(-1, 1)
    return model

def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))

def peak(action):
    Path("/proc/self/clear_refs").write_text("5")
    action()
    return resident("VmHWM")

def apply(policy, vector, backup):
    with Vectors({"v": vector}).applied(policy, {"v": 0.5}, backup=backup):
        pass

def measure(dtype, folder, layers=9):
    for seed, name in enumerate(["base", "aligned"]):
        model = make_model(seed, dtype, layers)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(folder / name)
    del model
    start, peaks = resident("VmRSS"), {}
    between = lambda: AlignmentVector.between(folder / "base", folder / "aligned")
    peaks["between, save"] = peak(lambda: between().save(folder / "v", max_shard_size="1MB"))
    peaks["merge"] = peak(lambda: Vectors({"v": folder / "v"}).merge(folder / "base", {"v": 0.5}, folder / "merged"))
    policy = make_model(0, dtype, layers)
    for backup in ("cpu", "disk"):
        peaks["from files, " + backup] = peak(lambda: apply(policy, AlignmentVector.load(folder / "v"), backup))
    vector = AlignmentVector.between(policy, make_model(1, dtype, layers))
    peaks["from memory, cpu"] = peak(lambda: apply(policy, vector, "cpu"))
    return {name: (most - start) / size for name, most in peaks.items()}

root = Path(sys.argv[1])
measure(torch.float32, root / "first", layers=1)  # imports, buffers, threads
print(json.dumps([measure(dtype, root / str(dtype)) for dtype in (torch.float32, torch.bfloat16)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux")
def test_peak_memory_is_bounded(tmp_path: Path) -> None:
    """In copies of the model's weights, with a margin for a few tensors and for Python itself."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURED, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for copies in json.loads(done.stdout.splitlines()[-1]):
        assert copies["between, save"] < 0.4
        assert copies["merge"] < 0.4
        assert 1 <= copies["from files, disk"] < 1.4
        assert 2 <= copies["from files, cpu"] < 2.4
        assert 3 <= copies["from memory, cpu"] < 3.2
