"""W [N, K] from packed affine codes, dense (Triton): `(q - zero) * scale` in float32, rounded once.

A program unpacks BN x BKB bytes and joins the parts of a byte again, so that a thread stores
neighbouring columns. Its columns lie in one group where the group allows it. Rounding as in
`quantkit.encoding.dequantize`: results are equal bit for bit.
Any range of rows and of columns can be asked for, which is how large products dequantize a slice at
a time into a buffer that stays in the L2 cache.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.affine_unpack import codes_part, less_zero


@triton.jit
def _value(
    c,
    h,
    j,
    r: tl.constexpr,
    k0,
    rows,
    scale_ptr,
    zero_ptr,
    groups,
    BITS: tl.constexpr,
    PER: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    if GROUP == 0:
        at = rows[:, None] * groups
    elif ROW_SCALES:
        at = rows[:, None] * groups + tl.minimum(k0 // GROUP, groups - 1)
    else:
        at = rows[:, None] * groups + tl.minimum((k0 + j[None, :] * PER + r) // GROUP, groups - 1)
    scale = tl.load(scale_ptr + at).to(tl.float32)
    zero = tl.load(zero_ptr + at)
    q = codes_part(c, h, j[None, :], r, BITS)
    return (less_zero(q, zero) * scale).to(DTYPE)


@triton.jit(do_not_specialize=["row_start", "k_start"])
def affine_dequantize_kernel(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    perm_ptr,
    out_ptr,
    N,
    K,
    row_start,
    k_start,
    row_bytes,
    high_offset,
    groups,
    out_stride,
    BITS: tl.constexpr,
    BN: tl.constexpr,
    BKB: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    HAS_PERM: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Rows row_start .. row_start + N and columns k_start .. k_start + K into out `[N, K]`.

    Grid: (ceil(K / (BKB * PER)), ceil(N / BN)); `k_start` is a multiple of 128. EVEN: tiles fit N and K, so
    that there are no masks, which would make loads a byte wide.
    """
    PER: tl.constexpr = 4 if BITS == 3 else 8 // BITS
    BK: tl.constexpr = BKB * PER
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    j = tl.arange(0, BKB)
    k_start = k_start // 128 * 128  # which it is: so that the compiler knows
    k0 = k_start + tl.program_id(0) * BK
    end = k_start + K
    rows = row_start + (n if EVEN else tl.minimum(n, N - 1))
    inside = k0 // PER + j[None, :] < (end + PER - 1) // PER
    at = codes_ptr + rows[:, None].to(tl.int64) * row_bytes
    if EVEN:
        c = tl.load(at + k0 // PER + j[None, :])
    else:
        c = tl.load(at + k0 // PER + j[None, :], mask=inside, other=0)
    h = c
    if BITS == 3:
        if EVEN:
            h = tl.load(at + high_offset + k0 // 8 + j[None, :] // 2)
        else:
            h = tl.load(at + high_offset + k0 // 8 + j[None, :] // 2, mask=inside, other=0)

    if PER == 1:
        w = _value(c, h, j, 0, k0, rows, scale_ptr, zero_ptr, groups, BITS, PER, GROUP, ROW_SCALES, DTYPE)
    elif PER == 2:
        a = _value(c, h, j, 0, k0, rows, scale_ptr, zero_ptr, groups, BITS, PER, GROUP, ROW_SCALES, DTYPE)
        b = _value(c, h, j, 1, k0, rows, scale_ptr, zero_ptr, groups, BITS, PER, GROUP, ROW_SCALES, DTYPE)
        w = tl.join(a, b).reshape(BN, BK)
    else:
        a0 = _value(c, h, j, 0, k0, rows, scale_ptr, zero_ptr, groups, BITS, PER, GROUP, ROW_SCALES, DTYPE)
        a1 = _value(c, h, j, 1, k0, rows, scale_ptr, zero_ptr, groups, BITS, PER, GROUP, ROW_SCALES, DTYPE)
        a2 = _value(c, h, j, 2, k0, rows, scale_ptr, zero_ptr, groups, BITS, PER, GROUP, ROW_SCALES, DTYPE)
        a3 = _value(c, h, j, 3, k0, rows, scale_ptr, zero_ptr, groups, BITS, PER, GROUP, ROW_SCALES, DTYPE)
        if PER == 4:
            w = tl.join(tl.join(a0, a2), tl.join(a1, a3)).reshape(BN, BK)
        else:
            a4 = _value(
                c, h, j, 4, k0, rows, scale_ptr, zero_ptr, groups, BITS, PER, GROUP, ROW_SCALES, DTYPE
            )
            a5 = _value(
                c, h, j, 5, k0, rows, scale_ptr, zero_ptr, groups, BITS, PER, GROUP, ROW_SCALES, DTYPE
            )
            a6 = _value(
                c, h, j, 6, k0, rows, scale_ptr, zero_ptr, groups, BITS, PER, GROUP, ROW_SCALES, DTYPE
            )
            a7 = _value(
                c, h, j, 7, k0, rows, scale_ptr, zero_ptr, groups, BITS, PER, GROUP, ROW_SCALES, DTYPE
            )
            even = tl.join(tl.join(a0, a4), tl.join(a2, a6))
            odd = tl.join(tl.join(a1, a5), tl.join(a3, a7))
            w = tl.join(even, odd).reshape(BN, BK)

    column = tl.program_id(0) * BK + tl.arange(0, BK)
    mask = (n[:, None] < N) & (column[None, :] < K)
    if HAS_PERM:
        column = tl.load(perm_ptr + k_start + column, mask=column < K, other=0)
    out_ptrs = out_ptr + n[:, None].to(tl.int64) * out_stride + column[None, :]
    if EVEN:
        tl.store(out_ptrs, w)
    else:
        tl.store(out_ptrs, w, mask=mask)
