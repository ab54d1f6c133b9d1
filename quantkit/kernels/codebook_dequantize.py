"""W [N, K] from four-bit codebook weights, dense (Triton): `lut[q] * absmax` in float32, rounded once.

Equal bit for bit to `quantkit.encoding.dequantize` and to bitsandbytes (whose nested absmax is decoded when
a checkpoint is read). Any range of rows and of columns can be asked for: large products dequantize a slice
at a time into a buffer that stays in the L2 cache.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.codebook_lookup import code_at


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
