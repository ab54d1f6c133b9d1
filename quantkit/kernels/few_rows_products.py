"""Products of `few_rows_kernel`: 32 codes of two rows of W by their inputs, as `mma` or written out (Triton)."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.codebook_lookup import eight_values
from quantkit.kernels.few_rows_asm import FOUR_ASM, TABLE_ASM, THREE_ASM, THREE_CON, WORD_CON
from quantkit.kernels.few_rows_loads import AFFINE3, AFFINE4, CODEBOOK, two_inputs


@triton.jit
def _values(w, j: tl.constexpr, lut_ptr, KIND: tl.constexpr):
    """Float32 values (affine: codes) of the j-th 8 codes of the unit `w`, in the inputs' order (portable)."""
    out = ()
    if KIND == CODEBOOK:
        out = eight_values(w[j], lut_ptr, False)
    elif KIND == AFFINE4:
        for i in tl.static_range(8):
            out = out + (((w[j] >> (4 * i)) & 15).to(tl.float32),)
    else:
        for i in tl.static_range(8):
            q = (w[j // 2] >> (2 * (8 * (j % 2) + i))) & 3
            out = out + ((q | (((w[2] >> (8 * j + i)) & 1) << 2)).to(tl.float32),)
    return out


@triton.jit
def _by_columns(a, x, KS: tl.constexpr):
    """sum over t of a[ks, g, t] * x[ks, column, t], as the parts of columns 2t and 2t + 1 `[KS, 8, 4]`."""
    both = tl.sum(a[:, :, None, :] * x[:, None, :, :], 3)
    return tl.split(both.reshape(KS, 8, 4, 2))


@triton.jit
def products(
    upper,
    lower,
    x,
    lut_ptr,
    c,
    sums,
    SUMS: tl.constexpr,
    KS: tl.constexpr,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """`c`, parts of the upper row (two columns) and of the lower (two), plus the products of 32 codes of both with 16
    words of inputs; `sums` (offset * x in two columns, x in two) likewise, as they came where SUMS is off: another
    tile of rows has added them up. (Portable values have no offset.)
    """
    if ASM:
        which: tl.constexpr = (0 if tl.bfloat16 == DTYPE else 2) + (0 if SUMS else 1)
        con: tl.constexpr = THREE_CON[0 if SUMS else 1] if KIND == AFFINE3 else WORD_CON[0 if SUMS else 1]
        types: tl.constexpr = (tl.float32,) * (8 if SUMS else 4)
        if KIND == AFFINE3:
            asm: tl.constexpr = THREE_ASM[which]
        else:
            asm: tl.constexpr = TABLE_ASM[which] if KIND == CODEBOOK else FOUR_ASM[which]
        for j in tl.static_range(1 if KIND == AFFINE3 else 4):
            if KIND == AFFINE3:
                ins = upper + lower + x + c
            else:
                ins = (upper[j], lower[j], x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]) + c
            if SUMS:
                ins = ins + sums
            d = tl.inline_asm_elementwise(asm, con, ins, types, is_pure=True, pack=1)
            c = (d[0], d[1], d[2], d[3])
            if SUMS:
                sums = (d[4], d[5], d[6], d[7])
    else:
        one = tl.full((KS, 8, 4), 1.0, tl.float32)
        for j in tl.static_range(4):
            up = _values(upper, j, lut_ptr, KIND)
            down = _values(lower, j, lut_ptr, KIND)
            for i in tl.static_range(4):
                x0, x1 = two_inputs(x[4 * j + i], DTYPE)
                for e in tl.static_range(2):
                    xe = x1 if e == 1 else x0
                    a0, a1 = _by_columns(up[2 * i + e], xe, KS)
                    b0, b1 = _by_columns(down[2 * i + e], xe, KS)
                    c = (c[0] + a0, c[1] + a1, c[2] + b0, c[3] + b1)
                    if SUMS:
                        s0, s1 = _by_columns(one, xe, KS)
                        sums = (sums[0], sums[1], sums[2] + s0, sums[3] + s1)
    return c, sums
