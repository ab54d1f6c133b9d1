"""The highest memory that a piece of work held."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """`with PeakMemory(device) as memory: ...`, then `memory.peak` in bytes.

    On an accelerator: what torch had allocated there at most. On a CPU: the highest resident memory of the
    process, from the start of the block where the kernel can restart its count (Linux), else since the
    process began.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.peak = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(self.device)
        else:
            try:
                _CLEAR.write_text("5")
            except OSError:
                pass
        return self

    def __exit__(self, *exc: object) -> None:
        if self.device.type != "cpu":
            self.peak = int(torch.accelerator.max_memory_allocated(self.device))
        else:
            self.peak = peak_resident()


def peak_resident() -> int:
    """Highest resident memory of this process in bytes (since the count was last restarted)."""
    try:
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
