"""PTX of `few_rows_kernel`: conditional loads, pairs of scales, and decoding with the matrix products that take it.

One asm takes a word of eight codes (three bits: 32 codes, two words of low bits and one of top bits) of the
rows g and g + 8, makes the registers of `mma.m16n8k16`'s first operand of them, two codes to a register, pairs the
inputs alike for the second, and multiplies:

    register of W    (codes i, j) of row g, of row g + 8      register of x    (inputs i, j) of the thread's column
    NF4              j = i + 1, as the table of pairs has them
    4 bits           j = i + 4: a mask of the shifted word
    3 bits           j = i + 16, of both words of low bits

Affine codes come as q plus an offset, which is a power of two: the mantissa's bit that stands for 1 may be any, if the
exponent says so. So only one shift serves several codes of three bits, each with an offset of its own:

    bfloat16         128 + q, 32 + q, 8 + q               codes i, i + 1, i + 2 of a half
    float16          1024 + q, 256 + q, 64 + q, 16 + q

Another product takes the sums that this costs, with the offsets in its rows g and ones in its rows g + 8.

(The fragments' lanes: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".)
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Four words at $4 if $5 is not zero, else zeros.
LOAD_X_IF = tl.constexpr(
    "{ .reg .pred p; .reg .b32 a, b, c, d; setp.ne.b32 p, $5, 0; mov.b32 a, 0; mov.b32 b, 0; mov.b32 c, 0;"
    " mov.b32 d, 0; @p ld.global.nc.v4.b32 {a,b,c,d}, [$4]; mov.b32 $0, a; mov.b32 $1, b; mov.b32 $2, c;"
    " mov.b32 $3, d; }"
)
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
#: At `slot(warps, count)`: PTX at a kernel's begin, PTX of the exchange. At `slot(1, count)`: constraints of that.
SUMS_BUFFER = tl.constexpr(
    tuple(f".shared .align 16 .b32 quantkit_sums[{64 * w * c}]; mov.u32 $0, 0;" for w in _WARPS for c in _COUNTS)
)
EXCHANGE = tl.constexpr(tuple(_exchange_asm(w, c) for w in _WARPS for c in _COUNTS))
EXCHANGE_CON = tl.constexpr(tuple(",".join(["=&f"] * c + ["f"] * c + ["r"]) for c in _COUNTS))


@triton.constexpr_function
def slot(warps: int, count: int) -> int:
    """Where the three above have what is for so many warps and numbers."""
    return 4 * (warps.bit_length() - 1) + count.bit_length() - 2  # the logarithms


LOAD_F32_PAIR = tl.constexpr("ld.global.nc.v2.b32 {$0,$1}, [$2];")
LOAD_16_PAIR = tl.constexpr("{ .reg .b32 w; ld.global.nc.b32 w, [$2]; mov.b32 {$0,$1}, w; }")
LOAD_8_PAIR = tl.constexpr("{ .reg .b16 w; ld.global.nc.u16 w, [$2]; and.b16 $0, w, 255; shr.u16 $1, w, 8; }")


def _four_bits(word: str, out: str, dtype: str) -> list[str]:
    """Codes i and i + 4 of `word` in the halves of `out`i, i < 4, as q + the offset."""
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


def _offset(at: int, dtype: str) -> int:
    """Both halves 2 ** (mantissa bits - at): a number in whose mantissa bit `at` stands for 1."""
    half = (134 - at) << 7 if dtype == "bf16" else (25 - at) << 10
    return half << 16 | half


def _three_bits(low: str, high: str, top: str, out: str, dtype: str) -> list[str]:
    """Codes j and j + 16 of the words `low` and `high` (16 codes' low bits each) and `top` (32 codes' top bits) in
    the halves of `out`j, j < 16, as q + the offset of `_three_offset`."""
    several = _SEVERAL[dtype]
    lines = [f"prmt.b32 l0, {low}, {high}, 0x5410; prmt.b32 l1, {low}, {high}, 0x7632;"]
    for j in range(16):
        group, e = divmod(j % 8, several)
        if e == 0:
            first = j - 2  # code j's top bit goes to bit 2
            lines.append(f"{'shl' if first < 0 else 'shr'}.b32 h, {top}, {abs(first)};")
            lines.append(f"shr.b32 t, l{j // 8}, {2 * several * group};")
        lines.append(f"lop3.b32 v, t, 0x{0x00030003 << 2 * e:08x}, 0x{_offset(2 * e, dtype):08x}, 0xea;")
        lines.append(f"shl.b32 u, h, {e}; lop3.b32 {out}{j}, u, 0x{0x00040004 << 2 * e:08x}, v, 0xea;")
    return lines


#: Codes of three bits that one shift of the low bits serves.
_SEVERAL = {"bf16": 3, "f16": 4}


def _three_offset(j: int, dtype: str) -> int:
    return _offset(2 * (j % 8 % _SEVERAL[dtype]), dtype)


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
    lines = [f".reg .b32 t, u, v, h, l0, l1, at, one, o0, o1, {names}; .reg .f32 c0,c1,c2,c3,s0,s1,s2,s3;"]
    for row, out in ((0, "p"), (1, "q")):
        mine = codes[row * words : (row + 1) * words]
        if kind == 2:
            lines += _three_bits(*mine, out, dtype)
        elif kind == 1:
            lines += _four_bits(*mine, out, dtype)
        else:
            lines += _table(*mine, out)
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
                offset = _three_offset(i + e, dtype) if kind == 2 else _offset(0 if dtype == "bf16" else 4, dtype)
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
