"""y = q(x) @ W.T where both are e4m3, on the chip's own fp8 matrix unit (Triton): many rows, tiled scales.

    acc [BM, BN] += dot(q [BM, 128], W [BN, 128].T) * x_scale[BM] * w_scale[BN]       per 128 inputs

Each step's product is summed by the matrix unit, the steps in float32 registers: Hopper's fp8 unit keeps
about 14 bits of a running sum (DeepSeek-V3 report, arXiv:2412.19437, section 3.3), and 128 products lose
little. Scales may cover any multiple of 128 inputs. Programs are numbered so that neighbours share tiles of W.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M"])
def float8_native_kernel(
    q_ptr,
    codes_ptr,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    block_n,
    scale_stride,
    x_scale_stride,
    out_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    X_GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Grid: (ceil(M / BM) * ceil(N / BN),). `q [M, K]` contiguous, `codes [N, K]`, both float8 pointers."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    width: tl.constexpr = 8
    group = tl.program_id(0) // (width * tiles_n)
    first = group * width
    size = tl.minimum(tiles_m - first, width)
    inside = tl.program_id(0) % (width * tiles_n)
    m = (first + inside % size) * BM + tl.arange(0, BM)
    n = (inside // size) * BN + tl.arange(0, BN)
    rows = tl.minimum(m, M - 1)
    columns = tl.minimum(n, N - 1)
    k = tl.arange(0, BK)
    q_ptrs = q_ptr + rows[:, None].to(tl.int64) * K + k[None, :]
    w_ptrs = codes_ptr + columns[None, :].to(tl.int64) * K + k[:, None]
    x_scale_ptrs = x_scale_ptr + rows * x_scale_stride
    scale_ptrs = scale_ptr + (columns // block_n) * scale_stride
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        if EVEN_K:
            q = tl.load(q_ptrs + start)
            w = tl.load(w_ptrs + start)
        else:
            q = tl.load(q_ptrs + start, mask=k[None, :] < K - start, other=0.0)
            w = tl.load(w_ptrs + start, mask=k[:, None] < K - start, other=0.0)
        part = tl.dot(q, w)
        if BLOCK_K > 0:
            part *= tl.load(scale_ptrs + start // BLOCK_K).to(tl.float32)[None, :]
        if X_GROUP > 0:
            part *= tl.load(x_scale_ptrs + start // X_GROUP)[:, None]
        acc += part
    if BLOCK_K == 0:
        acc *= tl.load(scale_ptrs).to(tl.float32)[None, :]
    if X_GROUP == 0:
        acc *= tl.load(x_scale_ptrs)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    out_ptrs = out_ptr + m[:, None].to(tl.int64) * out_stride + n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))
