"""Dense values of 3-bit affine codes whose rows and groups leave nothing over (Triton).

The layout is two planes per row: the low two bits of eight neighbouring codes are 16 bits, their top bits a byte
(`quantkit.bitpack.pack_planes3`). A thread takes both and makes the eight values of one wide store, so nothing
changes hands between threads; the general kernel (`affine_dequantize`) reads the top bits once per four codes.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.affine_unpack import less_zero


@triton.jit
def _value(low, top, r: tl.constexpr, zero, scale, DTYPE: tl.constexpr):
    q = ((low >> (2 * r)) & 3) | (((top >> r) & 1) << 2)
    return (less_zero(q, zero) * scale).to(DTYPE)


@triton.jit(do_not_specialize=["row_start"])
def affine_dequantize3_kernel(
    pairs_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    row_start,
    k_start,
    row_bytes,
    high_offset,
    groups,
    out_stride,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Tiles of `[BN, BK]` from (row_start, k_start) on. `pairs_ptr` is `codes_ptr` to int16, `high_offset`
    the first byte of top bits in a row.

    Grid: (columns / BK, rows / BN). GROUP: a multiple of 8, 0 for one group per row.
    """
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row = (row_start + n).to(tl.int64)[:, None]
    k = k_start + (tl.program_id(0) * BK + 8 * tl.arange(0, BK // 8))[None, :]
    # One piece per thread and row, not several: so that the store's layout is the loads'.
    low = tl.load(pairs_ptr + tl.max_contiguous(row * (row_bytes // 2) + k // 8, [1, 1])).to(tl.int32)
    top = tl.load(codes_ptr + tl.max_contiguous(row * row_bytes + high_offset + k // 8, [1, 1])).to(tl.int32)
    at = row * groups + (k // GROUP if GROUP > 0 else k * 0)
    scale = tl.load(scale_ptr + at).to(tl.float32)
    zero = tl.load(zero_ptr + at)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    a = tl.join(_value(low, top, 0, zero, scale, dtype), _value(low, top, 4, zero, scale, dtype))
    b = tl.join(_value(low, top, 2, zero, scale, dtype), _value(low, top, 6, zero, scale, dtype))
    c = tl.join(_value(low, top, 1, zero, scale, dtype), _value(low, top, 5, zero, scale, dtype))
    d = tl.join(_value(low, top, 3, zero, scale, dtype), _value(low, top, 7, zero, scale, dtype))
    # The bits of a value's place among the eight, from high to low, were joined in this order.
    dense = tl.join(tl.join(a, b), tl.join(c, d)).reshape(BN, BK)
    column = tl.program_id(0) * BK + tl.arange(0, BK)
    tl.store(out_ptr + n[:, None].to(tl.int64) * out_stride + column[None, :], dense)
