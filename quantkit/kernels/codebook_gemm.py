"""y = x @ W.T from four-bit codebook weights (NF4, FP4), for M = 1 .. 128 (Triton).

The product is W @ x.T, as in `affine_gemm`: codes turn into table values in registers, which are the
first operand of the tensor cores. A program owns BN rows of W. Its steps of K are cut into KS slices of BK
inputs that run side by side as a batched dot (one or more per warp) and are added in a fixed order at the end.

    one step:    codes [KS, BN, BK / 2] u8 --lookup--> table values   [KS, BN, BK]
                 part  [KS, BN, BM] f32 = table values @ x [KS, BM, BK] transposed
                 acc  += part * absmax[KS, BN]             BK divides the block and blocks divide K

A slice may span BLOCKS = 2 or 4 blocks: longer runs of memory from each row of W, of which each block is
multiplied by itself and gets its own absmax (`block_split`).

Where blocks straddle rows (K not a multiple of the block), each value is scaled before the dot; where K is
odd besides, rows begin inside a byte and codes are fetched one at a time: correct, not fast.

`codebook_gemm_wide_kernel` is the same with one slice, its warps side by side on BN rows of W, for M where
reading x again for every few rows would cost more than reading W. With SPLIT > 1 program_id(1) takes every
SPLIT-th step, and `sum_splits_kernel` adds the float32 parts `[SPLIT, M, N]` in order.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.block_split import split_each, split_last
from quantkit.kernels.codebook_lookup import code_at, fill_table, lookup


@triton.jit
def _scaled(codes_ptr, scale_ptr, lut_ptr, rows, k, K, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Dense values at rows and inputs `k` (any alignment), scaled in float32 and rounded to DTYPE."""
    i = rows.to(tl.int64) * K + k
    inside = k < K
    q = code_at(codes_ptr, i, inside)
    absmax = tl.load(scale_ptr + i // BLOCK, mask=inside, other=0.0).to(tl.float32)
    return (tl.load(lut_ptr + q).to(tl.float32) * absmax).to(DTYPE)


@triton.jit(do_not_specialize=["M"])
def codebook_gemm_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    lut_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    row_bytes,
    x_stride,
    out_stride,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    KS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    ONE_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr,
    ASM: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Grid: (ceil(N / BN), SPLIT, ceil(M / BM)). See the module's docstring."""
    HALF: tl.constexpr = BK // 2
    STEP: tl.constexpr = KS * BK
    BLOCKS: tl.constexpr = (BK + BLOCK - 1) // BLOCK
    CUT: tl.constexpr = BK // BLOCKS
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    ks = tl.arange(0, KS)
    rows = n if EVEN_N else tl.minimum(n, N - 1)
    jk = ks[:, None, None] * HALF + tl.arange(0, HALF)[None, None, :]
    code_ptrs = codes_ptr + rows[None, :, None].to(tl.int64) * row_bytes + jk
    block = ks[:, None, None] * BLOCKS + tl.arange(0, BLOCKS)[None, None, :]
    if BK < BLOCK:
        block = ks[:, None, None] * BK // BLOCK
    scale_ptrs = scale_ptr + rows[None, :, None].to(tl.int64) * (K // BLOCK) + block
    if ONE_ROW:
        x_k = ks[:, None] * BK + tl.arange(0, CUT)[None, :]
        x_ptrs = x_ptr + x_k
    else:
        x_k = ks[:, None, None] * BK + tl.arange(0, CUT)[None, None, :]
        x_ptrs = x_ptr + m[None, :, None].to(tl.int64) * x_stride + x_k
        x_mask = m[None, :, None] < M
    first = tl.program_id(1) * STEP
    fill_table(lut_ptr, THREADS, DOT, ASM)

    acc = tl.zeros((KS, BN, BM), tl.float32)
    for k in tl.range(first, K, STEP * SPLIT, num_stages=STAGES):
        if ROW_SCALES:
            if EVEN_K:
                c = tl.load(code_ptrs + k // 2)
                absmax = tl.load(scale_ptrs + k // BLOCK)
            else:
                c = tl.load(code_ptrs + k // 2, mask=2 * jk < K - k, other=0)
                absmax = tl.load(scale_ptrs + k // BLOCK, mask=block * BLOCK < K - k, other=0.0)
            cs = split_last(c, BLOCKS)
            scales = split_each(absmax, BLOCKS)
            for r in tl.static_range(BLOCKS):
                at = x_ptrs + k + r * CUT
                if ONE_ROW:
                    x1 = tl.load(at) if EVEN_K else tl.load(at, mask=x_k < K - k - r * CUT, other=0.0)
                    xt = tl.broadcast_to(x1.to(DOT)[:, :, None], (KS, CUT, BM))
                else:
                    x = tl.load(at, mask=x_mask if EVEN_K else x_mask & (x_k < K - k - r * CUT), other=0.0)
                    xt = tl.trans(x.to(DOT), (0, 2, 1))
                part = tl.dot(lookup(cs[r], lut_ptr, DOT, ASM), xt, input_precision="ieee")
                acc += part * scales[r].to(tl.float32)[:, :, None]
        else:
            kk = ks[:, None, None] * BK + tl.arange(0, BK)[None, None, :]
            if ONE_ROW:
                x1 = tl.load(x_ptrs + k, mask=x_k < K - k, other=0.0)
                xt = tl.broadcast_to(x1.to(DOT)[:, :, None], (KS, BK, BM))
            else:
                xt = tl.trans(tl.load(x_ptrs + k, mask=x_mask & (x_k < K - k), other=0.0).to(DOT), (0, 2, 1))
            w = _scaled(codes_ptr, scale_ptr, lut_ptr, rows[None, :, None], k + kk, K, BLOCK, DOT)
            acc = tl.dot(w, xt, acc, input_precision="ieee")

    total = tl.sum(acc, 0)
    _store(total, n, m, rows, out_ptr, bias_ptr, M, N, out_stride, SPLIT, HAS_BIAS)


@triton.jit(do_not_specialize=["M"])
def codebook_gemm_wide_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    lut_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    row_bytes,
    x_stride,
    out_stride,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr,
    ASM: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Grid: (ceil(N / BN), SPLIT, ceil(M / BM))."""
    HALF: tl.constexpr = BK // 2
    BLOCKS: tl.constexpr = (BK + BLOCK - 1) // BLOCK
    CUT: tl.constexpr = BK // BLOCKS
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    rows = n if EVEN_N else tl.minimum(n, N - 1)
    j = tl.arange(0, HALF)[None, :]
    code_ptrs = codes_ptr + rows[:, None].to(tl.int64) * row_bytes + j
    block = tl.arange(0, BLOCKS)[None, :]
    scale_ptrs = scale_ptr + rows[:, None].to(tl.int64) * (K // BLOCK) + block
    # Rows beyond M read row M - 1 again: their products are never stored.
    kk = tl.arange(0, CUT)[None, :]
    x_ptrs = x_ptr + tl.minimum(m, M - 1)[:, None].to(tl.int64) * x_stride + kk
    first = tl.program_id(1) * BK
    fill_table(lut_ptr, THREADS, DOT, ASM)

    acc = tl.zeros((BN, BM), tl.float32)
    for k in tl.range(first, K, BK * SPLIT, num_stages=STAGES):
        if ROW_SCALES:
            if EVEN_K:
                c = tl.load(code_ptrs + k // 2)
                absmax = tl.load(scale_ptrs + k // BLOCK)
            else:
                c = tl.load(code_ptrs + k // 2, mask=2 * j < K - k, other=0)
                absmax = tl.load(scale_ptrs + k // BLOCK, mask=block * BLOCK < K - k, other=0.0)
            cs = split_last(c, BLOCKS)
            scales = split_each(absmax, BLOCKS)
            for r in tl.static_range(BLOCKS):
                at = x_ptrs + k + r * CUT
                x = tl.load(at) if EVEN_K else tl.load(at, mask=kk < K - k - r * CUT, other=0.0)
                part = tl.dot(lookup(cs[r], lut_ptr, DOT, ASM), tl.trans(x).to(DOT), input_precision="ieee")
                acc += part * scales[r].to(tl.float32)[:, None]
        else:
            x = tl.load(x_ptrs + k, mask=kk < K - k, other=0.0)
            w = _scaled(codes_ptr, scale_ptr, lut_ptr, rows[:, None], k + kk, K, BLOCK, DOT)
            acc = tl.dot(w, tl.trans(x).to(DOT), acc, input_precision="ieee")

    _store(acc, n, m, rows, out_ptr, bias_ptr, M, N, out_stride, SPLIT, HAS_BIAS)


@triton.jit
def _store(
    total, n, m, rows, out_ptr, bias_ptr, M, N, out_stride, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """`total [BN, BM]` float32 to out `[M, N]`, or to this split's part of `[SPLIT, M, N]`."""
    mask = (m[None, :] < M) & (n[:, None] < N)
    if SPLIT > 1:
        base = out_ptr + tl.program_id(1).to(tl.int64) * M * N
        tl.store(base + m[None, :] * N + n[:, None], total, mask=mask)
    else:
        if HAS_BIAS:
            total += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
        out_ptrs = out_ptr + m[None, :].to(tl.int64) * out_stride + n[:, None]
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)
