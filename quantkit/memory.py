"""Memory of this process: how much it held at most, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import resource
import sys
from functools import cache
from typing import Any

import torch


def peak_rss() -> int:
    """Highest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_memory() -> int | None:
    """Highest memory allocated on the accelerator so far, in bytes; None without one."""
    if not torch.accelerator.is_available():
        return None
    return int(torch.accelerator.max_memory_allocated())


def release_freed() -> None:
    """Give the pages of freed tensors back to the system, where the C library is glibc.

    glibc keeps freed blocks of up to 32 MB in its heap and their gaps pile up from layer to layer
    (measured: 2 MB a layer where a layer is 1.5 MB; docs/benchmarks/convert.md), so that peak memory
    would grow with depth although no tensor is alive. One call takes about a millisecond.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
