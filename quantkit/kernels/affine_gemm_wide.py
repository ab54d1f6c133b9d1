"""y = x @ W.T from packed affine weights, for M = 17 .. 128 (Triton).

As in `affine_gemm` the weight is the first operand and codes are unpacked in registers, but the warps of
a program stand side by side on BN rows of W and share one tile of x: at these M, reading x again for
every few rows would cost more than reading W. K may be cut into SPLIT strides over programs; partial
sums are then added in order by `sum_splits_kernel`.

    one step, BK = BKB * PER inputs:
        codes [BN, BKB] u8 --unpack--> q + OFFSET  PER x [BN, BKB]
        x     PER x [BM, BKB], split beforehand by `split_inputs_kernel` --transpose--> [BKB, BM]
        part  [BN, BM] f32 = sum over parts of dot;  sums [BM] f32, of x, by the same kernel
        acc  += (part - sums * (zero + OFFSET)) * scale[BN]

Splitting x beforehand (a launch of a microsecond or two) lets the copy engine put x straight where the
matrix instruction reads it; the same launch applies an input permutation.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.affine_unpack import centred, code_offset, codes_part, dot_pieces, unpack, unpack_top


@triton.jit(do_not_specialize=["M"])
def split_inputs_kernel(
    x_ptr,
    perm_ptr,
    out_ptr,
    sums_ptr,
    M,
    K,
    x_stride,
    width,
    PER: tl.constexpr,
    TILES: tl.constexpr,
    BKB: tl.constexpr,
    HAS_PERM: tl.constexpr,
):
    """x `[M, K]`, perhaps permuted, as parts and sums. Grid (ceil(width / (TILES * BKB)), M).

    out `[PER, M, width]`: part r of a row holds x[perm][r::PER], then zeros.
    sums float32 `[width / BKB, M]`: of the BKB * PER inputs of each step of `affine_gemm_wide_kernel`.
    """
    m = tl.program_id(1)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    j = tile[:, None] * BKB + tl.arange(0, BKB)[None, :]
    total = tl.zeros((TILES, BKB), tl.float32)
    for r in tl.static_range(PER):
        k = j * PER + r
        source = k
        if HAS_PERM:
            source = tl.load(perm_ptr + k, mask=k < K, other=0)
        x = tl.load(x_ptr + m.to(tl.int64) * x_stride + source, mask=k < K, other=0.0)
        total += x.to(tl.float32)
        tl.store(out_ptr + (r * M + m).to(tl.int64) * width + j, x, mask=j < width)
    tl.store(sums_ptr + tile * M + m, tl.sum(total, 1), mask=tile * BKB < width)


@triton.jit(do_not_specialize=["M"])
def affine_gemm_wide_kernel(
    parts_ptr,
    eighths_ptr,
    sums_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    row_bytes,
    high_offset,
    groups,
    width,
    out_stride,
    BITS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BKB: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    CENTRED: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid: (ceil(N / BN), SPLIT, ceil(M / BM)). See the module's docstring."""
    PER: tl.constexpr = 4 if BITS == 3 else 8 // BITS
    BK: tl.constexpr = BKB * PER
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    j = tl.arange(0, BKB)
    rows = n if EVEN_N else tl.minimum(n, N - 1)
    code_ptrs = codes_ptr + rows[:, None].to(tl.int64) * row_bytes + j[None, :]
    PLANES: tl.constexpr = BITS == 3 and ROW_SCALES and BKB >= 32
    if PLANES:
        jh = tl.arange(0, BKB // 2)
        high_ptrs = codes_ptr + rows[:, None].to(tl.int64) * row_bytes + high_offset + jh[None, :]
        x8_ptrs = eighths_ptr + tl.minimum(m, M - 1)[:, None].to(tl.int64) * (width // 2) + jh[None, :]
    elif BITS == 3:
        high_ptrs = codes_ptr + rows[:, None].to(tl.int64) * row_bytes + high_offset + j[None, :] // 2
    # Rows beyond M read row M - 1 again: their products are never stored.
    x_ptrs = parts_ptr + tl.minimum(m, M - 1)[:, None].to(tl.int64) * width + j[None, :]
    group_ptr = rows * groups

    acc = tl.zeros((BN, BM), tl.float32)
    first = tl.program_id(1) * BK
    if ROW_SCALES:
        g = tl.minimum(first // GROUP, groups - 1) if GROUP > 0 else 0
        scale = tl.load(scale_ptr + group_ptr + g)
        zero = tl.load(zero_ptr + group_ptr + g)
    for k in tl.range(first, K, BK * SPLIT, num_stages=STAGES):
        if EVEN_K:
            c = tl.load(code_ptrs + k // PER)
        else:
            c = tl.load(code_ptrs + k // PER, mask=j[None, :] < (K - k + PER - 1) // PER, other=0)
        h = c
        if PLANES:
            if EVEN_K:
                h = tl.load(high_ptrs + k // 8)
            else:
                h = tl.load(high_ptrs + k // 8, mask=jh[None, :] < (K - k + 7) // 8, other=0)
        elif BITS == 3:
            h = tl.load(high_ptrs + k // 8, mask=j[None, :] < (K - k + PER - 1) // PER, other=0)
        if ROW_SCALES:
            # The next step's scales are asked for now: the pipeliner leaves loads this narrow alone.
            g = tl.minimum((k + BK * SPLIT) // GROUP, groups - 1) if GROUP > 0 else 0
            next_scale = tl.load(scale_ptr + group_ptr + g)
            next_zero = tl.load(zero_ptr + group_ptr + g)
            ws = unpack(c, h, j[None, :], 2 if PLANES else BITS, DOT, ASM)
            part = tl.zeros((BN, BM), tl.float32)
            for r in tl.static_range(PER):
                w = ws[r]
                if CENTRED:
                    w = centred(w, 2 if PLANES else BITS, DOT)
                x = tl.load(
                    x_ptrs + (r * M * width + k // PER), mask=j[None, :] < width - k // PER, other=0.0
                )
                part = dot_pieces(w, tl.trans(x), part, DOT)
            sums = tl.load(sums_ptr + (k // BK) * M + m, mask=m < M, other=0.0)
            low = zero.to(tl.float32) + code_offset(BITS, DOT, CENTRED)
            if PLANES:
                tops = unpack_top(h, DOT, ASM)
                for r in tl.static_range(8):
                    w = tops[r]
                    if CENTRED:
                        w = centred(w, 2, DOT)
                    else:
                        low += code_offset(2, DOT, False) if r == 0 else 0.0
                    x = tl.load(
                        x8_ptrs + (r * M * (width // 2) + k // 8),
                        mask=jh[None, :] < (width - k // PER) // 2,
                        other=0.0,
                    )
                    part = dot_pieces(w, tl.trans(x), part, DOT)
            acc += (part - sums[None, :] * low[:, None]) * scale.to(tl.float32)[:, None]
            scale = next_scale
            zero = next_zero
        else:
            for r in tl.static_range(PER):
                ge = tl.minimum((k + j * PER + r) // GROUP, groups - 1)
                s = tl.load(scale_ptr + group_ptr[:, None] + ge[None, :]).to(tl.float32)
                z = tl.load(zero_ptr + group_ptr[:, None] + ge[None, :]).to(tl.float32)
                q = codes_part(c, h, j[None, :], r, BITS).to(tl.float32)
                w = ((q - z) * s).to(DOT)
                x = tl.load(
                    x_ptrs + (r * M * width + k // PER), mask=j[None, :] < width - k // PER, other=0.0
                )
                acc = tl.dot(w, tl.trans(x).to(DOT), acc, input_precision="ieee")

    mask = (m[None, :] < M) & (n[:, None] < N)
    if SPLIT > 1:
        base = out_ptr + tl.program_id(1).to(tl.int64) * M * N
        tl.store(base + m[None, :] * N + n[:, None], acc, mask=mask)
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
        out_ptrs = out_ptr + m[None, :].to(tl.int64) * out_stride + n[:, None]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)
