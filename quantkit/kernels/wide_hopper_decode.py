"""Codes in shared memory become the first operand of `wgmma`, in registers (Gluon; see `wide_hopper`).

A thread of a quad holds k = 2t, 2t + 1 (t = 0 .. 3) of every 8 inputs, which are a byte of 4-bit codes, or two bytes.
**Affine** weights are `wide_hopper_affine`'s, **2 and 3 bits** are looked up: `wide_hopper_planes`.
**Codebooks.** The table lies in the lanes, two copies of 16 entries, and a shuffle reads the entry of each code.
**float8.** Two bytes go through the chip's conversion.
"""

# mypy: ignore-errors
# Gluon's language is not Python's type system: jit functions are compiled, not called.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantkit.kernels.wide_hopper_affine import (
    PAIRS,
    SPLIT,
    affine_numbers,
    affine_weights,
    floats_asm,
    in_pairs,
    one_addition,
    product_asm,
    two_of,
)
from quantkit.kernels.wide_hopper_kinds import (
    AFFINE_4,
    AFFINE_8,
    FLOAT8,
    TABLE_4,
    bits_of,
    by_planes,
    is_affine,
    pair_type,
)
from quantkit.kernels.wide_hopper_planes import (
    look_up,
    of_rows,
    operand_of,
    planes_layout,
    quad_constants,
    tables,
)

#: Of a table that lanes 0 .. 15 hold, and 16 .. 31 once more, so that bit 4 of a lane's number is free.
#: Codebooks keep the earlier code in the high nibble.
_BYTE_TO_ENTRIES = gl.constexpr(
    "{ .reg .b32 r; shf.l.wrap.b32 r, $2, $2, $3; shfl.sync.idx.b32 $1, $4, r, 0x1f, 0xffffffff; "
    "shr.u32 r, r, 4; shfl.sync.idx.b32 $0, $4, r, 0x1f, 0xffffffff; }"
)

_FLOAT8_TO_FLOATS = gl.constexpr(
    "{ .reg .b32 r; .reg .b16 a, b; prmt.b32 r, $2, $3, $4; cvt.u16.u32 a, r; cvt.rn.f16x2.e4m3x2 r, a; "
    "mov.b32 {a, b}, r; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }"
)


@gluon.constexpr_function
def pairs_layout(kind, rows, inputs):
    """Layout of the pairs of codes that a thread needs of `[rows, inputs]`."""
    return planes_layout(rows, inputs // 32) if by_planes(kind) else bytes_layout(rows, inputs // 8)


@gluon.constexpr_function
def rows_layout(pairs):
    """Layout of `[rows]` for what `factors` makes of it."""
    return gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, pairs)))


@gluon.constexpr_function
def bytes_layout(rows, octets):
    """Layout of `[rows, octets, 2, 2]` over 4 warps: the pairs of codes that a thread needs for a wgmma operand."""
    registers = [[8, 0, 0, 0]]
    registers += [[0, 1 << i, 0, 0] for i in range(octets.bit_length() - 1)]
    lanes = [[0, 0, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[16, 0, 0, 0], [32, 0, 0, 0]], [], [rows, octets, 2, 2]
    )


@gluon.constexpr_function
def words_layout(rows, words):
    """Layout of `[rows, words]` over 4 warps in which a quad holds all words of its rows."""
    registers = [[8, 0]] + [[0, 1 << i] for i in range(words.bit_length() - 1)]
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [rows, words])


@gluon.constexpr_function
def own_words_layout(rows, words):
    """The same where every other word is enough for a thread: the one of an octet's two that has its bytes."""
    registers = [[8, 0]] + [[0, 2 << i] for i in range(words.bit_length() - 2)]
    lanes = [[0, 0], [0, 1], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [rows, words])


@gluon.constexpr_function
def step_layout(kind, rows, inputs):
    """Layout of the words `[rows, inputs * bits / 32]` of a step, for `decode` (not `by_planes`)."""
    words = inputs * bits_of(kind) // 32
    return own_words_layout(rows, words) if kind == AFFINE_8 else words_layout(rows, words)


@gluon.constexpr_function
def pairs_asm(kind, how, dtype):
    """PTX for two weights ($0) in a register. $1: word; $2: `_places`; $3, $4, $5: `_factors`."""
    brain = dtype == gl.bfloat16
    codes = "prmt.b32 r, $1, " + ("0" if brain or kind == AFFINE_4 else "0x64646464") + ", $2; "
    if kind == AFFINE_4:
        codes += f"lop3.b32 r, r, 0x00F0000F, {'0' if brain else '0x64006400'}, 0xEA; "
    if brain:
        powers = "0x7D007F00" if kind == AFFINE_4 else "0x7F007F00"
    else:
        powers = "0x2C003C00" if kind == AFFINE_4 else "0x3C003C00"
    two = pair_type(dtype)
    return (
        "{ .reg .b32 r, p; "
        + codes
        + f"mov.b32 p, {powers}; fma.rn.{two} r, r, p, $3; "
        + product_asm("$0", "r", "p", "$5", "$4", how, two)
        + " }"
    )


@gluon.constexpr_function
def pack_asm(dtype):
    """PTX: two float32, $1 and $2, as one register."""
    return f"cvt.rn.{pair_type(dtype)}.f32 $0, $2, $1;"


@gluon.jit
def lane_constants(lut_ptr, KIND: gl.constexpr, HOW: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """What `decode` needs to know of a lane: where its codes are, and its entry of the table."""
    if by_planes(KIND):
        constants = quad_constants(LAYOUT)
    else:
        constants = _places(lut_ptr, KIND, HOW, ROWS, LAYOUT)
    return constants


@gluon.jit
def _places(lut_ptr, KIND: gl.constexpr, HOW: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Two of them, for first and second code where they have different ones; of codebooks place and entry."""
    ROW: gl.constexpr = rows_layout(LAYOUT)
    half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT))))
    low = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))))
    half = gl.expand_dims(gl.expand_dims(gl.expand_dims(half, 0), 1), 3)
    low = gl.expand_dims(gl.expand_dims(gl.expand_dims(low, 0), 1), 2)
    pair = half * 2 + low
    if KIND == FLOAT8:
        place = pair * 0x22 + 0x10
        other = place
    elif KIND == AFFINE_8 and in_pairs(HOW):
        place = low * 0x0202 + 0x4140 + half * 0
        other = place
    elif KIND == AFFINE_8:
        place = low * 0x20 + 0x7404 + half * 0
        other = place + 0x10
    elif KIND == AFFINE_4 and in_pairs(HOW):
        place = pair * 0x0101 + 0x4040
        other = place
    else:
        place = (pair * 24 + (0 if KIND == TABLE_4 else 12)) & 31
        other = place
    if KIND == TABLE_4:
        row = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.arange(0, ROWS, ROW), 1), 2), 3)
        entry = (row & 3) * 4 + pair  # the lane's number, modulo 16
        other = gl.load(lut_ptr + entry).to(gl.int32, bitcast=True)
    return place, other


@gluon.jit
def factors(scale, zero, KIND: gl.constexpr, HOW: gl.constexpr, DTYPE: gl.constexpr):
    """What `decode` needs of a group, as `[rows, 1, 1, 1]` each: numbers for first and second codes, and for both; or
    the tables of `wide_hopper_planes`."""
    if by_planes(KIND):
        numbers = tables(scale, zero, one_addition(scale.dtype, zero.dtype), bits_of(KIND), DTYPE)
    else:
        numbers = _factors(scale, zero, KIND, HOW, DTYPE)
    return numbers


@gluon.jit
def _factors(scale, zero, KIND: gl.constexpr, HOW: gl.constexpr, DTYPE: gl.constexpr):
    if is_affine(KIND):
        first, second, last = affine_numbers(scale, zero, KIND, HOW, DTYPE)
        if HOW == PAIRS:
            first = _two(first, second, DTYPE)
            second = first
            last = _two(last, last, DTYPE)
        elif HOW == SPLIT:
            first = _two(first, first, DTYPE)
            second = _two(second, second, DTYPE)
            last = _two(last, last, DTYPE)
    else:
        last = scale.to(gl.float32)
        first = last
        second = last
    return (of_rows(first), of_rows(second), of_rows(last))


@gluon.jit
def _two(low, high, DTYPE: gl.constexpr):
    ASM: gl.constexpr = pack_asm(DTYPE)
    return gl.inline_asm_elementwise(ASM, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def load_factors(
    scale_ptr, zero_ptr, at, step, groups, BK: gl.constexpr, GROUP: gl.constexpr, KIND: gl.constexpr
):
    """Scales and zeros of a step's group, clamped to the row's last. (Without zeros: scales twice.)"""
    g = at
    if GROUP > 0:
        g = at + gl.minimum(step * BK // GROUP, groups - 1)
    scale = gl.load(scale_ptr + g)
    zero = scale if not is_affine(KIND) else gl.load(zero_ptr + g)
    return scale, zero


@gluon.jit
def load_both(scale_ptr, zero_ptr, at, step, groups, BK: gl.constexpr, KIND: gl.constexpr):
    """The same of both steps of a turn that begins with `step`, where groups are steps and even in number, as integers
    of twice the width for `one_of`."""
    g = (at + gl.minimum(step, groups - 2)) >> 1
    scale = gl.load(_wide(scale_ptr) + g)
    zero = scale if not is_affine(KIND) else gl.load(_wide(zero_ptr) + g)
    return scale, zero


@gluon.jit
def _wide(pointer):
    WIDE: gl.constexpr = gl.pointer_type(integer_of(2 * pointer.dtype.element_ty.primitive_bitwidth))
    return pointer.to(WIDE, bitcast=True)


@gluon.constexpr_function
def integer_of(bits):
    """The dtype of integers of so many bits."""
    return {8: gl.uint8, 16: gl.uint16, 32: gl.uint32, 64: gl.uint64}[bits]


@gluon.jit
def one_of(both, STEP: gl.constexpr, SCALE: gl.constexpr, ZERO: gl.constexpr):
    """Scales and zeros of step STEP of a turn, from what `load_both` read."""
    scale, zero = both
    return _half(scale, STEP, SCALE), _half(zero, STEP, ZERO)


@gluon.jit
def _half(both, STEP: gl.constexpr, DTYPE: gl.constexpr):
    BITS: gl.constexpr = DTYPE.primitive_bitwidth
    half = (both >> (STEP * BITS)).to(integer_of(BITS))
    return half.to(DTYPE, bitcast=True)


@gluon.jit
def _words(words, KIND: gl.constexpr, LAYOUT: gl.constexpr):
    """A step's words as one or two (float8) tensors of an octet's, `[rows, octets, 1 or 2, 1]`."""
    if bits_of(KIND) == 4:
        OCTETS: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))
        first = gl.expand_dims(gl.expand_dims(gl.convert_layout(words, OCTETS, assert_trivial=True), 2), 3)
        second = first
    elif KIND == AFFINE_8:
        OWN: gl.constexpr = gl.SliceLayout(3, LAYOUT)
        first = words.reshape(words.shape[0], words.shape[1] // 2, 2)
        first = gl.expand_dims(gl.convert_layout(first, OWN, assert_trivial=True), 3)
        second = first
    else:
        BOTH: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))
        first, second = words.reshape(words.shape[0], words.shape[1] // 2, 2).split()
        first = gl.expand_dims(gl.expand_dims(gl.convert_layout(first, BOTH, assert_trivial=True), 2), 3)
        second = gl.expand_dims(gl.expand_dims(gl.convert_layout(second, BOTH, assert_trivial=True), 2), 3)
    return first, second


@gluon.jit
def _floats(words, constants, KIND: gl.constexpr, HOW: gl.constexpr, LAYOUT: gl.constexpr):
    """First and second code of every pair as float32 `[rows, octets, 2, 2]`: values, or with offset, or subnormal."""
    place, other = constants
    w0, w1 = _words(words, KIND, LAYOUT)
    if KIND == FLOAT8:
        a, b = gl.inline_asm_elementwise(
            _FLOAT8_TO_FLOATS,
            "=f,=f,r,r,r",
            [w0, w1, place],
            dtype=(gl.float32, gl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        ASM: gl.constexpr = _BYTE_TO_ENTRIES if KIND == TABLE_4 else floats_asm(KIND, HOW)
        a, b = gl.inline_asm_elementwise(
            ASM, "=&r,=&r,r,r,r", [w0, place, other], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )
        a = a.to(gl.float32, bitcast=True)
        b = b.to(gl.float32, bitcast=True)
    return a, b


@gluon.jit
def decode(
    words,
    constants,
    numbers,
    ZERO: gl.constexpr,
    SCALE: gl.constexpr,
    ROW_SCALES: gl.constexpr,
    KIND: gl.constexpr,
    HOW: gl.constexpr,
    DTYPE: gl.constexpr,
    LAYOUT: gl.constexpr,
    OPERAND: gl.constexpr,
):
    """Words of codes as weights, divided by `divisor`, for `operand`; scales of whole rows are left to the sums.

    `numbers` are what `factors` makes. ZERO and SCALE: the dtypes that zeros and scales have in memory, HOW:
    `arithmetic`'s, LAYOUT: `pairs_layout`'s.
    """
    if by_planes(KIND):
        decoded = look_up(words, constants, numbers, bits_of(KIND))
    elif in_pairs(HOW):
        place, _ = constants
        zero, rest, scale = numbers
        ASM: gl.constexpr = pairs_asm(KIND, HOW, DTYPE)
        w, _ = _words(words, KIND, LAYOUT)
        decoded = gl.inline_asm_elementwise(
            ASM, "=r,r,r,r,r,r", [w, place, zero, rest, scale], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        decoded = _decode(
            words, constants, numbers, ZERO, SCALE, ROW_SCALES, KIND, HOW, DTYPE, LAYOUT, OPERAND
        )
    return decoded


@gluon.jit
def operand(
    decoded,
    KIND: gl.constexpr,
    HOW: gl.constexpr,
    DTYPE: gl.constexpr,
    LAYOUT: gl.constexpr,
    OPERAND: gl.constexpr,
):
    """What `decode` made, as the first operand `[rows, inputs]` of a product."""
    if by_planes(KIND):
        a = operand_of(decoded, DTYPE, LAYOUT, OPERAND)
    elif in_pairs(HOW):
        BOTH: gl.constexpr = two_of(DTYPE)
        lo, hi = gl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [decoded], dtype=BOTH, is_pure=True, pack=1
        )
        both = gl.join(lo, hi).reshape(lo.shape[0], lo.shape[1] * 8)
        a = gl.convert_layout(both, OPERAND, assert_trivial=True)
    else:
        a = decoded
    return a


@gluon.jit
def _decode(
    words,
    constants,
    numbers,
    ZERO: gl.constexpr,
    SCALE: gl.constexpr,
    ROW_SCALES: gl.constexpr,
    KIND: gl.constexpr,
    HOW: gl.constexpr,
    DTYPE: gl.constexpr,
    LAYOUT: gl.constexpr,
    OPERAND: gl.constexpr,
):
    first, second, last = numbers
    a, b = _floats(words, constants, KIND, HOW, LAYOUT)
    if is_affine(KIND):
        a, b = affine_weights(a, b, first, second, last, KIND, HOW, SCALE, ZERO)
    elif not ROW_SCALES:
        a = a * last
        b = b * last
    both = gl.join(a, b).reshape(a.shape[0], a.shape[1] * 8).to(DTYPE)
    return gl.convert_layout(both, OPERAND, assert_trivial=True)
