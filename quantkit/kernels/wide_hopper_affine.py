"""The arithmetic of affine weights of 4 and 8 bits, products and gradients alike (Gluon; see `wide_hopper`).

An affine weight is `(q - zero) * scale`, rounded once where scales have 16 bits. How (`arithmetic`):

**Pairs** (zeros in uint8, scales of the dtype of x). A byte permutation puts the codes into the halves of a register,
where two 16-bit instructions do the arithmetic: q - zero is exact, the product rounded as W is.

    bfloat16    & 0x00F0000F       codes are subnormal numbers, q * 2 ** -133 (in bits 4 .. 7: -129); `fma` with powers
                                   of two gives (q - zero) * 2 ** -6, which the sums take back
    float16     ... | 0x64006400   1024 + q (in bits 4 .. 7: 1024 + 16 q)

**Split** (4 bits, zeros in uint8 and up to 16, x in bfloat16, scales in float16). The same with the scale as a sum of
two numbers of bfloat16, of which the smaller has at most three bits: its product with q - zero is exact, so the
other one's, added to it by `fma`, is rounded once.

**Scaled** (x in bfloat16, scales in float16, zeros in uint8 or floats of 16 bits). Codes are subnormal float32
numbers, so there is no offset, and one `fma` gives W / 2 ** 40: q * scale - zero * scale has one rounding, since the
product of two 16-bit numbers is exact. The sums take the power of two back.

    low nibble  & 0x0f000    q * 2 ** -137        byte 1    q * 2 ** -141
    high nibble & 0xf0000    q * 2 ** -133

`quantkit.encoding.dequantize` rounds q - zero first. That is exact, too, unless a zero is tiny but not 0 (float16:
below 2 ** -10 with 4 bits, 2 ** -6 with 8): float32 values may then differ in their last bit, of which 16 bits keep
nothing but at a tie.

**Floats** (the rest). 2048 + q and 128 + q (8 bits: 32768 + q), from which the offset and an integer zero are
subtracted exactly; then a float zero and the product, as `dequantize` does, or as above where both have 16 bits.
"""

# mypy: ignore-errors
# Gluon's language is not Python's type system: jit functions are compiled, not called.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantkit.kernels.wide_hopper_kinds import AFFINE_4, AFFINE_8

#: How `(q - zero) * scale` is computed.
PAIRS = gl.constexpr(0)
SCALED = gl.constexpr(1)
FLOATS = gl.constexpr(2)
SPLIT = gl.constexpr(3)
#: What W is divided by where it is SCALED: so much that float16 scales, times the power of two of codes, are finite.
_DIVISOR = 40


@gluon.constexpr_function
def arithmetic(kind, dtype, scale, zero):
    """How an affine weight of 4 or 8 bits becomes numbers of `dtype`, by the dtypes of scales and zeros."""
    if zero == gl.uint8 and scale == dtype:
        return PAIRS
    if dtype != gl.bfloat16 or scale != gl.float16:
        return FLOATS
    if zero == gl.uint8 and kind == AFFINE_4:
        return SPLIT
    return SCALED if zero == gl.uint8 or exact_product(scale, zero) else FLOATS


@gluon.constexpr_function
def exact_product(scale, zero):
    """Are these the dtypes of a zero that is a float, and of a scale, whose product float32 holds?"""
    return not zero.is_int() and scale.primitive_bitwidth == 16 and zero.primitive_bitwidth == 16


@gluon.constexpr_function
def in_pairs(how):
    """Is arithmetic done on two weights in a register, which are then ready?"""
    return how in (PAIRS, SPLIT)


@gluon.constexpr_function
def divisor(kind, dtype, scale, zero):
    """What `decode` divides weights by."""
    if kind not in (AFFINE_4, AFFINE_8) or dtype != gl.bfloat16:
        return 1.0
    how = arithmetic(kind, dtype, scale, zero)
    return 2.0**_DIVISOR if how == SCALED else 2.0**6 if in_pairs(how) else 1.0


@gluon.constexpr_function
def powers(kind):
    """What turns subnormal codes, first and second of a pair, into q / 2 ** _DIVISOR."""
    first, second = (137, 133) if kind == AFFINE_4 else (141, 141)
    return 2.0 ** (first - _DIVISOR), 2.0 ** (second - _DIVISOR)


@gluon.constexpr_function
def floats_asm(kind, how):
    """PTX for the codes ($0, $1) of a pair in bits of float32. $2: word; $3, $4: `_places`."""
    if kind == AFFINE_8:
        base = "0x47000000" if how == FLOATS else "0"
        return f"prmt.b32 $0, $2, {base}, $3; prmt.b32 $1, $2, {base}, $4;"
    low, high = ("0x45000000", "0x43000000") if how == FLOATS else ("0", "0")
    return (
        "{ .reg .b32 r; shf.l.wrap.b32 r, $2, $2, $3; "
        f"lop3.b32 $0, r, 0x0F000, {low}, 0xEA; lop3.b32 $1, r, 0xF0000, {high}, 0xEA; }}"
    )


@gluon.constexpr_function
def product_asm(out, difference, spare, scale, rest, how, two):
    """PTX: `out` becomes `difference * (scale + rest)`, rounded once."""
    if how == PAIRS:
        return f"mul.rn.{two} {out}, {difference}, {scale};"
    return f"mul.rn.{two} {spare}, {difference}, {rest}; fma.rn.{two} {out}, {difference}, {scale}, {spare};"


@gluon.constexpr_function
def two_of(dtype):
    """Types of two results."""
    return (dtype, dtype)


@gluon.constexpr_function
def one_addition(scale, zero):
    """Is `q * scale - zero * scale` exact in float32 for few bits of q and these dtypes?"""
    return zero.is_int() and scale.primitive_bitwidth == 16


@gluon.constexpr_function
def offsets(kind):
    """What the floats of a pair of codes hold beside the code."""
    return (32768.0, 32768.0) if kind == AFFINE_8 else (2048.0, 128.0)


@gluon.jit
def affine_numbers(scale, zero, KIND: gl.constexpr, HOW: gl.constexpr, DTYPE: gl.constexpr):
    """What makes weights of first and second codes, as float32; the last number serves both.

    PAIRS: what is added and, last, multiplied (DTYPE holds all exactly). SPLIT: what is added, and the smaller and the
    larger part of what is multiplied. SCALED: what is multiplied and, last, added.
    FLOATS: what is subtracted (after the offset and the product, what is added: `exact_product`) and, last, multiplied.
    """
    s = scale.to(gl.float32)
    z = zero.to(gl.float32)
    if HOW == PAIRS:
        last = s
        if DTYPE.is_bf16():
            first = z * (-1.0 / 64)
            second = first
        else:
            first = -1024.0 - z
            second = first if KIND == AFFINE_8 else -64.0 - z
    elif HOW == SPLIT:
        first = z * (-1.0 / 64)
        last = (s.to(gl.int32, bitcast=True) & -0x10000).to(gl.float32, bitcast=True)
        second = s - last
    elif HOW == SCALED:
        POWERS: gl.constexpr = powers(KIND)
        first = s * POWERS[0]
        second = s * POWERS[1]
        last = -z * (s * (1.0 / divisor(KIND, DTYPE, scale.dtype, zero.dtype)))
    else:
        last = s
        first = z
        second = z
        if exact_product(scale.dtype, zero.dtype):
            first = -z * s
        elif zero.dtype.is_int():
            OFFSETS: gl.constexpr = offsets(KIND)
            first = z + OFFSETS[0]
            second = z + OFFSETS[1]
    return first, second, last


@gluon.jit
def affine_weights(
    a, b, first, second, last, KIND: gl.constexpr, HOW: gl.constexpr, SCALE: gl.constexpr, ZERO: gl.constexpr
):
    """First and second codes as `_floats` leaves them to weights (not PAIRS, SPLIT), by `affine_numbers`."""
    if HOW == SCALED:
        a = gl.fma(a, first, last)
        b = gl.fma(b, second, last)
    elif ZERO.is_int():
        a = (a - first) * last
        b = (b - second) * last
    else:
        OFFSETS: gl.constexpr = offsets(KIND)
        a = a - OFFSETS[0]
        b = b - OFFSETS[1]
        if exact_product(SCALE, ZERO):
            a = gl.fma(a, last, first)
            b = gl.fma(b, last, first)
        else:
            a = (a - first) * last
            b = (b - second) * last
    return a, b
