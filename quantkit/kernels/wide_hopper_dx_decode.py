"""Codes in shared memory become W transposed, the first operand of the gradient's `wgmma` (Gluon).

A register of that operand holds two numbers of one column of W, from rows n and n + 1. Codes of a row lie side by
side in units of 16 bits (4 of 4 bits, 2 of 8), and `ldmatrix.trans` gives a thread such units of both rows in one
register. So a thread has its two columns (r and r + 8 of a warp's 16) in neighbouring codes: the rows of the product
are columns of W in another order, which `in_order` undoes for its sums:

    4 bits    column 32 a + 4 r + 2 b + h is row 8 h + r of warp 2 a + b
    8 bits    column 16 w + 2 r + h is row 8 h + r of warp w

The arithmetic is that of `wide_hopper_affine`, so W is the same bit for bit.
"""

# mypy: ignore-errors
# Gluon's language is not Python's type system: jit functions are compiled, not called.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantkit.kernels.wide_hopper_affine import (
    FLOATS,
    SCALED,
    SPLIT,
    affine_numbers,
    affine_weights,
    in_pairs,
    offsets,
    powers,
    product_asm,
    two_of,
)
from quantkit.kernels.wide_hopper_kinds import (
    AFFINE_4,
    AFFINE_8,
    FLOAT8,
    TABLE_4,
    bits_of,
    is_affine,
    pair_type,
)

#: The table's entries of them. Lanes 0 .. 15 hold it, and 16 .. 31 once more. The earlier code is the high nibble.
_ENTRIES = gl.constexpr(
    "{ .reg .b32 r; shr.b32 r, $4, $7; shfl.sync.idx.b32 $2, $9, r, 0x1f, 0xffffffff; "
    "shr.b32 r, r, 4; shfl.sync.idx.b32 $0, $9, r, 0x1f, 0xffffffff; "
    "shr.b32 r, r, 12; shfl.sync.idx.b32 $3, $9, r, 0x1f, 0xffffffff; "
    "shr.b32 r, r, 4; shfl.sync.idx.b32 $1, $9, r, 0x1f, 0xffffffff; }"
)
_FLOAT8 = gl.constexpr(
    "{ .reg .b32 r; .reg .b16 a, b; prmt.b32 r, $4, 0, 0x4420; cvt.u16.u32 a, r; cvt.rn.f16x2.e4m3x2 r, a; "
    "mov.b32 {a, b}, r; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; prmt.b32 r, $4, 0, 0x4431; cvt.u16.u32 a, r; "
    "cvt.rn.f16x2.e4m3x2 r, a; mov.b32 {a, b}, r; cvt.f32.f16 $2, a; cvt.f32.f16 $3, b; }"
)
_LANE = gl.constexpr("mov.u32 $0, %laneid;")


@gluon.constexpr_function
def floats_asm(kind, how):
    """PTX: first codes of the units of rows n and n + 1 ($0, $1), second ones ($2, $3), in bits of float32 as
    `wide_hopper_affine` has them. $4: the units; $5, $7: how far left and right their codes go."""
    if kind == AFFINE_8:
        base = "0x47000000" if how == FLOATS else "0"
        orders = ("0x7404", "0x7424", "0x7414", "0x7434")
        return " ".join(f"prmt.b32 ${i}, $4, {base}, {order};" for i, order in enumerate(orders))
    low, high = ("0x45000000", "0x43000000") if how == FLOATS else ("0", "0")
    return (
        "{ .reg .b32 l, h; shl.b32 l, $4, $5; shr.b32 h, $4, $7; "
        f"lop3.b32 $0, l, 0x0F000, {low}, 0xEA; lop3.b32 $1, h, 0x0F000, {low}, 0xEA; "
        f"lop3.b32 $2, l, 0xF0000, {high}, 0xEA; lop3.b32 $3, h, 0xF0000, {high}, 0xEA; }}"
    )


@gluon.constexpr_function
def pairs_asm(kind, how, dtype):
    """PTX: first ($0) and second ($1) weights of rows n and n + 1. $2: the units, $3: how far right their codes go;
    $5, $6, $7: what is added, what is multiplied, and the smaller part of that."""
    brain = dtype == gl.bfloat16
    base = "0" if brain else "0x64646464"
    codes = f"prmt.b32 l, $2, {base}, 0x4240; prmt.b32 h, $2, {base}, 0x4341; "
    second = "0x7F007F00"  # times 2 ** 127
    if kind == AFFINE_4 and brain:
        codes = "shr.b32 l, $2, $3; and.b32 h, l, 0x00F000F0; and.b32 l, l, 0x000F000F; "
        second = "0x7D007D00"  # times 2 ** 123
    elif kind == AFFINE_4:
        codes = (
            "shr.b32 l, $2, $3; shr.b32 h, l, 4; "
            "lop3.b32 l, l, 0x000F000F, 0x64006400, 0xEA; lop3.b32 h, h, 0x000F000F, 0x64006400, 0xEA; "
        )
    if brain:
        sums = f"mov.b32 p, 0x7F007F00; fma.rn.bf16x2 l, l, p, $5; mov.b32 p, {second}; fma.rn.bf16x2 h, h, p, $5; "
    else:
        sums = "add.rn.f16x2 l, l, $5; add.rn.f16x2 h, h, $5; "
    two = pair_type(dtype)
    products = [product_asm(out, d, "p", "$6", "$7", how, two) for out, d in (("$0", "l"), ("$1", "h"))]
    return " ".join(["{ .reg .b32 l, h, p;", codes, sums, *products, "}"])


@gluon.constexpr_function
def factor_dtypes(kind, how, dtype, scale):
    """In which factors and summands wait for `decode_columns`.

    Shared memory's bandwidth sets the pace of tiles of 256 rows, and every warp reads all of them: factors in 16 bits
    take half of it, and are multiplied by powers of two when read.
    """
    if is_affine(kind) and in_pairs(how):
        return dtype, dtype
    return scale, gl.float32


@gluon.jit
def column_factors(scale, zero, KIND: gl.constexpr, HOW: gl.constexpr, DTYPE: gl.constexpr):
    """What `decode_columns` needs of a group, in `factor_dtypes`: what is multiplied, what is added or subtracted, and
    (SPLIT) the smaller part of what is multiplied."""
    KEPT: gl.constexpr = factor_dtypes(KIND, HOW, DTYPE, scale.dtype)
    times = scale
    plus = scale
    rest = scale
    if is_affine(KIND):
        first, second, last = affine_numbers(scale, zero, KIND, HOW, DTYPE)
        plus = last if HOW == SCALED else first
        if in_pairs(HOW):
            times = last
            rest = second
    return times.to(KEPT[0]), plus.to(KEPT[1]), rest.to(KEPT[0])


@gluon.constexpr_function
def units_layout(kind, columns, inputs):
    """Layout `[units of all columns, 2 or 1, inputs]` of units of codes over 4 warps, as the operand wants them."""
    registers = [[0, 0, 1]] + [[0, 0, 8 << i] for i in range((inputs // 8).bit_length() - 1)]
    lanes = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    if bits_of(kind) == 4:
        return gl.DistributedLinearLayout(
            registers, lanes, [[0, 1, 0], [8, 0, 0]], [], [columns // 4, 2, inputs]
        )
    return gl.DistributedLinearLayout(
        registers, lanes, [[8, 0, 0], [16, 0, 0]], [], [columns // 2, 1, inputs]
    )


@gluon.constexpr_function
def sets_of(group, bn):
    """How many groups a tile's BN columns may lie in: its halves have one each, or share one."""
    return 1 if group % bn == 0 else 2


@gluon.jit
def lane_table(lut_ptr, M, KIND: gl.constexpr):
    """A codebook's entry of this lane, modulo 16, as int32 (a scalar to Triton, another in each lane)."""
    entry = 0
    if KIND == TABLE_4:
        lane = gl.inline_asm_elementwise(_LANE, "=r,r", [M], dtype=gl.int32, is_pure=True, pack=1)
        entry = gl.load(lut_ptr + (lane & 15)).to(gl.int32, bitcast=True)
    return entry


@gluon.jit
def _factor(lines, at, LAYOUT: gl.constexpr):
    line = lines.index(at).load(gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    return gl.expand_dims(gl.expand_dims(line, 0), 1)


@gluon.jit
def decode_columns(
    buffers,
    stage,
    table,
    ZERO: gl.constexpr,
    SCALE: gl.constexpr,
    SETS: gl.constexpr,
    KIND: gl.constexpr,
    HOW: gl.constexpr,
    DTYPE: gl.constexpr,
    LAYOUT: gl.constexpr,
    OPERAND: gl.constexpr,
    PART: gl.constexpr,
):
    """Half PART of a step's columns of W, divided by `divisor`, as the first operand `[64 columns, BS]`."""
    _, w_s, factors, _, _, _ = buffers
    HALF: gl.constexpr = w_s.shape[2] // 2
    words = w_s.index(stage).slice(PART * HALF, HALF, 1).permute((1, 0)).load(gl.SliceLayout(1, LAYOUT))
    words = gl.expand_dims(words, 1)
    b = gl.expand_dims(
        gl.expand_dims(gl.arange(0, LAYOUT.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))), 0), 2
    )
    at = stage * SETS + (PART if SETS == 2 else 0)
    times = _factor(factors[0], at, LAYOUT)
    plus = times
    rest = times
    if is_affine(KIND):
        plus = _factor(factors[1], at, LAYOUT)
    if HOW == SPLIT:
        rest = _factor(factors[2], at, LAYOUT)
    if is_affine(KIND) and in_pairs(HOW):
        BOTH: gl.constexpr = two_of(DTYPE)
        ASM: gl.constexpr = pairs_asm(KIND, HOW, DTYPE)
        first, second = gl.inline_asm_elementwise(
            ASM, "=&r,=&r,r,r,r,r,r,r", [words, b * 8, plus, times, rest], dtype=BOTH, is_pure=True, pack=2
        )
    else:
        first, second = _floats(words, b, table, KIND, HOW)
        if is_affine(KIND):
            if HOW == SCALED:
                POWERS: gl.constexpr = powers(KIND)
                one = times.to(gl.float32) * POWERS[0]
                other = times.to(gl.float32) * POWERS[1]
                first, second = affine_weights(first, second, one, other, plus, KIND, HOW, SCALE, ZERO)
            else:
                OFFSETS: gl.constexpr = offsets(KIND)
                other = plus + ((OFFSETS[1] - OFFSETS[0]) if ZERO.is_int() else 0.0)
                first, second = affine_weights(
                    first, second, plus, other, times.to(gl.float32), KIND, HOW, SCALE, ZERO
                )
        else:
            first = first * times
            second = second * times
        first = first.to(DTYPE)
        second = second.to(DTYPE)
    # [units, b, inputs, h] -> [a or more of a, r, b, inputs, h] -> rows a, b, h, r.
    both = gl.join(first, second)
    INPUTS: gl.constexpr = LAYOUT.shape[2]
    WIDE: gl.constexpr = LAYOUT.shape[1]
    both = both.reshape(LAYOUT.shape[0] // 8, 8, WIDE, INPUTS, 2).permute(0, 2, 4, 1, 3)
    return gl.convert_layout(both.reshape(64, INPUTS), OPERAND, assert_trivial=True)


@gluon.jit
def _floats(words, b, table, KIND: gl.constexpr, HOW: gl.constexpr):
    """First and second codes as `wide_hopper_affine` has them."""
    DTYPES: gl.constexpr = (gl.float32, gl.float32) if KIND == FLOAT8 else (gl.int32, gl.int32)
    OUT: gl.constexpr = "=f,=f,=f,=f," if KIND == FLOAT8 else "=&r,=&r,=&r,=&r,"
    if bits_of(KIND) == 8:
        ASM: gl.constexpr = _FLOAT8 if KIND == FLOAT8 else floats_asm(KIND, HOW)
        first, second = gl.inline_asm_elementwise(ASM, OUT + "r", [words], dtype=DTYPES, is_pure=True, pack=2)
    elif KIND == TABLE_4:
        first, second = gl.inline_asm_elementwise(
            _ENTRIES, OUT + "r,r,r,r,r,r,r", [words, b, b * 8, table], dtype=DTYPES, is_pure=True, pack=2
        )
    else:
        NIBBLES: gl.constexpr = floats_asm(KIND, HOW)
        first, second = gl.inline_asm_elementwise(
            NIBBLES, OUT + "r,r,r,r,r", [words, 12 - b * 8, b * 8 + 4], dtype=DTYPES, is_pure=True, pack=2
        )
    if KIND != FLOAT8:
        first = first.to(gl.float32, bitcast=True)
        second = second.to(gl.float32, bitcast=True)
    return first, second


@gluon.jit
def in_order(acc, WIDE: gl.constexpr):
    """Sums `[64, BM]` with their rows in the order of W's columns."""
    ordered = acc.reshape(4 // WIDE, WIDE, 2, 8, acc.shape[1]).permute(0, 3, 1, 2, 4)
    return ordered.reshape(64, acc.shape[1])
