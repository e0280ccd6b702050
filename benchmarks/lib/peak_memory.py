"""How much memory something takes at its peak, as Linux tells it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_mib(run: Callable[[], Any]) -> float:
    """Measure how much more memory a run holds at its peak than before it, in MiB."""
    status = Path("/proc/self/status")

    def kib(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = kib("VmRSS")
    run()
    return round((kib("VmHWM") - before) / 1024, 1)
