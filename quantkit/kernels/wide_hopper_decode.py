"""Codes in shared memory become the first operand of `wgmma`, in registers (Gluon; see `wide_hopper`).

A thread of a quad holds k = 2t, 2t + 1 (t = 0 .. 3) of every 8 inputs. The quad loads the same words.

**4 bits.** A word is 8 codes, a thread's two are byte t, which it rotates to bits 12 .. 19:

    low nibble  & 0x0f000 | 0x45000000    2048 + q as float32
    high nibble & 0xf0000 | 0x43000000     128 + q

**Codebooks.** The table lies in the lanes, two copies of 16 entries, and a shuffle reads the entry of each code.

**8 bits.** Eight codes are two words; a byte permutation takes bytes 2t and 2t + 1 from both, another puts each into
bits 8 .. 15 of 0x47000000: 32768 + q as float32. **float8** takes the same two bytes through the chip's conversion.

**2 and 3 bits** are looked up: `wide_hopper_planes`.

An affine weight is `(q - zero) * scale`. With integer zeros and scales of few enough bits that is one fused
multiply-add, exactly: c = -(2048 + zero) * scale has at most 23 bits with 16-bit scales, -(32768 + zero) * scale at
most 24 with bfloat16 ones. Else an integer zero joins the constant and is subtracted (exact) before the product; a
float zero is subtracted on its own, rounded as `quantkit.encoding.dequantize` rounds.
"""

# mypy: ignore-errors
# Gluon's language is not Python's type system: jit functions are compiled, not called.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantkit.kernels.wide_hopper_planes import look_up, operand_of, planes_layout, quad_constants, tables

#: Kinds of weights.
AFFINE_4 = gl.constexpr(4)
AFFINE_8 = gl.constexpr(8)
AFFINE_3 = gl.constexpr(3)
AFFINE_2 = gl.constexpr(2)
FLOAT8 = gl.constexpr(1)
TABLE_4 = gl.constexpr(0)

_BYTE_TO_FLOATS = gl.constexpr(
    "{ .reg .b32 r; shf.l.wrap.b32 r, $2, $2, $3; "
    "lop3.b32 $0, r, 0x0F000, 0x45000000, 0xEA; lop3.b32 $1, r, 0xF0000, 0x43000000, 0xEA; }"
)

#: The same for a table that lanes 0 .. 15 hold, and 16 .. 31 once more, so that bit 4 of a lane's number is free.
#: Codebooks keep the earlier code in the high nibble.
_BYTE_TO_ENTRIES = gl.constexpr(
    "{ .reg .b32 r; shf.l.wrap.b32 r, $2, $2, $3; shfl.sync.idx.b32 $1, $4, r, 0x1f, 0xffffffff; "
    "shr.u32 r, r, 4; shfl.sync.idx.b32 $0, $4, r, 0x1f, 0xffffffff; }"
)

_BYTES_TO_FLOATS = gl.constexpr(
    "{ .reg .b32 r; prmt.b32 r, $2, $3, $4; "
    "prmt.b32 $0, r, 0x47000000, 0x7404; prmt.b32 $1, r, 0x47000000, 0x7414; }"
)

_FLOAT8_TO_FLOATS = gl.constexpr(
    "{ .reg .b32 r; .reg .b16 a, b; prmt.b32 r, $2, $3, $4; cvt.u16.u32 a, r; cvt.rn.f16x2.e4m3x2 r, a; "
    "mov.b32 {a, b}, r; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }"
)


@gluon.constexpr_function
def bits_of(kind):
    """Bits of a code."""
    if kind in (AFFINE_2, AFFINE_3):
        return 2 if kind == AFFINE_2 else 3
    return 4 if kind in (AFFINE_4, TABLE_4) else 8


@gluon.constexpr_function
def is_affine(kind):
    """Has the weight zeros?"""
    return kind in (AFFINE_2, AFFINE_3, AFFINE_4, AFFINE_8)


@gluon.constexpr_function
def by_planes(kind):
    """Are codes of a turn of two steps copied together, and decoded by `wide_hopper_planes`?"""
    return kind in (AFFINE_2, AFFINE_3)


@gluon.constexpr_function
def pairs_layout(kind, rows, inputs):
    """Layout of the pairs of codes that a thread needs of `[rows, inputs]`."""
    return planes_layout(rows, inputs // 32) if by_planes(kind) else bytes_layout(rows, inputs // 8)


@gluon.constexpr_function
def rows_layout(kind, pairs):
    """Layout of `[rows]` for what `factors` makes of it."""
    inner = gl.SliceLayout(3, pairs) if by_planes(kind) else pairs
    return gl.SliceLayout(1, gl.SliceLayout(2, inner))


@gluon.constexpr_function
def bytes_layout(rows, octets):
    """Layout of `[rows, octets, 4]` over 4 warps: the pairs of codes that a thread needs for a wgmma operand."""
    registers = [[8, 0, 0]]
    registers += [[0, 1 << i, 0] for i in range(octets.bit_length() - 1)]
    lanes = [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [rows, octets, 4])


@gluon.constexpr_function
def words_layout(rows, words):
    """Layout of `[rows, words]` over 4 warps in which a quad holds all words of its rows."""
    registers = [[8, 0]] + [[0, 1 << i] for i in range(words.bit_length() - 1)]
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [rows, words])


@gluon.constexpr_function
def one_addition(kind, scale, zero):
    """Is `(q - zero) * scale` one exact fused multiply-add for these dtypes?"""
    few_bits = scale.is_bf16() if kind == AFFINE_8 else scale.primitive_bitwidth == 16
    return zero.is_int() and few_bits


@gluon.constexpr_function
def offsets(kind):
    """What the floats of a pair of codes hold beside the code."""
    return (32768.0, 32768.0) if kind == AFFINE_8 else (2048.0, 128.0)


@gluon.jit
def lane_constants(lut_ptr, KIND: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """What `decode` needs to know of a lane: where its codes are, and its entry of the table."""
    if by_planes(KIND):
        constants = quad_constants(LAYOUT)
    else:
        constants = _place_and_entry(lut_ptr, KIND, ROWS, LAYOUT)
    return constants


@gluon.jit
def _place_and_entry(lut_ptr, KIND: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))
    pair = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT))), 0), 1)
    if bits_of(KIND) == 8:
        place = pair * 0x22 + 0x10
    else:
        place = (pair * 24 + (0 if KIND == TABLE_4 else 12)) & 31
    if KIND == TABLE_4:
        row = gl.expand_dims(gl.expand_dims(gl.arange(0, ROWS, ROW), 1), 2)
        entry = (row & 3) * 4 + pair  # the lane's number, modulo 16
        table = gl.load(lut_ptr + entry).to(gl.int32, bitcast=True)
    else:
        table = place
    return place, table


@gluon.jit
def factors(scale, zero, KIND: gl.constexpr, DTYPE: gl.constexpr):
    """What `decode` needs of a group, as `[rows, 1, 1]` each: scale, and what the first and second code take; or the
    tables of `wide_hopper_planes`."""
    if by_planes(KIND):
        numbers = tables(scale, zero, one_addition(KIND, scale.dtype, zero.dtype), bits_of(KIND), DTYPE)
    else:
        numbers = _factors(scale, zero, KIND)
    return numbers


@gluon.jit
def _factors(scale, zero, KIND: gl.constexpr):
    s = scale.to(gl.float32)
    first = zero.to(gl.float32)
    second = first
    if is_affine(KIND):
        OFFSETS: gl.constexpr = offsets(KIND)
        if zero.dtype.is_int():
            first = first + OFFSETS[0]
            second = second + OFFSETS[1]
        if one_addition(KIND, scale.dtype, zero.dtype):
            first = -first * s
            second = -second * s
    s = gl.expand_dims(gl.expand_dims(s, 1), 2)
    return (
        s,
        gl.expand_dims(gl.expand_dims(first, 1), 2),
        gl.expand_dims(gl.expand_dims(second, 1), 2),
    )


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
def _floats(words, constants, KIND: gl.constexpr, LAYOUT: gl.constexpr):
    """First and second code of every pair as float32 `[rows, octets, 4]`: values, or offset and code."""
    place, table = constants
    if bits_of(KIND) == 8:
        PAIRS: gl.constexpr = gl.SliceLayout(2, LAYOUT)
        w0, w1 = words.reshape(words.shape[0], words.shape[1] // 2, 2).split()
        w0 = gl.expand_dims(gl.convert_layout(w0, PAIRS, assert_trivial=True), 2)
        w1 = gl.expand_dims(gl.convert_layout(w1, PAIRS, assert_trivial=True), 2)
        ASM: gl.constexpr = _FLOAT8_TO_FLOATS if KIND == FLOAT8 else _BYTES_TO_FLOATS
        a, b = gl.inline_asm_elementwise(
            ASM,
            "=f,=f,r,r,r" if KIND == FLOAT8 else "=r,=r,r,r,r",
            [w0, w1, place],
            dtype=(gl.float32, gl.float32) if KIND == FLOAT8 else (gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    elif KIND == TABLE_4:
        a, b = gl.inline_asm_elementwise(
            _BYTE_TO_ENTRIES,
            "=r,=r,r,r,r",
            [gl.expand_dims(words, 2), place, table],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        a, b = gl.inline_asm_elementwise(
            _BYTE_TO_FLOATS,
            "=r,=r,r,r",
            [gl.expand_dims(words, 2), place],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    if KIND != FLOAT8:
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
    DTYPE: gl.constexpr,
    LAYOUT: gl.constexpr,
    OPERAND: gl.constexpr,
):
    """Words of codes as weights, for `operand`; scales of whole rows are left to the product's sums.

    `numbers` are what `factors` makes. ZERO and SCALE are the dtypes that zeros and scales have in memory, LAYOUT is
    `pairs_layout`'s.
    """
    if by_planes(KIND):
        operand = look_up(words, constants, numbers, bits_of(KIND))
    else:
        operand = _decode(words, constants, numbers, ZERO, SCALE, ROW_SCALES, KIND, DTYPE, LAYOUT, OPERAND)
    return operand


@gluon.jit
def operand(decoded, KIND: gl.constexpr, DTYPE: gl.constexpr, LAYOUT: gl.constexpr, OPERAND: gl.constexpr):
    """What `decode` made, as the first operand `[rows, inputs]` of a product."""
    if by_planes(KIND):
        a = operand_of(decoded, DTYPE, LAYOUT, OPERAND)
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
    DTYPE: gl.constexpr,
    LAYOUT: gl.constexpr,
    OPERAND: gl.constexpr,
):
    scale, first, second = numbers
    a, b = _floats(words, constants, KIND, LAYOUT)
    if is_affine(KIND):
        OFFSETS: gl.constexpr = offsets(KIND)
        if one_addition(KIND, SCALE, ZERO):
            a = gl.fma(a, scale, first)
            b = gl.fma(b, scale, second)
        elif ZERO.is_int():
            a = (a - first) * scale
            b = (b - second) * scale
        else:
            a = (a - OFFSETS[0] - first) * scale
            b = (b - OFFSETS[1] - second) * scale
    elif not ROW_SCALES:
        a = a * scale
        b = b * scale
    both = gl.join(a, b).reshape(a.shape[0], a.shape[1] * 8).to(DTYPE)
    return gl.convert_layout(both, OPERAND, assert_trivial=True)
