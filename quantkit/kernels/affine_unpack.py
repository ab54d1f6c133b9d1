"""Codes in registers: bytes of packed weights become small floats that hold the codes exactly (Triton).

A tile of bytes `c` holds PER = 8 // bits codes per byte (3 bits: 4, with the top bits in a plane of their
own). Part r of byte j is the code of input k = j * PER + r, so the parts are never interleaved: part r
meets the inputs x[r::PER] in its own dot, and x is split instead.

    4 bits, one 32-bit register of 4 bytes (8 codes), bfloat16:

        c     b3 b2 b1 b0                    b = hi:lo nibbles
        and   s = c & 0x0f0f0f0f             the low nibbles;  (c >> 4) & 0x0f0f0f0f  the high ones
        prmt  0x43 s1 0x43 s0 | 0x43 s3 0x43 s2                two registers of two halves: 128 + q each

that is 7 instructions for 8 weights, none of them a conversion, whose rate is a quarter of an add's. 0x4300
is 128 in bfloat16, where the last bit of the mantissa is worth 1 (0x5800 in float16, where codes go 3 bits
further up). What the constant adds is taken off again, together with the zero point, after the dot:

    sum_k (q - zero) * x  =  sum_k (q + OFFSET) * x  -  (zero + OFFSET) * sum_k x

in float32, so integer and float zeros cost the same and weights are exact in every dtype. The sums
lose 128 / |q - zero|, about 30 times, in relative accuracy to cancellation: 3e-6 of a group's result,
far under the rounding of the 16-bit inputs. float32 inputs take the centred form, OFFSET = -2**(bits-1).

3 bits, where tiles allow it: the plane of low bits enters as 2-bit codes and the plane of top bits as 1-bit
codes worth 4, each in dots of its own (`unpack_top`), so that neither plane waits for the other's layout.

(Or-ing codes into the mantissa of a constant is from Kim et al. 2022, arXiv:2211.10017.)
"""

# mypy: ignore-errors
# ruff: noqa: SIM300
# Triton's language is not Python's type system: jit functions are compiled, not called.
from __future__ import annotations

import triton
import triton.language as tl


def unpack_asm(bits: int, dtype: str, lift: int = 0) -> str:
    """PTX for one register of 4 bytes ($last): 8 // bits parts of 4 codes, two codes per output register.

    Codes are multiplied by 2**lift.
    """
    parts = 8 // bits
    code = f"${2 * parts}"
    if bits == 8 and dtype == "bf16":
        return _unpack_asm_bytes_bf16()
    constant = {"bf16": 0x43, "f16": 0x64 if bits == 8 else 0x58}[dtype]
    up = lift + (3 if dtype == "f16" and bits < 8 else 0)  # where the last bit of the mantissa is worth 1/8
    lines = [".reg .b32 s;"]
    for part in range(parts):
        shift = bits * part - up
        source = code
        if shift:
            lines.append(f"{'shr' if shift > 0 else 'shl'}.b32 s, {code}, {abs(shift)};")
            source = "s"
        if bits < 8:
            mask = ((1 << bits) - 1) << up
            lines.append(f"and.b32 s, {source}, 0x{mask:02x}{mask:02x}{mask:02x}{mask:02x};")
            source = "s"
        for half, order in enumerate(("0x4140", "0x4342")):
            lines.append(
                f"prmt.b32 ${2 * part + half}, {source}, 0x{constant:02x}{constant:02x}{constant:02x}"
                f"{constant:02x}, {order};"
            )
    return "{ " + " ".join(lines) + " }"


def _unpack_asm_bytes_bf16() -> str:
    """Bytes do not fit bfloat16's mantissa beside a constant: q - 128 through float32, 2**23 + q."""
    lines = [".reg .b32 t; .reg .f32 f0, f1;"]
    for half in (0, 1):
        for i in (0, 1):
            lines.append(f"prmt.b32 t, $2, 0x4b000000, 0x754{2 * half + i};")
            lines.append(f"mov.b32 f{i}, t;")
            lines.append(f"add.f32 f{i}, f{i}, 0fCB000080;")  # -(2**23 + 128)
        lines.append(f"cvt.rn.bf16x2.f32 ${half}, f1, f0;")
    return "{ " + " ".join(lines) + " }"


def _constraints(bits: int) -> str:
    return ",".join(["=r"] * (16 // bits) + ["r"])


_ASM_1_F16 = tl.constexpr(unpack_asm(1, "f16"))
_ASM_1_BF16 = tl.constexpr(unpack_asm(1, "bf16"))
_ASM_2_F16 = tl.constexpr(unpack_asm(2, "f16"))
_ASM_2_BF16 = tl.constexpr(unpack_asm(2, "bf16"))
_ASM_4_F16 = tl.constexpr(unpack_asm(4, "f16"))
_ASM_4_BF16 = tl.constexpr(unpack_asm(4, "bf16"))
_ASM_8_F16 = tl.constexpr(unpack_asm(8, "f16"))
_ASM_8_BF16 = tl.constexpr(unpack_asm(8, "bf16"))
_ASM_TOP_F16 = tl.constexpr(unpack_asm(1, "f16", lift=2))
_ASM_TOP_BF16 = tl.constexpr(unpack_asm(1, "bf16", lift=2))
_ONES_F16 = tl.constexpr("mov.b32 $0, 0x3c003c00; mov.b32 $1, 0x3c003c00;")
_ONES_BF16 = tl.constexpr("mov.b32 $0, 0x3f803f80; mov.b32 $1, 0x3f803f80;")
_CON_1 = tl.constexpr(_constraints(1))
_CON_2 = tl.constexpr(_constraints(2))
_CON_4 = tl.constexpr(_constraints(4))
_CON_8 = tl.constexpr(_constraints(8))


@triton.constexpr_function
def code_offset(bits, dtype, centred):
    """What `unpack` adds to the codes: OFFSET of the module's docstring."""
    if centred:
        return -float(1 << (bits - 1))
    if dtype == tl.float32:
        return 0.0
    if bits == 8:
        return 1024.0 if dtype == tl.float16 else -128.0
    return 128.0


@triton.jit
def centred(w, BITS: tl.constexpr, DOT: tl.constexpr):
    """Unpacked weights less their OFFSET and half of the codes' range, exact in DOT."""
    return (w.to(tl.float32) - (code_offset(BITS, DOT, False) + (1 << (BITS - 1)))).to(DOT)


@triton.jit
def codes_part(c, h, j, r: tl.constexpr, BITS: tl.constexpr):
    """Part `r` of the bytes `c`, as integers. `h` holds the byte of top bits (3 bits only), `j` its column."""
    if BITS == 3:
        low = (c >> (2 * r)) & 3
        high = (h.to(tl.int32) >> ((j & 1) * 4 + r)) & 1
        return low.to(tl.int32) | (high << 2)
    elif BITS == 8:
        return c
    else:
        return (c >> (BITS * r)) & ((1 << BITS) - 1)


@triton.jit
def less_zero(q, zero):
    """Codes less their zero point in float32; exact where zero is an integer.

    2**23 + q by its bits is exact like a conversion and four times as fast.
    """
    q = (q.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
    if zero.dtype.is_floating():
        return (q - 8388608.0) - zero.to(tl.float32)
    else:
        return q - (zero.to(tl.float32) + 8388608.0)  # both integers below 2**24


@triton.jit
def weights_part(c, h, j, r: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Part `r` as q + OFFSET (not centred) in DTYPE, in portable Triton."""
    q = codes_part(c, h, j, r, BITS)
    if DTYPE == tl.float32:
        return q.to(tl.float32)
    elif DTYPE == tl.float16:
        if BITS == 8:
            return (q.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
        else:
            return ((q.to(tl.int16) << 3) | 0x5800).to(tl.float16, bitcast=True)
    elif BITS == 8:
        return (q.to(tl.float32) - 128.0).to(tl.bfloat16)
    else:
        return (q.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)


@triton.jit
def unpack(c, h, j, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """All parts of the bytes `c` as a tuple of q + OFFSET (not centred) in DTYPE."""
    if ASM and BITS == 4:
        if DTYPE == tl.float16:
            types: tl.constexpr = (tl.float16, tl.float16)
            return tl.inline_asm_elementwise(_ASM_4_F16, _CON_4, [c], types, is_pure=True, pack=4)
        else:
            types: tl.constexpr = (tl.bfloat16, tl.bfloat16)
            return tl.inline_asm_elementwise(_ASM_4_BF16, _CON_4, [c], types, is_pure=True, pack=4)
    elif ASM and BITS == 2:
        if DTYPE == tl.float16:
            types: tl.constexpr = (tl.float16, tl.float16, tl.float16, tl.float16)
            return tl.inline_asm_elementwise(_ASM_2_F16, _CON_2, [c], types, is_pure=True, pack=4)
        else:
            types: tl.constexpr = (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16)
            return tl.inline_asm_elementwise(_ASM_2_BF16, _CON_2, [c], types, is_pure=True, pack=4)
    elif ASM and BITS == 8:
        if DTYPE == tl.float16:
            return (tl.inline_asm_elementwise(_ASM_8_F16, _CON_8, [c], tl.float16, is_pure=True, pack=4),)
        else:
            return (tl.inline_asm_elementwise(_ASM_8_BF16, _CON_8, [c], tl.bfloat16, is_pure=True, pack=4),)
    elif BITS == 8:
        return (weights_part(c, h, j, 0, BITS, DTYPE),)
    elif BITS == 4:
        return (weights_part(c, h, j, 0, BITS, DTYPE), weights_part(c, h, j, 1, BITS, DTYPE))
    elif BITS == 1:
        return (
            weights_part(c, h, j, 0, BITS, DTYPE),
            weights_part(c, h, j, 1, BITS, DTYPE),
            weights_part(c, h, j, 2, BITS, DTYPE),
            weights_part(c, h, j, 3, BITS, DTYPE),
            weights_part(c, h, j, 4, BITS, DTYPE),
            weights_part(c, h, j, 5, BITS, DTYPE),
            weights_part(c, h, j, 6, BITS, DTYPE),
            weights_part(c, h, j, 7, BITS, DTYPE),
        )
    else:
        return (
            weights_part(c, h, j, 0, BITS, DTYPE),
            weights_part(c, h, j, 1, BITS, DTYPE),
            weights_part(c, h, j, 2, BITS, DTYPE),
            weights_part(c, h, j, 3, BITS, DTYPE),
        )


@triton.jit
def _top_part(h, r: tl.constexpr, DTYPE: tl.constexpr):
    q = (h >> r) & 1
    if DTYPE == tl.float32:
        return q.to(tl.float32) * 4.0
    elif DTYPE == tl.float16:
        return ((q.to(tl.int16) << 5) | 0x5800).to(tl.float16, bitcast=True)
    else:
        return ((q.to(tl.int16) << 2) | 0x4300).to(tl.bfloat16, bitcast=True)


@triton.jit
def unpack_top(h, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The eight parts of the 3-bit layout's plane of top bits, worth 4 each, with unpack's OFFSET for 2 bits."""
    if ASM and DTYPE == tl.float16:
        types: tl.constexpr = (tl.float16,) * 8
        return tl.inline_asm_elementwise(_ASM_TOP_F16, _CON_1, [h], types, is_pure=True, pack=4)
    elif ASM:
        types: tl.constexpr = (tl.bfloat16,) * 8
        return tl.inline_asm_elementwise(_ASM_TOP_BF16, _CON_1, [h], types, is_pure=True, pack=4)
    else:
        return (
            _top_part(h, 0, DTYPE),
            _top_part(h, 1, DTYPE),
            _top_part(h, 2, DTYPE),
            _top_part(h, 3, DTYPE),
            _top_part(h, 4, DTYPE),
            _top_part(h, 5, DTYPE),
            _top_part(h, 6, DTYPE),
            _top_part(h, 7, DTYPE),
        )


@triton.jit
def ones_like_codes(c, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Ones in the shape of `c`. On NVIDIA they claim to come from `c`, so that they get its layout: another
    one would have x laid out twice."""
    if ASM and DTYPE == tl.float16:
        return tl.inline_asm_elementwise(_ONES_F16, _CON_8, [c], tl.float16, is_pure=True, pack=4)
    elif ASM and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(_ONES_BF16, _CON_8, [c], tl.bfloat16, is_pure=True, pack=4)
    else:
        return tl.full(c.shape, 1.0, DTYPE)


@triton.jit
def dot_pieces(w, x, acc, DOT: tl.constexpr):
    """acc + w @ x, where a float32 `x` meets a bfloat16 `w` in three bfloat16 pieces (24 bits, so exact)."""
    if x.dtype == tl.float32 and DOT == tl.bfloat16:
        x1 = x.to(tl.bfloat16)
        rest = x - x1.to(tl.float32)
        x2 = rest.to(tl.bfloat16)
        x3 = (rest - x2.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(w, x3, acc)
        acc = tl.dot(w, x2, acc)
        return tl.dot(w, x1, acc)
    else:
        return tl.dot(w, x.to(DOT), acc, input_precision="ieee")


@triton.jit
def split_inputs(x, PER: tl.constexpr):
    """`x [A, B, J * PER]` -> PER tensors `[A, B, J]`: part r holds the inputs r, r + PER, ..."""
    if PER == 1:
        return (x,)
    else:
        a, b = tl.split(x.reshape(x.shape[0], x.shape[1], x.shape[2] // 2, 2))
        if PER == 2:
            return (a, b)
        else:
            a0, a2 = tl.split(a.reshape(a.shape[0], a.shape[1], a.shape[2] // 2, 2))
            a1, a3 = tl.split(b.reshape(b.shape[0], b.shape[1], b.shape[2] // 2, 2))
            if PER == 4:
                return (a0, a1, a2, a3)
            else:
                b0, b4 = tl.split(a0.reshape(a0.shape[0], a0.shape[1], a0.shape[2] // 2, 2))
                b1, b5 = tl.split(a1.reshape(a1.shape[0], a1.shape[1], a1.shape[2] // 2, 2))
                b2, b6 = tl.split(a2.reshape(a2.shape[0], a2.shape[1], a2.shape[2] // 2, 2))
                b3, b7 = tl.split(a3.reshape(a3.shape[0], a3.shape[1], a3.shape[2] // 2, 2))
                return (b0, b1, b2, b3, b4, b5, b6, b7)
