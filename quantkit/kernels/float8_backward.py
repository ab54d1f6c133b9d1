"""dx = dy @ W from e4m3 weights, without W in memory (Triton).

    dx[m, k] = sum over n of (dy[m, n] * scale[n, b(k)]) * e4m3(q[n, k])

A program owns BM rows and BK columns of dx, which lie under one scale of every row of W, and runs over n. The
scale depends on n only and multiplies the small tile of dy (one rounding, as rounding the weight would be);
decoded codes enter the dot, exact. With SPLIT > 1, program_id(1) takes every SPLIT-th step over n and float32
partial sums are added in order by `sum_splits_kernel`.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.float8_decode import decode, rescale


@triton.jit(do_not_specialize=["M"])
def float8_backward_kernel(
    grad_ptr,
    codes_ptr,
    scale_ptr,
    out_ptr,
    M,
    N,
    K,
    block_n,
    scale_stride,
    grad_stride,
    out_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid: (ceil(K / BK), SPLIT, ceil(M / BM)).

    BLOCK_K: inputs per scale, 0 for all of them. EVEN: tiles fit N and K, so that loads need no masks.
    """
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BN
    n = tl.arange(0, BN)
    k0 = tl.program_id(0) * BK
    k = k0 + tl.arange(0, BK)
    code_ptrs = codes_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    # Rows beyond M read row M - 1 again: their sums are never stored.
    grad_ptrs = grad_ptr + tl.minimum(m, M - 1)[:, None].to(tl.int64) * grad_stride + n[None, :]
    column = k0 // BLOCK_K if BLOCK_K > 0 else 0

    acc = tl.zeros((BM, BK), tl.float32)
    for start in tl.range(first, N, BN * SPLIT, num_stages=STAGES):
        at = tl.cast(start, tl.int64)
        rows = start + n
        if EVEN:
            c = tl.load(code_ptrs + at * K)
            dy = tl.load(grad_ptrs + at)
        else:
            c = tl.load(code_ptrs + at * K, mask=(rows[:, None] < N) & (k[None, :] < K), other=0)
            dy = tl.load(grad_ptrs + at, mask=rows[None, :] < N, other=0.0)
            rows = tl.minimum(rows, N - 1)
        scale = tl.load(scale_ptr + (rows // block_n).to(tl.int64) * scale_stride + column).to(tl.float32)
        dy = (dy.to(tl.float32) * scale[None, :]).to(DOT)
        acc = tl.dot(dy, decode(c, DOT, ASM), acc, input_precision="ieee")

    acc *= rescale(DOT)
    base = out_ptr
    if SPLIT > 1:
        base += tl.program_id(1).to(tl.int64) * M * K
    out_ptrs = base + m[:, None].to(tl.int64) * out_stride + k[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (k[None, :] < K))
