"""Products with a packed weight by dequantizing a slice at a time and letting the vendor's BLAS multiply.

The buffer takes at most `tuning.SLICE_BYTES`, and for dx of many rows at most a third of the layer. (Slices
that fit the L2 cache were measured to cost more in launches and small products than they save.) Each
element of the result comes from one product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.kernels import tuning

#: fill(out [rows, columns], first row, first column) writes dense values of W.
Fill = Callable[[Tensor, int, int], None]


def linear(x: Tensor, n: int, bias: Tensor | None, fill: Fill) -> Tensor:
    """`x [M, K]` times W `[n, K]` plus bias, slice by slice of W's rows: `[M, n]`."""
    m, k = x.shape
    step = length(n, k * x.element_size())
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
    step = length(k, n * grad.element_size(), least)
    out = grad.new_empty((m, k))
    buffer = grad.new_empty((n * step,))
    for start in range(0, k, step):
        count = min(step, k - start)
        weight = buffer[: n * count].view(n, count)
        fill(weight, 0, start)
        torch.mm(grad, weight, out=out[:, start : start + count])
    return out


def length(count: int, bytes_each: int, least: int = 1) -> int:
    """Rows (or columns) per slice: even slices of at most SLICE_BYTES, at least `least`, multiples of 128."""
    slices = max(least, -(-count * bytes_each // tuning.SLICE_BYTES))
    return min(count, -(-count // slices // 128) * 128) if count >= 128 else count
