"""y = x @ W.T from e4m3 weights with scales per tensor, channel or tile, for M = 1 .. 128 (Triton).

W @ x.T with the decoded weight as the first operand, as in `affine_gemm`. Products of e4m3 codes and x are
summed in float32; scales multiply the accumulator, never the weight:

    one step:   codes [KS, BN, BK] u8 --decode--> W        x [KS, BM, BK]
                acc  += dot(W, x.T)                          scales cover the whole of K: applied once, at the end
                acc  += dot(W, x.T) * w_scale * x_scale      otherwise; BK divides both kinds of tile

Rounded activations (`float8_activation`) arrive as exact e4m3 values in the dtype of x with their scales
aside, so the product is the exact one of two e4m3 matrices on every chip.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.float8_decode import decode, rescale


@triton.jit(do_not_specialize=["M"])
def float8_gemm_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    x_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    block_n,
    scale_stride,
    x_scale_stride,
    x_stride,
    out_stride,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    KS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    X_GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    ONE_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid: (ceil(N / BN), SPLIT, ceil(M / BM)).

    BLOCK_K: inputs per weight scale, 0 for all of them. X_GROUP: inputs per activation scale, 0 for all, -1
    for no activation scales.
    """
    STEP: tl.constexpr = KS * BK
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    ks = tl.arange(0, KS)
    rows = n if EVEN_N else tl.minimum(n, N - 1)
    columns = tl.minimum(m, M - 1)
    kk = ks[:, None, None] * BK + tl.arange(0, BK)[None, None, :]
    code_ptrs = codes_ptr + rows[None, :, None].to(tl.int64) * K + kk
    scale_ptrs = scale_ptr + (rows // block_n) * scale_stride
    x_scale_ptrs = x_scale_ptr + columns * x_scale_stride
    if ONE_ROW:
        x_k = ks[:, None] * BK + tl.arange(0, BK)[None, :]
        x_ptrs = x_ptr + x_k
    else:
        x_ptrs = x_ptr + m[None, :, None].to(tl.int64) * x_stride + kk
        x_mask = m[None, :, None] < M

    acc = tl.zeros((KS, BN, BM), tl.float32)
    for k in tl.range(tl.program_id(1) * STEP, K, STEP * SPLIT, num_stages=STAGES):
        if EVEN_K:
            c = tl.load(code_ptrs + k)
        else:
            c = tl.load(code_ptrs + k, mask=kk < K - k, other=0)
        if ONE_ROW:
            x1 = tl.load(x_ptrs + k) if EVEN_K else tl.load(x_ptrs + k, mask=x_k < K - k, other=0.0)
            x = tl.broadcast_to(x1[:, None, :], (KS, BM, BK))
        else:
            x = tl.load(x_ptrs + k, mask=x_mask if EVEN_K else x_mask & (kk < K - k), other=0.0)
        w = decode(c, DOT, ASM)
        xt = tl.trans(x, (0, 2, 1)).to(DOT)
        if BLOCK_K == 0 and X_GROUP <= 0:
            acc = tl.dot(w, xt, acc, input_precision="ieee")
        else:
            part = tl.dot(w, xt, input_precision="ieee")
            at = tl.minimum(k + ks * BK, K - 1)  # a slice beyond K has only zeros
            if BLOCK_K > 0:
                s = tl.load(scale_ptrs[None, :] + (at // BLOCK_K)[:, None]).to(tl.float32)
                part *= s[:, :, None]
            if X_GROUP > 0:
                xs = tl.load(x_scale_ptrs[None, :] + (at // X_GROUP)[:, None])
                part *= xs[:, None, :]
            acc += part

    _finish(tl.sum(acc, 0), n, m, rows, scale_ptrs, x_scale_ptrs, bias_ptr, out_ptr, M, N, out_stride,
            SPLIT, BLOCK_K, X_GROUP, HAS_BIAS, DOT)  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def float8_gemm_wide_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    x_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    block_n,
    scale_stride,
    x_scale_stride,
    x_stride,
    out_stride,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    X_GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr,
    ASM: tl.constexpr,
):
    """The same with one slice: its warps share BN rows of W and one tile of x."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    rows = n if EVEN_N else tl.minimum(n, N - 1)
    columns = tl.minimum(m, M - 1)
    kk = tl.arange(0, BK)[None, :]
    code_ptrs = codes_ptr + rows[:, None].to(tl.int64) * K + kk
    scale_ptrs = scale_ptr + (rows // block_n) * scale_stride
    x_scale_ptrs = x_scale_ptr + columns * x_scale_stride
    x_ptrs = x_ptr + m[:, None].to(tl.int64) * x_stride + kk
    x_mask = m[:, None] < M

    acc = tl.zeros((BN, BM), tl.float32)
    for k in tl.range(tl.program_id(1) * BK, K, BK * SPLIT, num_stages=STAGES):
        if EVEN_K:
            c = tl.load(code_ptrs + k)
            x = tl.load(x_ptrs + k, mask=x_mask, other=0.0)
        else:
            c = tl.load(code_ptrs + k, mask=kk < K - k, other=0)
            x = tl.load(x_ptrs + k, mask=x_mask & (kk < K - k), other=0.0)
        w = decode(c, DOT, ASM)
        xt = tl.trans(x).to(DOT)
        if BLOCK_K == 0 and X_GROUP <= 0:
            acc = tl.dot(w, xt, acc, input_precision="ieee")
        else:
            part = tl.dot(w, xt, input_precision="ieee")
            if BLOCK_K > 0:
                part *= tl.load(scale_ptrs + k // BLOCK_K).to(tl.float32)[:, None]
            if X_GROUP > 0:
                part *= tl.load(x_scale_ptrs + k // X_GROUP)[None, :]
            acc += part

    _finish(acc, n, m, rows, scale_ptrs, x_scale_ptrs, bias_ptr, out_ptr, M, N, out_stride, SPLIT, BLOCK_K,
            X_GROUP, HAS_BIAS, DOT)  # fmt: skip


@triton.jit
def _finish(
    total,
    n,
    m,
    rows,
    scale_ptrs,
    x_scale_ptrs,
    bias_ptr,
    out_ptr,
    M,
    N,
    out_stride,
    SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    X_GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Scales that cover all of K, then the store of `total [BN, BM]` (or of this split's part)."""
    if BLOCK_K == 0:
        total *= tl.load(scale_ptrs).to(tl.float32)[:, None]
    if X_GROUP == 0:
        total *= tl.load(x_scale_ptrs)[None, :]
    total *= rescale(DOT)
    mask = (m[None, :] < M) & (n[:, None] < N)
    if SPLIT > 1:
        base = out_ptr + tl.program_id(1).to(tl.int64) * M * N
        tl.store(base + m[None, :] * N + n[:, None], total, mask=mask)
    else:
        if HAS_BIAS:
            total += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
        out_ptrs = out_ptr + m[None, :].to(tl.int64) * out_stride + n[:, None]
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)
