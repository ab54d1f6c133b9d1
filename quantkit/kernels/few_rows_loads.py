"""Loads of `few_rows_kernel` as inline PTX, which stay in the layout of their addresses, and as plain ones (Triton).

A `tl.load` is given a layout that suits its own addresses, and its result is then sent through shared memory. All
loads are conditional: what is on its way when a program ends would delay the end.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

#: What `KIND` stands for.
CODEBOOK, AFFINE4, AFFINE3 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def _if_wanted(load: str, outputs: int, after: str = "") -> str:
    """PTX of a load from ${outputs} if the number after it is not zero; `after` may use what was loaded to w or h."""
    condition = f".reg .pred p; .reg .b32 w; .reg .b16 h; setp.ne.b32 p, ${outputs + 1}, 0;"
    return f"{{ {condition} @p ld.global{load}, [${outputs}]; {after} }}"


def _words(count: int) -> str:
    """Weights are read once: not kept in L1."""
    outs = ",".join(f"${i}" for i in range(count))
    kind = "b32 $0" if count == 1 else f"v{count}.b32 {{{outs}}}"
    return _if_wanted(f".L1::no_allocate.{kind}", count)


_LOAD4 = tl.constexpr(_words(4))
_LOAD2 = tl.constexpr(_words(2))
_LOAD1 = tl.constexpr(_words(1))
_LOAD_F32 = tl.constexpr(_if_wanted(".b32 $0", 1))
_LOAD_16 = tl.constexpr(_if_wanted(".u16 $0", 1))
_LOAD_8 = tl.constexpr(_if_wanted(".u8 $0", 1))
_LOAD_F32_PAIR = tl.constexpr(_if_wanted(".v2.b32 {$0,$1}", 2))
_LOAD_16_PAIR = tl.constexpr(_if_wanted(".b32 w", 2, "mov.b32 {$0,$1}, w;"))
_LOAD_8_PAIR = tl.constexpr(_if_wanted(".u16 h", 2, "and.b16 $0, h, 255; shr.u16 $1, h, 8;"))
#: Inputs: kept in L1.
_LOAD_X = tl.constexpr("ld.global.v4.b32 {$0,$1,$2,$3}, [$4];")
#: Zeros where they are not wanted.
_LOAD_X_IF = tl.constexpr(
    "{ .reg .pred p; .reg .b32 a, b, c, d; setp.ne.b32 p, $5, 0; mov.b32 a, 0; mov.b32 b, 0; mov.b32 c, 0;"
    " mov.b32 d, 0; @p ld.global.v4.b32 {a,b,c,d}, [$4]; mov.b32 $0, a; mov.b32 $1, b; mov.b32 $2, c;"
    " mov.b32 $3, d; }"
)


@triton.jit
def words(p, wanted, COUNT: tl.constexpr, ASM: tl.constexpr):
    """COUNT (1, 2 or 4) words at the byte addresses `p`, as a tuple; anything where `wanted` is 0."""
    if ASM:
        ins = (p.to(tl.int64), wanted)
        two: tl.constexpr = (tl.int32,) * 2
        four: tl.constexpr = (tl.int32,) * 4
        if COUNT == 1:
            return (tl.inline_asm_elementwise(_LOAD1, "=r,l,r", ins, tl.int32, is_pure=True, pack=1),)
        elif COUNT == 2:
            return tl.inline_asm_elementwise(_LOAD2, "=r,=r,l,r", ins, two, is_pure=True, pack=1)
        else:
            return tl.inline_asm_elementwise(_LOAD4, "=r,=r,=r,=r,l,r", ins, four, is_pure=True, pack=1)
    else:
        pointers = p.to(tl.pointer_type(tl.int32), bitcast=True)
        out = ()
        for i in tl.static_range(COUNT):
            out = out + (tl.load(pointers + i, mask=wanted != 0, other=0),)
        return out


@triton.jit
def number(p, wanted, ASM: tl.constexpr):
    """One scale or zero point at each of `p`, as float32; anything where `wanted` is 0."""
    kind: tl.constexpr = p.dtype.element_ty
    ins = (p.to(tl.int64), wanted)
    if not ASM:
        return tl.load(p, mask=wanted != 0, other=0).to(tl.float32)
    elif kind == tl.float32:
        return tl.inline_asm_elementwise(_LOAD_F32, "=r,l,r", ins, tl.float32, is_pure=True, pack=1)
    elif kind == tl.uint8:
        byte = tl.inline_asm_elementwise(_LOAD_8, "=h,l,r", ins, tl.int16, is_pure=True, pack=1)
        return byte.to(tl.float32)
    else:
        half = tl.inline_asm_elementwise(_LOAD_16, "=h,l,r", ins, tl.int16, is_pure=True, pack=1)
        return half.to(kind, bitcast=True).to(tl.float32)


@triton.jit
def numbers(p, wanted, PAIR: tl.constexpr, ASM: tl.constexpr):
    """The scales or zero points of both columns of a thread as float32: two neighbours at `p`, or one for both."""
    kind: tl.constexpr = p.dtype.element_ty
    shorts: tl.constexpr = (tl.int16, tl.int16)
    if not PAIR:
        a = number(p, wanted, ASM)
        return (a, a)
    elif not ASM:
        return (number(p, wanted, ASM), number(p + 1, wanted, ASM))
    else:
        ins = (p.to(tl.int64), wanted)
        if kind == tl.float32:
            floats: tl.constexpr = (tl.float32, tl.float32)
            return tl.inline_asm_elementwise(_LOAD_F32_PAIR, "=r,=r,l,r", ins, floats, is_pure=True, pack=1)
        elif kind == tl.uint8:
            a, b = tl.inline_asm_elementwise(_LOAD_8_PAIR, "=h,=h,l,r", ins, shorts, is_pure=True, pack=1)
            return (a.to(tl.float32), b.to(tl.float32))
        else:
            a, b = tl.inline_asm_elementwise(_LOAD_16_PAIR, "=h,=h,l,r", ins, shorts, is_pure=True, pack=1)
            return (a.to(kind, bitcast=True).to(tl.float32), b.to(kind, bitcast=True).to(tl.float32))


@triton.jit
def two_inputs(word, DTYPE: tl.constexpr):
    """The two inputs in a 32-bit word as float32. (By their bits: the interpreter's bfloat16 is wrong.)"""
    if tl.bfloat16 == DTYPE:
        return ((word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True))
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return (low, (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32))


@triton.jit
def inputs(p, wanted, ALL: tl.constexpr, ASM: tl.constexpr):
    """16 words of inputs at the byte addresses `p`; zeros where `wanted` is 0, unless ALL are wanted."""
    out = ()
    four: tl.constexpr = (tl.int32,) * 4
    for i in tl.static_range(4):
        at = p + 16 * i
        if not ASM:
            out = out + words(at, wanted, 4, ASM)
        elif ALL:
            out = out + tl.inline_asm_elementwise(_LOAD_X, "=r,=r,=r,=r,l", [at], four, is_pure=True, pack=1)
        else:
            out = out + tl.inline_asm_elementwise(
                _LOAD_X_IF, "=r,=r,=r,=r,l,r", [at, wanted], four, is_pure=True, pack=1
            )
    return out
