"""out[m, j] = x[m, columns[j]]: the input permutation of act-order weights, where torch is absent (Triton)."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 512


@triton.jit
def gather_columns_kernel(x_ptr, columns_ptr, out_ptr, width, x_stride, BLOCK: tl.constexpr):
    """`x [M, K]`, `columns [width]` int64, `out [M, width]`. Grid (ceil(width / BLOCK), M)."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1).to(tl.int64)
    source = tl.load(columns_ptr + j, mask=j < width, other=0)
    value = tl.load(x_ptr + m * x_stride + source, mask=j < width, other=0.0)
    tl.store(out_ptr + m * width + j, value, mask=j < width)
