"""Matrix products on the calling thread alone, for pieces that run side by side on `cpu_workers`.

torch hands a product to MKL, whose OpenMP threads spin on after their work: between two pieces they take the
processor from the workers, which doubles the time of both. MKL lets a thread ask for products without others
(`MKL_Set_Num_Threads_Local`, oneMKL's developer reference); torch's Linux binaries export the function and have no call
for it. Where it is not to be had, `available` says so.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


def available() -> bool:
    """Has this torch MKL, and its function?"""
    return _set_threads() is not None


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out [M, N] = a [M, K] @ b [K, N]`, float32, without other threads."""
    set_threads = _set_threads()
    assert set_threads is not None
    before = set_threads(1)  # this thread's setting; 0: none of its own
    try:
        torch.mm(a, b, out=out)
    finally:
        set_threads(before)


@cache
def _set_threads() -> Callable[[int], int] | None:
    if not torch.backends.mkl.is_available():
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function = library.MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):  # another system, or MKL is not built in
        return None
    function.argtypes, function.restype = [ctypes.c_int], ctypes.c_int
    return function
