"""The second pass of `wide_hopper_kernel`: sums of parts of K become results.

In Triton's own language, not Gluon, so that its interpreter runs it too.
"""

# mypy: ignore-errors
# Triton's language is not Python's type system: jit functions are compiled, not called.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(t, M, N, BN: tl.constexpr, BM: tl.constexpr, TOGETHER: tl.constexpr):
    """`wide_hopper.tile` once more: neither language calls the other's functions."""
    across = tl.cdiv(M, BM)
    first = t // (TOGETHER * across) * TOGETHER
    size = tl.minimum(tl.cdiv(N, BN) - first, TOGETHER)
    inside = t % (TOGETHER * across)
    return (first + inside % size) * BN, inside // size * BM


@triton.jit(do_not_specialize=["M", "N", "whole", "parts"])
def sum_parts_kernel(
    parts_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    whole,
    parts,
    BN: tl.constexpr,
    BM: tl.constexpr,
    TOGETHER: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """y `[M, N]` of the tiles from `whole` on: their parts, float32 `[tiles - whole, parts, BM, BN]`, added in order.

    Grid: ((tiles - whole) * BM / ROWS,).
    """
    block = tl.program_id(0)
    cut = block // (BM // ROWS)
    n0, m0 = tile(whole + cut, M, N, BN, BM, TOGETHER)
    row = block % (BM // ROWS) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BN)[None, :]
    m = m0 + row
    n = n0 + column
    inside = (m < M) & (n < N)
    at = parts_ptr + cut * parts * (BM * BN) + row * BN + column
    total = tl.load(at, mask=inside, other=0.0)
    for _ in range(1, parts):
        at += BM * BN
        total += tl.load(at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + m.to(tl.int64) * N + n, total.to(y_ptr.dtype.element_ty), mask=inside)
