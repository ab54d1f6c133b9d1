"""Loads of `few_rows_kernel` as inline PTX, which stay in the layout of their addresses, and as plain ones (Triton).

A `tl.load` is given a layout that suits its own addresses, and its result is then sent through shared memory.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.few_rows_asm import LOAD_8_PAIR, LOAD_16_PAIR, LOAD_F32_PAIR, LOAD_X_IF

#: What `KIND` stands for.
CODEBOOK, AFFINE4, AFFINE3 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def _loads(count: int, kept: bool) -> str:
    """PTX for `count` 32-bit words at the address in the last operand. Weights are read once: not kept in L1."""
    hint = "" if kept else ".L1::no_allocate"
    if count == 1:
        return f"ld.global.nc{hint}.b32 $0, [$1];"
    outs = ",".join(f"${i}" for i in range(count))
    return f"ld.global.nc{hint}.v{count}.b32 {{{outs}}}, [${count}];"


_LOAD_X = tl.constexpr(_loads(4, True))
_LOAD4 = tl.constexpr(_loads(4, False))
_LOAD2 = tl.constexpr(_loads(2, False))
_LOAD1 = tl.constexpr(_loads(1, False))
_LOAD_F32 = tl.constexpr("ld.global.nc.b32 $0, [$1];")
_LOAD_16 = tl.constexpr("ld.global.nc.u16 $0, [$1];")
_LOAD_8 = tl.constexpr("ld.global.nc.u8 $0, [$1];")


@triton.jit
def words(p, COUNT: tl.constexpr, KEPT: tl.constexpr, ASM: tl.constexpr):
    """COUNT (1, 2 or 4) words at the byte addresses `p`, as a tuple."""
    if ASM:
        at = p.to(tl.int64)
        if COUNT == 1:
            return (tl.inline_asm_elementwise(_LOAD1, "=r,l", [at], tl.int32, is_pure=True, pack=1),)
        elif COUNT == 2:
            two: tl.constexpr = (tl.int32, tl.int32)
            return tl.inline_asm_elementwise(_LOAD2, "=r,=r,l", [at], two, is_pure=True, pack=1)
        else:
            four: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
            if KEPT:
                return tl.inline_asm_elementwise(_LOAD_X, "=r,=r,=r,=r,l", [at], four, is_pure=True, pack=1)
            else:
                return tl.inline_asm_elementwise(_LOAD4, "=r,=r,=r,=r,l", [at], four, is_pure=True, pack=1)
    else:
        pointers = p.to(tl.pointer_type(tl.int32), bitcast=True)
        out = ()
        for i in tl.static_range(COUNT):
            out = out + (tl.load(pointers + i),)
        return out


@triton.jit
def number(p, ASM: tl.constexpr):
    """One scale or zero point at each of `p`, as float32."""
    kind: tl.constexpr = p.dtype.element_ty
    if not ASM:
        return tl.load(p).to(tl.float32)
    elif kind == tl.float32:
        return tl.inline_asm_elementwise(
            _LOAD_F32, "=r,l", [p.to(tl.int64)], tl.float32, is_pure=True, pack=1
        )
    elif kind == tl.uint8:
        byte = tl.inline_asm_elementwise(_LOAD_8, "=h,l", [p.to(tl.int64)], tl.int16, is_pure=True, pack=1)
        return byte.to(tl.float32)
    elif kind == tl.float16:
        half = tl.inline_asm_elementwise(_LOAD_16, "=h,l", [p.to(tl.int64)], tl.float16, is_pure=True, pack=1)
        return half.to(tl.float32)
    else:
        half = tl.inline_asm_elementwise(
            _LOAD_16, "=h,l", [p.to(tl.int64)], tl.bfloat16, is_pure=True, pack=1
        )
        return half.to(tl.float32)


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
    four: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
    for i in tl.static_range(4):
        at = p + 16 * i
        if ALL:
            out = out + words(at, 4, True, ASM)
        elif not ASM:
            pointers = at.to(tl.pointer_type(tl.int32), bitcast=True)
            for j in tl.static_range(4):
                out = out + (tl.load(pointers + j, mask=wanted != 0, other=0),)
        else:
            out = out + tl.inline_asm_elementwise(
                LOAD_X_IF, "=r,=r,=r,=r,l,r", [at, wanted], four, is_pure=True, pack=1
            )
    return out


@triton.jit
def numbers(p, PAIR: tl.constexpr, ASM: tl.constexpr):
    """The scales or zero points of both columns of a thread as float32: two neighbours at `p`, or one for both."""
    kind: tl.constexpr = p.dtype.element_ty
    if not PAIR:
        a = number(p, ASM)
        return (a, a)
    elif not ASM:
        return (tl.load(p).to(tl.float32), tl.load(p + 1).to(tl.float32))
    elif kind == tl.float32:
        floats: tl.constexpr = (tl.float32, tl.float32)
        return tl.inline_asm_elementwise(
            LOAD_F32_PAIR, "=r,=r,l", [p.to(tl.int64)], floats, is_pure=True, pack=1
        )
    else:
        shorts: tl.constexpr = (tl.int16, tl.int16)
        if kind == tl.uint8:
            a, b = tl.inline_asm_elementwise(
                LOAD_8_PAIR, "=h,=h,l", [p.to(tl.int64)], shorts, is_pure=True, pack=1
            )
            return (a.to(tl.float32), b.to(tl.float32))
        else:
            a, b = tl.inline_asm_elementwise(
                LOAD_16_PAIR, "=h,=h,l", [p.to(tl.int64)], shorts, is_pure=True, pack=1
            )
            return (a.to(kind, bitcast=True).to(tl.float32), b.to(kind, bitcast=True).to(tl.float32))
