"""Measures the peak memory of a call, from what Linux reports of the process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_mib(run: Callable[[], Any]) -> float:
    """Return by how many MiB the resident memory of the process exceeds its current size at the peak of a call."""
    status = Path("/proc/self/status")

    def kib(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise freed memory would be reused without being counted
    Path("/proc/self/clear_refs").write_text("5")  # reset the recorded peak
    before = kib("VmRSS")
    run()
    return round((kib("VmHWM") - before) / 1024, 1)
