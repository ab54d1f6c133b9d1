"""Two and three bits for `wide_hopper`: codes select bytes of a table of the group's values, in registers (Gluon).

A group has 4 or 8 values. They are computed as `quantkit.encoding.dequantize` does, rounded to the dtype of x, and
kept as their low and their high bytes: one or two registers each. A byte permutation then looks up four codes, which
it takes from nibbles; bit 3 of a nibble must be zero. Per row and 32 inputs a thread (t = its place in the quad) needs
two codes, q0 and q1, of each of four octets: of 16 bits of the low plane the nibble t, of 8 bits of the high plane
bits 2t and 2t + 1.

    prmt          byte j of v = byte t / 2 of octet j: q0 and q1 are its low nibble (t even) or its high one (t odd)
    3 x shf       q0 stays where it is in v, q1 goes to the start of the other nibble; top bits to bits 2 and 6
    4 x lop3      byte j = (q0, q1) as nibbles, (q1, q0) for odd t; bits 3 and 7 zero
    4 x prmt      low bytes, high bytes of octets 0 and 1, of 2 and 3 (and a shift by 16 in between)
    4 x prmt      low and high bytes put together: the pairs of four octets

that is 17 instructions for 8 weights (2 bits: 13), where 4 bits take 24. A table costs 16 instructions (integer zeros,
16-bit scales) or 24, which do not depend on the length of its group.
"""

# mypy: ignore-errors
# Gluon's language is not Python's type system: jit functions are compiled, not called.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantkit.kernels.wide_hopper_kinds import pair_type

#: Bits 0 and 1 of every nibble come from the low plane, or (2 bits) are all there is.
_LOW_BITS = 0x33333333
#: Where a mask has a one, the first operand of `lop3`, else the second.
_CHOOSE = 0xE4

#: $0: eight nibbles. $1, $2: words of the low plane, $3: word of the high plane, $4 ...: `quad_constants`.
SELECT_3 = gl.constexpr(
    "{ .reg .b32 v, w, d, e; "
    "prmt.b32 v, $1, $2, $4; "
    "shf.l.wrap.b32 w, v, v, $5; "
    "shf.l.wrap.b32 d, $3, $3, $7; "
    "shf.l.wrap.b32 e, $3, $3, $8; "
    f"lop3.b32 v, v, d, {_LOW_BITS}, {_CHOOSE}; "
    f"lop3.b32 w, w, e, {_LOW_BITS}, {_CHOOSE}; "
    f"lop3.b32 v, v, w, $6, {_CHOOSE}; "
    f"and.b32 $0, v, {0x77777777}; }}"
)
#: The same without a high plane: $3 ...: `quad_constants`.
SELECT_2 = gl.constexpr(
    "{ .reg .b32 v, w; "
    "prmt.b32 v, $1, $2, $3; "
    "shf.l.wrap.b32 w, v, v, $4; "
    f"lop3.b32 v, v, w, $5, {_CHOOSE}; "
    f"and.b32 $0, v, {_LOW_BITS}; }}"
)
#: $0 ... $3: pairs of 16-bit values, of octets 0 to 3. $4: nibbles, $5, $6: low bytes of the values of codes below and
#: from 4 on, $7, $8: their high bytes, $9, $10: orders.
LOOK_UP = gl.constexpr(
    "{ .reg .b32 n, l, h; "
    "prmt.b32 l, $5, $6, $4; "
    "prmt.b32 h, $7, $8, $4; "
    "prmt.b32 $0, l, h, $9; "
    "prmt.b32 $1, l, h, $10; "
    "shr.b32 n, $4, 16; "
    "prmt.b32 l, $5, $6, n; "
    "prmt.b32 h, $7, $8, n; "
    "prmt.b32 $2, l, h, $9; "
    "prmt.b32 $3, l, h, $10; }"
)


@gluon.constexpr_function
def table_asm(bits, dtype, one_addition):
    """PTX for the table of a group of a row: low bytes of the values, then high bytes, four to a register.

    The last operands are scale and, as `tables` says, zero or product of both.
    """
    count = 2**bits
    scale, zero = f"${count // 2}", f"${count // 2 + 1}"
    kind = pair_type(dtype)
    lines = [f".reg .f32 f<{count}>;", f".reg .b32 p<{count // 2}>;"]
    for q, number in enumerate(_FLOATS[:count]):
        if one_addition and q == 0:
            lines.append(f"mov.b32 f0, {zero};")
        elif one_addition:
            lines.append(f"fma.rn.f32 f{q}, {scale}, {number}, {zero};")
        else:
            lines.append(f"sub.rn.f32 f{q}, {number}, {zero}; mul.rn.f32 f{q}, f{q}, {scale};")
    for i in range(count // 2):
        lines.append(f"cvt.rn.{kind}.f32 p{i}, f{2 * i + 1}, f{2 * i};")
    for half, order in enumerate(("0x6420", "0x7531")):
        for i in range(count // 4):
            lines.append(f"prmt.b32 ${half * (count // 4) + i}, p{2 * i}, p{2 * i + 1}, {order};")
    return "{ " + " ".join(lines) + " }"


#: 0.0 to 7.0 as PTX writes them.
_FLOATS = (
    "0f00000000", "0f3F800000", "0f40000000", "0f40400000", "0f40800000", "0f40A00000", "0f40C00000", "0f40E00000",
)  # fmt: skip


@gluon.constexpr_function
def planes_layout(rows, words):
    """Layout of `[rows, words, 4, 2]` over 4 warps: of every 32 inputs, of each octet, the pairs of a thread."""
    registers = [[0, 0, 0, 1], [8, 0, 0, 0]] + [[0, 1 << i, 0, 0] for i in range(words.bit_length() - 1)]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[16, 0, 0, 0], [32, 0, 0, 0]], [], [rows, words, 4, 2]
    )


@gluon.constexpr_function
def four_of(dtype):
    """Types of four results."""
    return (dtype,) * 4


@gluon.jit
def quad_constants(LAYOUT: gl.constexpr):
    """What depends on a lane's place t in its quad, `[1, 1, 4, 1]` each: which bytes, how far q1 is rotated, the
    nibble of q0, how far top bits of q0 and of q1 are rotated, orders of the pairs' bytes."""
    T: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT)))
    t = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.arange(0, 4, T), 0), 1), 3)
    odd = t & 1
    # Rotations are to the left, modulo 32.
    bytes_of_t = 0x6420 + 0x1111 * (t >> 1)
    second = 2 + 24 * odd
    nibble = 0x0F0F0F0F << (4 * odd)
    top_of_first = 2 + 4 * odd - 2 * t
    top_of_second = 5 - 4 * odd - 2 * t
    return (
        bytes_of_t,
        second,
        nibble,
        top_of_first & 31,
        top_of_second & 31,
        gl.where(odd == 0, 0x5140, 0x4051),
        gl.where(odd == 0, 0x7362, 0x6273),
    )


@gluon.jit
def tables(scale, zero, ONE_ADDITION: gl.constexpr, BITS: gl.constexpr, DTYPE: gl.constexpr):
    """Tables of the groups of `scale [rows]`, `[rows, 1, 1, 1]`: low bytes of codes below 4, from 4 on, high bytes.

    ONE_ADDITION: `q * scale - zero * scale` is exact (8 bits of zero, 11 of scale); else `(q - zero) * scale`.
    """
    s = scale.to(gl.float32)
    z = zero.to(gl.float32)
    if ONE_ADDITION:
        z = -z * s
    ASM: gl.constexpr = table_asm(BITS, DTYPE, ONE_ADDITION)
    if BITS == 3:
        a, b, c, d = gl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,f,f", [s, z], dtype=(gl.int32,) * 4, is_pure=True, pack=1
        )
    else:
        a, c = gl.inline_asm_elementwise(
            ASM, "=r,=r,f,f", [s, z], dtype=(gl.int32,) * 2, is_pure=True, pack=1
        )
        b = a
        d = c
    return (of_rows(a), of_rows(b), of_rows(c), of_rows(d))


@gluon.jit
def of_rows(a):
    """`[rows]` as `[rows, 1, 1, 1]`."""
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(a, 1), 2), 3)


@gluon.jit
def words_of_step(low, high, STEP: gl.constexpr, BITS: gl.constexpr, LAYOUT: gl.constexpr):
    """Of a turn's words, `[rows, 8]` of the low plane and `[rows, 4]` of the high one, those of step STEP: per 32
    inputs two low words and a high one, `[rows, 2, 1, 1]` each."""
    WORDS: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))
    both = low.reshape(low.shape[0], 2, 2, 2).permute((0, 2, 3, 1)).split()
    first, second = both[STEP].split()
    first = gl.convert_layout(first, WORDS, assert_trivial=True)
    second = gl.convert_layout(second, WORDS, assert_trivial=True)
    top = first
    if BITS == 3:
        tops = high.reshape(high.shape[0], 2, 2).permute((0, 2, 1)).split()
        top = gl.convert_layout(tops[STEP], WORDS, assert_trivial=True)
    return (
        gl.expand_dims(gl.expand_dims(first, 2), 3),
        gl.expand_dims(gl.expand_dims(second, 2), 3),
        gl.expand_dims(gl.expand_dims(top, 2), 3),
    )


@gluon.jit
def look_up(words, constants, table, BITS: gl.constexpr):
    """Pairs of 16-bit values of `words_of_step`'s words, of each four octets four `[rows, 2, 4, 1]`."""
    first, second, top = words
    place, rotate, nibble, top_first, top_second, even, odd = constants
    if BITS == 3:
        nibbles = gl.inline_asm_elementwise(
            SELECT_3,
            "=r,r,r,r,r,r,r,r,r",
            [first, second, top, place, rotate, nibble, top_first, top_second],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        nibbles = gl.inline_asm_elementwise(
            SELECT_2,
            "=r,r,r,r,r,r",
            [first, second, place, rotate, nibble],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )
    return gl.inline_asm_elementwise(
        LOOK_UP,
        "=&r,=&r,=&r,=&r" + ",r" * 7,
        [nibbles, table[0], table[1], table[2], table[3], even, odd],
        dtype=(gl.int32,) * 4,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def operand_of(pairs, DTYPE: gl.constexpr, LAYOUT: gl.constexpr, OPERAND: gl.constexpr):
    """`look_up`'s pairs as the first operand `[rows, 64]` of a product.

    Apart from it, so that the loop keeps pairs from turn to turn and not their halves, which ptxas puts together again
    by permutations.
    """
    FOUR: gl.constexpr = four_of(DTYPE)
    both = gl.full([1, 1, 1, 2], 0, gl.int32, LAYOUT)
    a, b, c, d = gl.inline_asm_elementwise(
        "mov.b32 $0, $4; mov.b32 $1, $6; mov.b32 $2, $8; mov.b32 $3, $10;",
        "=&r,=&r,=&r,=&r" + ",r" * 8,
        [pairs[0] + both, pairs[1] + both, pairs[2] + both, pairs[3] + both],
        dtype=FOUR,
        is_pure=True,
        pack=2,
    )
    # [rows, words, lanes, pair, octet of two, of four]
    octets = gl.join(gl.join(a, b), gl.join(c, d)).permute((0, 1, 5, 4, 2, 3))
    return gl.convert_layout(octets.reshape(a.shape[0], a.shape[1] * 32), OPERAND, assert_trivial=True)
