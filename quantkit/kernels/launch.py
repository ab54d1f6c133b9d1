"""What the Triton backends of codebook and float8 weights ask of the device."""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Type of a dot's operands, by the dtype of x. (The interpreter computes bfloat16 wrongly without an error:
#: test float16 and float32 there.)
DOT_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. (`triton.cdiv` looks at its arguments for compile-time values: 5 us a call.)"""
    return -(-a // b)


@cache
def target() -> tuple[str, int]:
    """("cuda", 90), ("hip", 0), ("xpu", 0), ... of the active driver; ("interpreter", 0) without one."""
    if triton.knobs.runtime.interpret:
        return "interpreter", 0
    active = triton.runtime.driver.active.get_current_target()
    return active.backend, active.arch if isinstance(active.arch, int) else 0


def has_ptx() -> bool:
    """Does the device take the inline PTX of these kernels?"""
    backend, arch = target()
    return backend == "cuda" and arch >= 80


def device_of(tensor: Tensor) -> Any:
    """Launches go to the current device: make it the tensor's."""
    if tensor.device.type in ("cpu", "meta"):
        return contextlib.nullcontext()
    return torch.accelerator.device_index(tensor.device.index)


def has_float8() -> bool:
    """Has the device an e4m3 matrix unit (NVIDIA from sm_89 on; AMD's gfx942 counts in another bias)?"""
    backend, arch = target()
    return backend == "cuda" and arch >= 89


def large_shared_memory() -> bool:
    """Can a block take more than 130 KB of shared memory (sm_80, sm_90, sm_100; not sm_86, sm_89, sm_120)?"""
    backend, arch = target()
    return backend == "cuda" and arch in (80, 87, 90, 100, 103)
