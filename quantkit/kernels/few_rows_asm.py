"""PTX of `few_rows_kernel`: conditional loads, pairs of scales, and decoding with the matrix products that take it.

One asm takes a word of eight codes (three bits: half a word of top bits with a word of sixteen low ones) of the
rows g and g + 8, makes the registers of `mma.m16n8k16`'s first operand of them, two codes to a register, pairs the
inputs alike for the second, and multiplies:

    register of W    (codes i, j) of row g, of row g + 8      register of x    (inputs i, j) of the thread's column
    NF4              j = i + 1, as the table of pairs has them
    4 bits           j = i + 4: a mask of the shifted word
    3 bits           j = i + 8

(The fragments' lanes: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".)
"""

from __future__ import annotations

import triton.language as tl

#: Four words at $4 if $5 is not zero, else zeros.
LOAD_X_IF = tl.constexpr(
    "{ .reg .pred p; .reg .b32 a, b, c, d; setp.ne.b32 p, $5, 0; mov.b32 a, 0; mov.b32 b, 0; mov.b32 c, 0;"
    " mov.b32 d, 0; @p ld.global.nc.v4.b32 {a,b,c,d}, [$4]; mov.b32 $0, a; mov.b32 $1, b; mov.b32 $2, c;"
    " mov.b32 $3, d; }"
)
LOAD_F32_PAIR = tl.constexpr("ld.global.nc.v2.b32 {$0,$1}, [$2];")
LOAD_16_PAIR = tl.constexpr("{ .reg .b32 w; ld.global.nc.b32 w, [$2]; mov.b32 {$0,$1}, w; }")
LOAD_8_PAIR = tl.constexpr("{ .reg .b16 w; ld.global.nc.u16 w, [$2]; and.b16 $0, w, 255; shr.u16 $1, w, 8; }")


def _four_bits(word: str, out: str, dtype: str) -> list[str]:
    """Codes i and i + 4 of `word` in the halves of `out`i, i < 4, as OFFSET + q."""
    lines = []
    up, mask, base = (0, 0x000F000F, 0x43004300) if dtype == "bf16" else (4, 0x00F000F0, 0x54005400)
    for i in range(4):
        shift = 4 * i - up
        source = word
        if shift:
            lines.append(f"{'shr' if shift > 0 else 'shl'}.b32 t, {word}, {abs(shift)};")
            source = "t"
        lines.append(f"lop3.b32 {out}{i}, {source}, 0x{mask:08x}, 0x{base:08x}, 0xea;")
    return lines


def _three_bits(low: str, high: str, half: int, out: str, dtype: str) -> list[str]:
    """Codes i and i + 8 of the word `low` in the halves of `out`i, i < 8; top bits in half `half` of `high`."""
    base = 0x43004300 if dtype == "bf16" else 0x64006400
    lines = [f"prmt.b32 h, {high}, 0, 0x4{2 * half + 1}4{2 * half};"]  # bits 0-7 and 8-15, 16 apart
    for i in range(8):
        source, top = low, "h"
        if i:
            lines.append(f"shr.b32 t, {low}, {2 * i};")
            source = "t"
        lines.append(f"lop3.b32 v, {source}, 0x00030003, 0x{base:08x}, 0xea;")
        if i != 2:
            lines.append(f"{'shl' if i < 2 else 'shr'}.b32 u, h, {abs(2 - i)};")
            top = "u"
        lines.append(f"lop3.b32 {out}{i}, {top}, 0x00040004, v, 0xea;")
    return lines


def _table(word: str, out: str) -> list[str]:
    """Values of the codes 2 i and 2 i + 1 of `word` in the halves of `out`i, i < 4, from `codebook_lookup`'s table."""
    lines = ["mov.u32 at, %laneid; mov.u32 t, quantkit_pairs; mad.lo.u32 at, at, 4, t;"]
    for i in range(4):
        lines.append(
            f"prmt.b32 t, {word}, 0, 0x{0x4440 | i:x}; mad.lo.u32 t, t, 128, at; ld.shared.b32 {out}{i}, [t];"
        )
    return lines


def _products_asm(kind: int, dtype: str, sums: bool) -> str:
    """PTX: parts (and sums of x) plus the products of a word of codes of both rows with its inputs.

    Outputs: 4 parts, then with `sums` 2 sums. Inputs: the words of row g and g + 8 (three bits: then the words of
    their top bits, with the half as the number of the asm), the inputs' words, 4 parts, with `sums` 2 sums.
    """
    three = kind >= 2
    half, count = kind - 2, 8 if three else 4  # registers of codes a row
    first = 6 if sums else 4
    codes = [f"${first + i}" for i in range(4 if three else 2)]
    x = [f"${first + len(codes) + i}" for i in range(count)]
    old = [f"${first + len(codes) + count + i}" for i in range(6 if sums else 4)]
    names = ",".join(f"p{i},q{i},b{i}" for i in range(count))
    lines = [f".reg .b32 t, u, v, h, at, one, {names}; .reg .f32 c0,c1,c2,c3,s0,s1,s2,s3;"]
    for row, out in ((0, "p"), (1, "q")):
        if three:
            lines += _three_bits(codes[row], codes[2 + row], half, out, dtype)
        elif kind == 1:
            lines += _four_bits(codes[row], out, dtype)
        else:
            lines += _table(codes[row], out)
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
        ones = "0x3f803f80" if dtype == "bf16" else "0x3c003c00"
        lines.append(f"mov.b32 one, {ones}; mov.f32 s0, {old[4]}; mov.f32 s1, {old[5]};")
        lines.append("mov.f32 s2, 0f00000000; mov.f32 s3, 0f00000000;")
        for i in range(0, count, 2):
            lines.append(f"{mma} {{s0,s1,s2,s3}}, {{one,one,one,one}}, {{b{i},b{i + 1}}}, {{s0,s1,s2,s3}};")
        lines.append("mov.f32 $4, s0; mov.f32 $5, s1;")
    lines.append(" ".join(f"mov.f32 ${i}, c{i};" for i in range(4)))
    return "{ " + " ".join(lines) + " }"


def _constraints(kind: int, sums: bool) -> str:
    numbers = 6 if sums else 4
    integers = (4 + 8) if kind >= 2 else (2 + 4)
    return ",".join(["=f"] * numbers + ["r"] * integers + ["f"] * numbers)


def _all(kind: int) -> tuple[str, ...]:
    """(bfloat16, with sums), (bfloat16, without), (float16, with), (float16, without)."""
    return tuple(_products_asm(kind, d, s) for d in ("bf16", "f16") for s in (True, False))


TABLE_ASM = tl.constexpr(_all(0))
FOUR_ASM = tl.constexpr(_all(1))
THREE_ASM = tl.constexpr(_all(2))
THREE_ASM_UPPER = tl.constexpr(_all(3))
WORD_CON = tl.constexpr((_constraints(0, True), _constraints(0, False)))
THREE_CON = tl.constexpr((_constraints(2, True), _constraints(2, False)))
