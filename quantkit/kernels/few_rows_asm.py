"""PTX of `few_rows_kernel`: decoding with the matrix products that take it, and the sums at a tile's end.

One asm takes a word of eight codes (three bits: 32 codes, two words of low bits and one of top bits) of the
rows g and g + 8, makes the registers of `mma.m16n8k16`'s first operand of them, two codes to a register, pairs the
inputs alike for the second, and multiplies:

    register of W    (codes i, j) of row g, of row g + 8      register of x    (inputs i, j) of the thread's column
    NF4              j = i + 1, as the table of pairs has them
    4 bits           j = i + 4: a mask of the shifted word
    3 bits           j = i + 16, of both words of low bits

Affine codes come as q plus an offset, which is a power of two: the mantissa's bit that stands for 1 may be any, if the
exponent says so. So two codes of three bits are masked out of a byte without a shift between them, with offsets 128
and 8. (Without any shift float16 would have 1024 and 64, and the sums lose three more bits.) Another product takes
the sums that offsets cost, with the offsets in its rows g and ones in its rows g + 8.

(The fragments' lanes: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".)
"""

from __future__ import annotations

import triton.language as tl

#: $1 plus what the lane at a distance of 1, 2, 4, 8 and 16 (exclusive or) has.
ADD_ACROSS = tl.constexpr(
    tuple(
        f"{{ .reg .b32 a; .reg .f32 b; shfl.sync.bfly.b32 a, $1, {1 << d}, 31, -1; mov.b32 b, a; add.f32 $0, $1, b; }}"
        for d in range(5)
    )
)
#: The half in $1 to the address in $2 if $3 is not zero.
STORE_IF = tl.constexpr("{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b16 [$2], $1; mov.b32 $0, 0; }")


def _exchange_asm(warps: int, count: int) -> str:
    """PTX: $0 ... = each of `count` numbers of a lane summed over `warps` warps, in their order.

    The buffer is of two halves, which the calls use in turns (the last operand: 0 or 1), so that one barrier is enough:
    a half is written again when all warps have come to the barrier of the call after the one that read it.
    """
    lines = [
        ".reg .b32 lane, own, all; .reg .f32 a; mov.u32 lane, %laneid; mov.u32 own, %tid.x; shr.u32 own, own, 5;",
        f"mov.u32 all, quantkit_sums; mad.lo.u32 all, ${2 * count}, {128 * warps * count}, all;",
        f"mad.lo.u32 all, lane, 4, all; mad.lo.u32 own, own, {128 * count}, all;",
    ]
    lines += [f"st.shared.f32 [own + {128 * i}], ${count + i};" for i in range(count)]
    lines.append("bar.sync 0;")
    for i in range(count):
        lines.append(f"ld.shared.f32 ${i}, [all + {128 * i}];")
        for w in range(1, warps):
            lines.append(f"ld.shared.f32 a, [all + {128 * (w * count + i)}]; add.f32 ${i}, ${i}, a;")
    return "{ " + " ".join(lines) + " }"


_WARPS, _COUNTS = (1, 2, 4, 8), (2, 4, 8, 16)
#: By `few_rows_sums.slot`: PTX at a kernel's begin, and of the exchange for so many warps and numbers; its constraints.
SUMS_BUFFER = tl.constexpr(
    tuple(
        f".shared .align 16 .b32 quantkit_sums[{64 * w * c}]; mov.u32 $0, 0;" for w in _WARPS for c in _COUNTS
    )
)
EXCHANGE = tl.constexpr(tuple(_exchange_asm(w, c) for w in _WARPS for c in _COUNTS))
EXCHANGE_CON = tl.constexpr(tuple(",".join(["=&f"] * c + ["f"] * c + ["r"]) for c in _COUNTS))


def _four_bits(word: str, out: str, dtype: str) -> list[str]:
    """Codes i and i + 4 of `word` in the halves of `out`i, i < 4, as q + the offset for `_FOUR_AT`."""
    lines = []
    at = _FOUR_AT[dtype]
    for i in range(4):
        shift = 4 * i - at
        source = word
        if shift:
            lines.append(f"{'shr' if shift > 0 else 'shl'}.b32 t, {word}, {abs(shift)};")
            source = "t"
        lines.append(f"lop3.b32 {out}{i}, {source}, 0x{0xF000F << at:08x}, 0x{_offset(at, dtype):08x}, 0xea;")
    return lines


#: Bit of a half at which four-bit codes are masked out.
_FOUR_AT = {"bf16": 0, "f16": 4}


def _offset(at: int, dtype: str) -> int:
    """Both halves 2 ** (mantissa bits - at): a number in whose mantissa bit `at` stands for 1."""
    half = (134 - at) << 7 if dtype == "bf16" else (25 - at) << 10
    return half << 16 | half


def _three_bits(low: str, high: str, top: str, out: str, dtype: str) -> list[str]:
    """Codes j and j + 16 of the words `low` and `high` (16 codes' low bits each) and `top` (32 codes' top bits) in
    the halves of `out`j, j < 16, as q + the offset that `_offset` has for the bit of `_THREE_AT`.

    Byte k of m is a nibble for code 8 k + r and one for 8 k + 4 + r: both top bits are where one shift brings them.
    """
    lines = [
        # codes 8 k to 8 k + 3, and the others
        f"prmt.b32 t, {low}, {high}, 0x6420; prmt.b32 u, {low}, {high}, 0x7531;",
        "shl.b32 v, u, 4; lop3.b32 l0, t, v, 0x0f0f0f0f, 0xe4;",  # r = 0, 1 of both; the mask chooses
        "shr.b32 v, t, 4; lop3.b32 l1, v, u, 0x0f0f0f0f, 0xe4;",  # r = 2, 3
    ]
    for r in range(4):
        t, h = f"l{r // 2}", top
        if r % 2:
            lines.append(f"shr.b32 t, {t}, 2;")
            t = "t"
        if r != 2:
            lines.append(f"{'shl' if r < 2 else 'shr'}.b32 h, {top}, {abs(2 - r)};")
            h = "h"
        up = _THREE_AT[dtype][0]
        lines.append(f"lop3.b32 m, {t}, {h}, 0x33333333, 0xe4; shr.b32 v, m, {8 - up}; shl.b32 m, m, {up};")
        for j, source in ((r, "m"), (4 + r, "m"), (8 + r, "v"), (12 + r, "v")):
            at = _THREE_AT[dtype][j // 4]
            lines.append(
                f"lop3.b32 {out}{j}, {source}, 0x{0x70007 << at:08x}, 0x{_offset(at, dtype):08x}, 0xea;"
            )
    return lines


#: Bit of a half at which three-bit codes j, by j // 4, are masked out.
_THREE_AT = {"bf16": (0, 4, 0, 4), "f16": (3, 7, 3, 7)}


def _table(word: str, out: str) -> list[str]:
    """Values of the codes 2 i and 2 i + 1 of `word` in the halves of `out`i, i < 4, from `codebook_lookup`'s table."""
    lines = ["mov.u32 at, %laneid; mov.u32 t, quantkit_pairs; mad.lo.u32 at, at, 4, t;"]
    for i in range(4):
        lines.append(
            f"prmt.b32 t, {word}, 0, 0x{0x4440 | i:x}; mad.lo.u32 t, t, 128, at; ld.shared.b32 {out}{i}, [t];"
        )
    return lines


def _products_asm(kind: int, dtype: str, sums: bool) -> str:
    """PTX: parts (and sums of x) plus the products of 8 codes (three bits: 32) of both rows with their inputs.

    Outputs: 4 parts, then with `sums` 4 sums: of x times the offsets for both columns, of x for both. Inputs: the words
    of row g and of row g + 8 (three bits: two of low bits, one of top bits each), the inputs' words, 4 parts, with
    `sums` 4 sums.
    """
    words, count = (3, 16) if kind == 2 else (1, 4)  # of codes, registers of codes a row
    first = 8 if sums else 4
    codes = [f"${first + i}" for i in range(2 * words)]
    x = [f"${first + len(codes) + i}" for i in range(count)]
    old = [f"${first + len(codes) + count + i}" for i in range(first)]
    names = ",".join(f"p{i},q{i},b{i}" for i in range(count))
    lines = [f".reg .b32 t, u, v, h, m, l0, l1, at, one, o0, o1, {names}; .reg .f32 c0,c1,c2,c3,s0,s1,s2,s3;"]
    for row, out in ((0, "p"), (1, "q")):
        mine = codes[row * words : (row + 1) * words]
        if kind == 2:
            lines += _three_bits(mine[0], mine[1], mine[2], out, dtype)
        elif kind == 1:
            lines += _four_bits(mine[0], out, dtype)
        else:
            lines += _table(mine[0], out)
    for i in range(count // 2):
        if kind == 0:
            lines.append(f"mov.b32 b{2 * i}, {x[2 * i]}; mov.b32 b{2 * i + 1}, {x[2 * i + 1]};")
        else:
            a, b = x[i], x[i + count // 2]
            lines.append(f"prmt.b32 b{2 * i}, {a}, {b}, 0x5410; prmt.b32 b{2 * i + 1}, {a}, {b}, 0x7632;")
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
    lines.append(" ".join(f"mov.f32 c{i}, {old[i]};" for i in range(4)))
    for i in range(0, count, 2):
        lines.append(
            f"{mma} {{c0,c1,c2,c3}}, {{p{i},q{i},p{i + 1},q{i + 1}}}, {{b{i},b{i + 1}}}, {{c0,c1,c2,c3}};"
        )
    if sums:
        lines.append(f"mov.b32 one, 0x{_offset(_MANTISSA[dtype], dtype):08x};")
        lines.append(" ".join(f"mov.f32 s{i}, {old[4 + i]};" for i in range(4)))
        for i in range(0, count, 2):
            for e in range(2):
                offset = _offset(_THREE_AT[dtype][(i + e) // 4] if kind == 2 else _FOUR_AT[dtype], dtype)
                lines.append(f"mov.b32 o{e}, 0x{offset:08x};")
            lines.append(f"{mma} {{s0,s1,s2,s3}}, {{o0,one,o1,one}}, {{b{i},b{i + 1}}}, {{s0,s1,s2,s3}};")
        lines.append(" ".join(f"mov.f32 ${4 + i}, s{i};" for i in range(4)))
    lines.append(" ".join(f"mov.f32 ${i}, c{i};" for i in range(4)))
    return "{ " + " ".join(lines) + " }"


_MANTISSA = {"bf16": 7, "f16": 10}


def _constraints(kind: int, sums: bool) -> str:
    numbers = 8 if sums else 4
    integers = 6 + 16 if kind == 2 else 2 + 4
    return ",".join(["=f"] * numbers + ["r"] * integers + ["f"] * numbers)


def _all(kind: int) -> tuple[str, ...]:
    """(bfloat16, with sums), (bfloat16, without), (float16, with), (float16, without)."""
    return tuple(_products_asm(kind, d, s) for d in ("bf16", "f16") for s in (True, False))


TABLE_ASM = tl.constexpr(_all(0))
FOUR_ASM = tl.constexpr(_all(1))
THREE_ASM = tl.constexpr(_all(2))
WORD_CON = tl.constexpr((_constraints(0, True), _constraints(0, False)))
THREE_CON = tl.constexpr((_constraints(2, True), _constraints(2, False)))
