"""Products with a packed weight by dequantizing a slice at a time and letting the vendor's BLAS multiply.

The buffer takes at most `tuning.SLICE_BYTES`, and for dx of many rows at most a third of the layer. (Slices
that fit the L2 cache were measured to cost more in launches and small products than they save.) Each
element of the result comes from one product. Widths of slices are chosen so that the products' tiles fill
whole waves of the multiprocessors: a third of K may take two waves where a quarter takes one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from quantkit.kernels import tuning

#: fill(out [rows, columns], first row, first column) writes dense values of W.
Fill = Callable[[Tensor, int, int], None]


def linear(x: Tensor, n: int, bias: Tensor | None, fill: Fill) -> Tensor:
    """`x [M, K]` times W `[n, K]` plus bias, slice by slice of W's rows: `[M, n]`."""
    m, k = x.shape
    step = length(m, n, k * x.element_size(), x.device)
    out = x.new_empty((m, n))
    buffer = x.new_empty((step, k))
    for start in range(0, n, step):
        weight = buffer[: min(step, n - start)]
        fill(weight, start, 0)
        target = out[:, start : start + step]
        if bias is None:
            torch.mm(x, weight.T, out=target)
        else:
            torch.addmm(bias[start : start + step], x, weight.T, out=target)
    return out


def backward(grad: Tensor, k: int, fill: Fill) -> Tensor:
    """dx `[M, k]` of `grad [M, N]`, slice by slice of W's columns."""
    m, n = grad.shape
    least = tuning.BACKWARD_SLICES if m >= tuning.BACKWARD_SLICED_ROWS else 1
    step = length(m, k, n * grad.element_size(), grad.device, least)
    out = grad.new_empty((m, k))
    buffer = grad.new_empty((n * step,))
    for start in range(0, k, step):
        count = min(step, k - start)
        weight = buffer[: n * count].view(n, count)
        fill(weight, 0, start)
        torch.mm(grad, weight, out=out[:, start : start + count])
    return out


def length(m: int, count: int, bytes_each: int, device: torch.device, least: int = 1) -> int:
    """Rows or columns per slice: at most SLICE_BYTES and `1 / least` of all, multiples of 128 (or all of them)."""
    slices = max(least, -(-count * bytes_each // tuning.SLICE_BYTES))
    if slices == 1 or count < 128:
        return count
    even = -(-count // slices // 128) * 128
    units = multiprocessors(device)
    if not units:
        return min(count, even)
    high, wide = tuning.BLAS_TILE
    row_tiles = -(-m // high)

    def waves(step: int) -> int:
        widths = [min(step, count - start) for start in range(0, count, step)]
        return sum(-(-row_tiles * -(-width // wide) // units) for width in widths)

    steps = [even, *range(wide, count // slices + 1, wide)]
    return min(count, min(reversed(steps), key=waves))


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the accelerator has; 0 where there is none to ask."""
    if device.type in ("cpu", "meta"):
        return 0
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0))
