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


#: (kernel, device, what the compiler specializes on, options) -> (compiled kernel, constants in their order)
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
#: Far more than a model needs; then the table begins anew.
_MOST_COMPILED = 8192


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)`, from the second call on past Triton's own look-up.

    `arguments` are the kernel's first parameters (tensors and numbers), `options` its constants and the compiler's
    options. Triton binds, classifies and hashes them all, and compares every global value, on each call: 20 to 30 us,
    more than a small product takes. Here the key is what it classifies by: dtypes, addresses' alignment, integers.
    """
    key: tuple[Any, ...] = (
        id(kernel),
        arguments[0].device,
        *options.values(),
        # What Triton compiles for: an integer's value, that it is a float, a tensor's dtype and alignment.
        *[
            a
            if (kind := type(a)) is int
            else kind
            if kind is float
            else (a.dtype if a.data_ptr() & 15 == 0 else (a.dtype,))
            for a in arguments
        ],
    )
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **options)
        if compiled is not None and hasattr(compiled, "function"):  # neither interpreted nor recorded
            if len(_compiled) >= _MOST_COMPILED:
                _compiled.clear()
            names = kernel.arg_names[len(arguments) :]
            _compiled[key] = compiled, tuple(options[name] for name in names)
        return
    compiled, constants = found
    compiled[grid if len(grid) == 3 else (*grid, 1, 1)[:3]](*arguments, *constants)


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
