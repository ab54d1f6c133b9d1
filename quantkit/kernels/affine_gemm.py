"""y = x @ W.T from packed affine weights, for M = 1 .. 128 (Triton).

The product is computed as W @ x.T, with the weight as the first operand of the tensor cores, so that
codes go from shared memory straight into the registers where the matrix instruction wants them, and a
small M pads only to 8. A program owns BN rows of W; its K range is cut into KS slices that run side by
side as a batched dot (one slice per warp or warp pair) and are added in a fixed order at the end. That
is split-K without a second launch, a workspace or atomics, so results are the same bit for bit on
every run.

    one step of the loop, BK = BKB * PER inputs per slice:

        codes  [KS, BN, BKB] u8 --unpack--> q + OFFSET  PER x [KS, BN, BKB]
        x      [KS, BM, BK]     --split---> PER x [KS, BM, BKB] --transpose--> [KS, BKB, BM]
        part   [KS, BN, BM] f32 = sum over parts of dot;  sums = the same with ones for the weight
        acc   += (part - sums * (zero + OFFSET)) * scale[KS, BN]

where the group size is a multiple of BK, so that a row of the tile has one scale ("row" scales), or BK spans
two or four groups, each of which is then multiplied by itself with its own scale (`block_split`);

otherwise each weight is scaled before the dot, at the price of a rounding.

Around the product, each only where its flag is set:

    HAS_NORM      x is RMS-normalized: x * norm_weight enters the dot, and since the row's factor
                  1 / rms(x) is common to a column of the result, it multiplies the sums at the end
    GATED         rows n and n + N/2 of W are gate and up: silu(gate) * up leaves, N/2 wide
    HAS_BIAS, HAS_RESIDUAL are added (the residual last)

With SPLIT > 1, program_id(1) takes every SPLIT-th step and writes float32 partial sums `[SPLIT, M, N]`
that `sum_splits_kernel` adds in order. (For short, wide products, where BN rows per program leave
multiprocessors idle.)
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.affine_unpack import (
    centred,
    code_offset,
    codes_part,
    dot_pieces,
    ones_like_codes,
    split_inputs,
    unpack,
    unpack_top,
)
from quantkit.kernels.block_split import split_each, split_last


@triton.jit(do_not_specialize=["M"])
def affine_gemm_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    residual_ptr,
    norm_ptr,
    out_ptr,
    eps,
    M,
    N,
    K,
    row_bytes,
    high_offset,
    groups,
    x_stride,
    out_stride,
    BITS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BKB: tl.constexpr,
    KS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    CENTRED: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    ONE_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GATED: tl.constexpr,
    DOT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid: (ceil(N / BN), SPLIT, ceil(M / BM)). See the module's docstring."""
    PER: tl.constexpr = 4 if BITS == 3 else 8 // BITS
    BK: tl.constexpr = BKB * PER
    STEP: tl.constexpr = KS * BK
    BLOCKS: tl.constexpr = BK // GROUP if ROW_SCALES and GROUP > 0 and GROUP < BK else 1
    CUT: tl.constexpr = BK // BLOCKS
    if GATED:
        # Half of the tile's rows are gate rows, half the up rows that belong to them.
        half = tl.program_id(0) * (BN // 2) + tl.arange(0, BN) % (BN // 2)
        n = tl.where(tl.arange(0, BN) < BN // 2, half, half + N // 2)
        n = tl.where(half < N // 2, n, N)
    else:
        n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    ks = tl.arange(0, KS)
    j = tl.arange(0, BKB)
    rows = n if EVEN_N else tl.minimum(n, N - 1)
    first = tl.program_id(1) * STEP

    jk = ks[:, None, None] * BKB + j[None, None, :]
    code_ptrs = codes_ptr + rows[None, :, None].to(tl.int64) * row_bytes + jk
    PLANES: tl.constexpr = BITS == 3 and ROW_SCALES and BKB // BLOCKS >= 32
    if PLANES:
        jh = ks[:, None, None] * (BKB // 2) + tl.arange(0, BKB // 2)[None, None, :]
        high_ptrs = codes_ptr + rows[None, :, None].to(tl.int64) * row_bytes + high_offset + jh
    elif BITS == 3:
        high_ptrs = codes_ptr + rows[None, :, None].to(tl.int64) * row_bytes + high_offset + jk // 2
    if ONE_ROW:
        x_k = ks[:, None] * BK + tl.arange(0, CUT)[None, :]
        x_ptrs = x_ptr + x_k
    else:
        x_k = ks[:, None, None] * BK + tl.arange(0, CUT)[None, None, :]
        x_ptrs = x_ptr + m[None, :, None].to(tl.int64) * x_stride + x_k
        x_mask = m[None, :, None] < M
    group_ptr = rows[None, :] * groups

    acc = tl.zeros((KS, BN, BM), tl.float32)
    if HAS_NORM:
        squares = tl.zeros((KS, 1) if ONE_ROW else (KS, BM), tl.float32)
    if ROW_SCALES:
        # Inputs at which the scales of a step begin, [KS, 1, BLOCKS].
        g_k = ks[:, None, None] * BK + tl.arange(0, BLOCKS)[None, None, :] * CUT
        if BLOCKS > 1 and EVEN_K:  # consecutive groups, loaded as such
            g_step = ks[:, None, None] * BLOCKS + tl.arange(0, BLOCKS)[None, None, :]
            g = first // GROUP + g_step
        else:
            g = g_k * 0 if GROUP == 0 else tl.minimum((first + g_k) // GROUP, groups - 1)
        scale = tl.load(scale_ptr + group_ptr[:, :, None] + g)
        zero = tl.load(zero_ptr + group_ptr[:, :, None] + g)
    for k in tl.range(first, K, STEP * SPLIT, num_stages=STAGES):
        if EVEN_K:
            c = tl.load(code_ptrs + k // PER)
        else:
            c = tl.load(code_ptrs + k // PER, mask=jk < (K - k + PER - 1) // PER, other=0)
        h = c
        if BITS == 3:
            if EVEN_K:
                h = tl.load(high_ptrs + k // 8)
            elif PLANES:
                h = tl.load(high_ptrs + k // 8, mask=jh < (K - k + 7) // 8, other=0)
            else:
                h = tl.load(high_ptrs + k // 8, mask=jk < (K - k + PER - 1) // PER, other=0)
        if ROW_SCALES:
            # The next step's scales are asked for now: the pipeliner leaves loads this narrow alone.
            if BLOCKS > 1 and EVEN_K:
                g = tl.minimum((k + STEP * SPLIT) // GROUP, groups - KS * BLOCKS) + g_step
            else:
                g = g_k * 0 if GROUP == 0 else tl.minimum((k + STEP * SPLIT + g_k) // GROUP, groups - 1)
            next_scale = tl.load(scale_ptr + group_ptr[:, :, None] + g)
            next_zero = tl.load(zero_ptr + group_ptr[:, :, None] + g)
            scales = split_each(scale, BLOCKS)
            zeros = split_each(zero, BLOCKS)
            cs = split_last(c, BLOCKS)
            hs = split_last(h, BLOCKS)
        for block in tl.static_range(BLOCKS):
            at = k + block * CUT
            if ONE_ROW:
                x1 = tl.load(x_ptrs + at) if EVEN_K else tl.load(x_ptrs + at, mask=x_k < K - at, other=0.0)
                if HAS_NORM:
                    wide = x1.to(tl.float32)
                    squares += tl.sum(wide * wide, 1)[:, None]
                    norm = tl.load(norm_ptr + x_k + at, mask=x_k < K - at, other=0.0)
                    x1 = (wide * norm).to(x1.dtype)
                x = tl.broadcast_to(x1[:, None, :], (KS, BM, CUT))
            else:
                x = tl.load(x_ptrs + at, mask=x_mask if EVEN_K else x_mask & (x_k < K - at), other=0.0)
                if HAS_NORM:
                    wide = x.to(tl.float32)
                    squares += tl.sum(wide * wide, 2)
                    norm = tl.load(norm_ptr + x_k + at, mask=x_k < K - at, other=0.0)
                    x = (wide * norm).to(x.dtype)

            xs = split_inputs(x, PER)
            if ROW_SCALES:
                jb = tl.arange(0, BKB // BLOCKS)[None, None, :]
                ws = unpack(cs[block], hs[block], jb, 2 if PLANES else BITS, DOT, ASM)
                ones = ones_like_codes(cs[block], DOT, ASM)
                part = tl.zeros((KS, BN, BM), tl.float32)
                sums = tl.zeros((KS, BN, BM), tl.float32)
                for r in tl.static_range(PER):
                    w = ws[r]
                    if CENTRED:
                        w = centred(w, 2 if PLANES else BITS, DOT)
                    xr = tl.trans(xs[r], (0, 2, 1))
                    part = dot_pieces(w, xr, part, DOT)
                    # sum_k x, in the layout of `part`: the tensor cores idle here, adders do not.
                    sums = dot_pieces(ones, xr, sums, DOT)
                low = zeros[block].to(tl.float32) + code_offset(BITS, DOT, CENTRED)
                if PLANES:
                    xs8 = split_inputs(x, 8)
                    tops = unpack_top(hs[block], DOT, ASM)
                    for r in tl.static_range(8):
                        w = tops[r]
                        if CENTRED:
                            w = centred(w, 2, DOT)
                        else:
                            low += code_offset(2, DOT, False) if r == 0 else 0.0
                        part = dot_pieces(w, tl.trans(xs8[r], (0, 2, 1)), part, DOT)
                acc += (part - sums * low[:, :, None]) * scales[block].to(tl.float32)[:, :, None]
            else:
                for r in tl.static_range(PER):
                    ge = tl.minimum((k + jk * PER + r) // GROUP, groups - 1) if GROUP > 0 else jk * 0
                    s = tl.load(scale_ptr + group_ptr[:, :, None] + ge).to(tl.float32)
                    z = tl.load(zero_ptr + group_ptr[:, :, None] + ge).to(tl.float32)
                    q = codes_part(c, h, j[None, None, :], r, BITS).to(tl.float32)
                    w = ((q - z) * s).to(DOT)
                    xr = tl.trans(xs[r], (0, 2, 1)).to(DOT)
                    acc = tl.dot(w, xr, acc, input_precision="ieee")
        if ROW_SCALES:
            scale = next_scale
            zero = next_zero

    total = tl.sum(acc, 0)
    if HAS_NORM:
        total = total * tl.rsqrt(tl.sum(squares, 0) / K + eps)[None, :]
    if SPLIT > 1:
        base = out_ptr + tl.program_id(1).to(tl.int64) * M * N
        mask = (m[None, :] < M) & (n[:, None] < N)
        tl.store(base + m[None, :] * N + n[:, None], total, mask=mask)
    else:
        if HAS_BIAS:
            total += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
        columns = n
        width = N
        if GATED:
            gate, up = tl.split(tl.permute(total.reshape(2, BN // 2, BM), (1, 2, 0)))
            total = gate / (1.0 + tl.exp(-gate)) * up
            columns = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
            width = N // 2
        mask = (m[None, :] < M) & (columns[:, None] < width)
        at = m[None, :].to(tl.int64) * out_stride + columns[:, None]
        if HAS_RESIDUAL:
            total += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size"])
def sum_splits_kernel(
    parts_ptr,
    bias_ptr,
    out_ptr,
    N,
    size,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """out `[M, N]` = sum of parts `[SPLIT, M, N]` in order, plus bias; grid (ceil(M * N / BLOCK),)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLIT):
        total += tl.load(parts_ptr + s * size + i, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + i % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=mask)
