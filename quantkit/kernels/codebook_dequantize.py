"""W [N, K] from four-bit codebook weights, dense (Triton): `lut[q] * absmax` in float32, rounded once.

Equal bit for bit to `quantkit.encoding.dequantize` and to bitsandbytes (whose nested absmax is decoded when
a checkpoint is read). Any range of rows and of columns can be asked for: large products dequantize a slice
at a time into a buffer that stays in the L2 cache.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.codebook_lookup import code_at, eight_values


@triton.jit(do_not_specialize=["row_start", "k_start"])
def codebook_dequantize_kernel(
    codes_ptr,
    scale_ptr,
    lut_ptr,
    out_ptr,
    rows,
    columns,
    row_start,
    k_start,
    K,
    out_stride,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Rows row_start .. + rows and columns k_start .. + columns of W into out `[rows, columns]`.

    Grid: (ceil(columns / BK), ceil(rows / BN)). EVEN_K: K and `k_start` are even, so bytes hold neighbours
    of one row. ROW_SCALES: BLOCK divides K and BK, `k_start` is a multiple of BLOCK. EVEN: tiles fit rows and
    columns, so that there are no masks, which would make loads a byte wide; `k_start` is a multiple of 128.
    """
    HALF: tl.constexpr = BK // 2
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row = (row_start + (n if EVEN else tl.minimum(n, rows - 1))).to(tl.int64)
    if EVEN:
        k_start = k_start // 128 * 128  # which it is: so that the compiler knows
    start = tl.program_id(0) * BK
    k = start + tl.arange(0, BK)
    i = row[:, None] * K + k_start + k[None, :]
    inside = k[None, :] < columns
    if EVEN_K:
        j = tl.arange(0, HALF)
        at = row[:, None] * (K // 2) + (k_start + start) // 2 + j[None, :]
        if EVEN:
            c = tl.load(codes_ptr + at)
        else:
            c = tl.load(codes_ptr + at, mask=start + 2 * j[None, :] < columns, other=0)
        q = tl.join((c >> 4).to(tl.int32), (c & 15).to(tl.int32)).reshape(BN, BK)
    else:
        q = code_at(codes_ptr, i, inside)
    value = tl.load(lut_ptr + q).to(tl.float32)
    if ROW_SCALES and BK >= BLOCK:
        BLOCKS: tl.constexpr = BK // BLOCK
        b = tl.arange(0, BLOCKS)
        blocks = row[:, None] * (K // BLOCK) + (k_start + start) // BLOCK + b[None, :]
        if EVEN:
            absmax = tl.load(scale_ptr + blocks)
        else:
            absmax = tl.load(scale_ptr + blocks, mask=start + b[None, :] * BLOCK < columns, other=0.0)
        wide = tl.broadcast_to(absmax.to(tl.float32)[:, :, None], (BN, BLOCKS, BLOCK))
        value = (value.reshape(BN, BLOCKS, BLOCK) * wide).reshape(BN, BK)
    else:
        value *= tl.load(scale_ptr + i // BLOCK, mask=inside, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + n[:, None].to(tl.int64) * out_stride + k[None, :]
    if EVEN:
        tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty))
    else:
        tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=(n[:, None] < rows) & inside)


@triton.jit(do_not_specialize=["row_start"])
def codebook_dequantize_words_kernel(
    words_ptr,
    scale_ptr,
    lut_ptr,
    out_ptr,
    row_start,
    k_start,
    K,
    out_stride,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCK: tl.constexpr,
    ASM: tl.constexpr,
):
    """The same where nothing is odd: tiles fit the range, BLOCK divides K, codes are 32-bit words of eight.

    Grid: (columns / BK, rows / BN). A thread decodes a word into the eight neighbours of one wide store; scales
    come with the words, a load for each that its neighbours share. So nothing changes hands between threads.
    """
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row = (row_start + n).to(tl.int64)
    k = tl.program_id(0) * BK + 8 * tl.arange(0, BK // 8)
    # One word per thread and row, not four: so that the store's layout is the load's.
    at = tl.max_contiguous(row[:, None] * (K // 8) + ((k_start + k) // 8)[None, :], [1, 1])
    word = tl.load(words_ptr + at)
    absmax = tl.load(scale_ptr + row[:, None] * (K // BLOCK) + ((k_start + k) // BLOCK)[None, :]).to(
        tl.float32
    )
    v0, v1, v2, v3, v4, v5, v6, v7 = eight_values(word, lut_ptr, ASM)
    dtype = out_ptr.dtype.element_ty
    a = tl.join((v0 * absmax).to(dtype), (v4 * absmax).to(dtype))
    b = tl.join((v2 * absmax).to(dtype), (v6 * absmax).to(dtype))
    c = tl.join((v1 * absmax).to(dtype), (v5 * absmax).to(dtype))
    d = tl.join((v3 * absmax).to(dtype), (v7 * absmax).to(dtype))
    # The bits of a value's place in its word, from high to low, were joined in this order.
    dense = tl.join(tl.join(a, b), tl.join(c, d)).reshape(BN, BK)
    out = tl.program_id(0) * BK + tl.arange(0, BK)
    tl.store(out_ptr + n[:, None].to(tl.int64) * out_stride + out[None, :], dense)
