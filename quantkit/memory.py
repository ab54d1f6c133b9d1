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


#: mallopt's name for the size from which a block is mapped on its own (malloc.h), and the size we set.
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD = 1 << 20


def map_large_tensors() -> None:
    """Have every block from 1 MB mapped on its own and unmapped when freed, where the C library is glibc.

    By default glibc raises that size to 32 MB as such blocks are freed, after which Hessians and
    activations share a heap that fragments: GPTQ's peak over base was 213, 293 and 263 MB for 4, 12 and
    20 layers of 12 MB, and 148 MB with a fixed size (docs/benchmarks/convert.md).
    """
    mallopt = _from_libc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)


def release_freed() -> None:
    """Give the pages of freed tensors back to the system, where the C library is glibc.

    Small blocks stay in glibc's heap otherwise, and their gaps pile up from layer to layer. One call
    takes about a millisecond.
    """
    trim = _from_libc("malloc_trim")
    if trim is not None:
        trim(0)


@cache
def _from_libc(name: str) -> Any:
    """A function of glibc; None elsewhere (musl and macOS have neither)."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
