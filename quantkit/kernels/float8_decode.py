"""e4m3 bytes to float16 or bfloat16 in registers, by integer arithmetic (Triton): any chip, no conversions.

    e4m3   s eeee mmm            value = (-1)^s * 2^(e-7) * 1.mmm        (e = 0: 0.mmm * 2^-6)
    fp16   s 0eeee mmm0000000    the same bits one place lower under the sign: value * 2^-8
    bf16   s 0000eeee mmm0000    four places lower: value * 2^-120

Subnormal codes come out right as well, as subnormal halves. In float16 the factor 2^8 joins the scale of the
accumulator (`RESCALE`), so that decoding costs two integer instructions a weight; in bfloat16 the values
would be too small to accumulate, and one multiplication by 2^120 for two weights brings them back.
The two NaN codes (0x7f, 0xff) decode to 480: `dequantize_float8` alone keeps them NaN.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


def _decode_asm(bf16: bool) -> str:
    """PTX for one register of 4 bytes ($2): outputs $0 = bytes 0, 1 and $1 = bytes 2, 3."""
    shift, mask = (4, 0x07F0) if bf16 else (1, 0x3F80)
    lines = [".reg .b32 a, t, zero;"]
    for out, select in ((0, "0x1404"), (1, "0x3424")):
        lines += [
            f"prmt.b32 a, $2, 0, {select};",  # byte << 8 in each half
            f"shr.b32 t, a, {shift};",
            f"and.b32 t, t, 0x{mask:04x}{mask:04x};",
            f"lop3.b32 {'t' if bf16 else f'${out}'}, a, 0x80008000, t, 0xea;",
        ]
        if bf16:
            lines += [
                "mov.b32 a, 0x7b807b80; mov.b32 zero, 0x80008000;",  # 2^120 and -0, twice
                f"fma.rn.bf16x2 ${out}, t, a, zero;",
            ]
    return "{ " + " ".join(lines) + " }"


_ASM_F16 = tl.constexpr(_decode_asm(False))
_ASM_BF16 = tl.constexpr(_decode_asm(True))


@triton.jit
def decode(c, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Bytes `c` in DTYPE; in float16 divided by 256 (see `rescale`)."""
    if ASM and tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(_ASM_F16, "=r,=r,r", [c], tl.float16, is_pure=True, pack=4)
    elif ASM and tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(_ASM_BF16, "=r,=r,r", [c], tl.bfloat16, is_pure=True, pack=4)
    else:
        wide = c.to(tl.int16)
        half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
        if tl.float16 == DTYPE:
            return half
        else:
            return (half.to(tl.float32) * 256.0).to(DTYPE)


@triton.jit
def rescale(DTYPE: tl.constexpr):
    """What to multiply a sum of decoded weights by."""
    if tl.float16 == DTYPE:
        return 256.0
    else:
        return 1.0
