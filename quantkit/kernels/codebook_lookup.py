"""Four-bit codes to table values in registers (Triton): NF4, FP4 or any table of sixteen numbers.

A tile of bytes `c` holds two codes per byte, the first in the high nibble, so byte j serves the inputs
2j (high) and 2j + 1 (low): one byte is the pair of neighbouring weights that a matrix instruction takes in one
register.

Portable: one load per code from the table, which sits in the L1 cache.

With PTX, for float16 and bfloat16: a table of all 256 bytes in shared memory, whose entries are pairs of
halves (value of the high nibble, value of the low nibble). One 32-bit load then decodes two weights. Loads
of 32 random entries would meet in the same banks; so each lane has a copy of the table in a bank of its own:

    entry of byte b for lane l at word 32 b + l                 32 KB, no conflicts
    per byte       prmt (byte out of the word), imad (address), lds

12 instructions for 8 weights, of which 4 on the integer pipe. Filling the table takes each program a microsecond or
two; kernels that would not earn that back (`eight_values`, `two_values`) keep one entry of the sixteen in every
lane and fetch with a shuffle, one per weight. (Looking up bytes of the halves with `prmt` alone
takes 21, all on the integer pipe; the two nibbles as two operands, each with its own half of x, 16.)
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


def _fill_asm(dtype: str) -> str:
    """PTX, once per thread and once in a kernel: declare the table and fill it from 16 float32 at $1.

    An entry is 32 copies of one word: eight lanes write one, four words each, so a warp writes four entries at once,
    and the sixteen of a high nibble in four turns. Warps take high nibbles in turns.

    The declaration stands outside the braces: it holds to the end of the kernel, so that `_LOOKUP` can name
    the table. (As an operand its address would cost more than it looks: Triton then no longer decodes in the
    registers that the matrix instruction reads, but sends every weight through shared memory once more.)
    """
    lines = [
        ".reg .pred p; .reg .b32 lane, warps, h, i, at, v; .reg .b64 wide; .reg .f32 e, x, y<4>;",
        "mov.u32 lane, %laneid; mov.u32 h, %tid.x; shr.u32 h, h, 5; mov.u32 warps, %ntid.x; shr.u32 warps, warps, 5;",
        # the number of the lane (modulo 16), and those of the low nibbles that it writes
        "and.b32 i, lane, 15; mad.wide.u32 wide, i, 4, $1; ld.global.f32 e, [wide]; shr.u32 i, lane, 3;",
        *[f"shfl.sync.idx.b32 y{turn}, e, i, 31, -1; add.u32 i, i, 4;" for turn in range(4)],
        "mov.u32 at, quantkit_pairs; mad.lo.u32 at, lane, 16, at;",
        "more: setp.ge.u32 p, h, 16; @p bra done;",
        "shfl.sync.idx.b32 x, e, h, 31, -1; mad.lo.u32 i, h, 2048, at;",
    ]
    for turn in range(4):  # the low half is x, the high nibble's value
        write = f"st.shared.v4.b32 [i + {512 * turn}], {{v, v, v, v}};"
        lines.append(f"cvt.rn.{dtype}x2.f32 v, y{turn}, x; {write}")
    lines += ["add.u32 h, h, warps; bra more;", "done: bar.sync 0; mov.u32 $0, 0;"]
    return ".shared .align 16 .b32 quantkit_pairs[8192]; { " + " ".join(lines) + " }"


#: PTX for the byte in $2: $0 = the high nibble's value, $1 = the low nibble's.
_LOOKUP = tl.constexpr(
    "{ .reg .b32 at, byte, pair; mov.u32 at, %laneid; mov.u32 byte, quantkit_pairs; mad.lo.u32 at, at, 4, byte;"
    " cvt.u32.u16 byte, $2; mad.lo.u32 at, byte, 128, at; ld.shared.b32 pair, [at]; mov.b32 {$0, $1}, pair; }"
)


_FILL_F16 = tl.constexpr(_fill_asm("f16"))
_FILL_BF16 = tl.constexpr(_fill_asm("bf16"))


@triton.jit
def fill_table(lut_ptr, THREADS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """With ASM: fills the table in shared memory. Once in a kernel, before the first `lookup`."""
    if ASM:
        lut = lut_ptr.to(tl.int64) + tl.zeros((THREADS,), tl.int64)
        if tl.float16 == DTYPE:
            tl.inline_asm_elementwise(_FILL_F16, "=r,l", [lut], tl.int32, is_pure=False, pack=1)
        else:
            tl.inline_asm_elementwise(_FILL_BF16, "=r,l", [lut], tl.int32, is_pure=False, pack=1)


@triton.jit
def nibble(q, lut_ptr, DTYPE: tl.constexpr):
    """Table values of codes `q`, in portable Triton."""
    return tl.load(lut_ptr + q.to(tl.int32)).to(tl.float32).to(DTYPE)


@triton.jit
def lookup(c, lut_ptr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Table values of the bytes `c [..., J]` in DTYPE: `[..., 2 J]`, in the order of the inputs."""
    if ASM:
        if tl.float16 == DTYPE:
            types: tl.constexpr = (tl.float16, tl.float16)
        else:
            types: tl.constexpr = (tl.bfloat16, tl.bfloat16)
        first, second = tl.inline_asm_elementwise(
            _LOOKUP, "=h,=h,h", [c.to(tl.uint16)], types, is_pure=True, pack=1
        )
    else:
        first = nibble(c >> 4, lut_ptr, DTYPE)
        second = nibble(c & 15, lut_ptr, DTYPE)
    return tl.join(first, second).reshape(c.shape[:-1] + [2 * c.shape[-1]])


_SHUFFLES = "".join(
    f"shr.b32 q, $8, {8 * (i // 2) + (4 if i % 2 == 0 else 0)}; shfl.sync.idx.b32 ${i}, entry, q, 0x100f, -1; "
    for i in range(8)
)
_OWN_ENTRY = (
    ".reg .b32 lane, entry, q; .reg .b64 at; mov.u32 lane, %laneid; and.b32 lane, lane, 15;"
    " mad.wide.u32 at, lane, 4, {table}; ld.global.nc.b32 entry, [at]; "
)
#: PTX for a 32-bit word of eight codes in $8 and the table's address in $9: float32 values in the inputs' order.
#: (The shuffle's last operands keep to the lane's own half of the warp: only four bits of the code count.)
_EIGHT = tl.constexpr("{ " + _OWN_ENTRY.format(table="$9") + _SHUFFLES + "}")


def _pair_asm(dtype: str) -> str:
    """PTX for four bytes in $4, table at $5: values of high nibbles in $0, $1 (two halves each), of low in $2, $3."""
    lines = [".reg .f32 a, b;"]
    for out in range(4):
        for name, byte in (("a", 2 * (out % 2)), ("b", 2 * (out % 2) + 1)):
            shift = 8 * byte + (4 if out < 2 else 0)
            lines += [f"shr.b32 q, $4, {shift};", f"shfl.sync.idx.b32 {name}, entry, q, 0x100f, -1;"]
        lines.append(f"cvt.rn.{dtype}x2.f32 ${out}, b, a;")
    return "{ " + _OWN_ENTRY.format(table="$5") + " ".join(lines) + " }"


_PAIRS_F16 = tl.constexpr(_pair_asm("f16"))
_PAIRS_BF16 = tl.constexpr(_pair_asm("bf16"))
_PAIRS_CON = tl.constexpr("=r,=r,=r,=r,r,l,l,l,l")


@triton.jit
def two_values(c, lut_ptr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Table values in DTYPE of the high and of the low codes of the bytes `c`."""
    if ASM and tl.float32 != DTYPE:
        table = lut_ptr.to(tl.int64) + tl.zeros(c.shape, tl.int64)
        if tl.float16 == DTYPE:
            types: tl.constexpr = (tl.float16, tl.float16)
            return tl.inline_asm_elementwise(_PAIRS_F16, _PAIRS_CON, [c, table], types, is_pure=True, pack=4)
        else:
            types: tl.constexpr = (tl.bfloat16, tl.bfloat16)
            return tl.inline_asm_elementwise(_PAIRS_BF16, _PAIRS_CON, [c, table], types, is_pure=True, pack=4)
    else:
        return (nibble(c >> 4, lut_ptr, DTYPE), nibble(c & 15, lut_ptr, DTYPE))


@triton.jit
def eight_values(word, lut_ptr, ASM: tl.constexpr):
    """Float32 table values of the eight codes in each 32-bit `word`, as a tuple in the inputs' order."""
    if ASM:
        types: tl.constexpr = (tl.float32,) * 8
        table = lut_ptr.to(tl.int64) + tl.zeros(word.shape, tl.int64)
        return tl.inline_asm_elementwise(
            _EIGHT, "=r,=r,=r,=r,=r,=r,=r,=r,r,l", [word, table], types, is_pure=True, pack=1
        )
    else:
        return (
            tl.load(lut_ptr + ((word >> 4) & 15)).to(tl.float32),
            tl.load(lut_ptr + (word & 15)).to(tl.float32),
            tl.load(lut_ptr + ((word >> 12) & 15)).to(tl.float32),
            tl.load(lut_ptr + ((word >> 8) & 15)).to(tl.float32),
            tl.load(lut_ptr + ((word >> 20) & 15)).to(tl.float32),
            tl.load(lut_ptr + ((word >> 16) & 15)).to(tl.float32),
            tl.load(lut_ptr + ((word >> 28) & 15)).to(tl.float32),
            tl.load(lut_ptr + ((word >> 24) & 15)).to(tl.float32),
        )


@triton.jit
def code_at(codes_ptr, i, mask):
    """Code of the flattened weight's element `i` (int64), for rows that begin inside a byte (odd K)."""
    byte = tl.load(codes_ptr + i // 2, mask=mask, other=0).to(tl.int32)
    return tl.where(i % 2 == 0, byte >> 4, byte & 15)
