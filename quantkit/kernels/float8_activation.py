"""Activations rounded to e4m3 with a scale per token, per 128 inputs of a token, or a given one (Triton).

    per token       s = max(max|x|, 1e-12) / 448       over the row
    per 128 inputs  the same over each group of 128
    static          s given
    q = e4m3(clamp(x / s, -448, 448)),    round to nearest, ties to even

q is stored as e4m3 bytes, or as its exact value in float16, bfloat16 or float32 (every e4m3 number is one of
each), which is what `float8_gemm` multiplies. Rounding is integer arithmetic on the float32's bits: the
same on every chip, and in the interpreter.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_e4m3(x):
    """float32 (|x| <= 448) to the nearest e4m3 value, as float32.

    The mantissa keeps 3 bits; below 2^-6 the step is 2^-9. Adding and subtracting 1.5 * 2^23 steps rounds to a
    multiple of the step, ties to even, because float32 addition does.
    """
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 255  # biased by 127
    exponent = tl.maximum(exponent, 127 - 6)
    magic = (((exponent - 3 + 23) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return (x + magic) - magic


@triton.jit
def round_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    K,
    x_stride,
    scale_stride,
    group_stride,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STATIC: tl.constexpr,
):
    """One program per row of x. GROUP inputs share a scale; 0: the whole row (BLOCK >= K).

    q `[M, K]`: e4m3 codes (float8 pointer) or their values. scale `[M, ceil(K / GROUP)]` float32, written
    unless STATIC, where its one element is read; rows are `scale_stride` apart, groups `group_stride`.
    """
    row = tl.program_id(0).to(tl.int64)
    if GROUP == 0:
        k = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        if STATIC:
            scale = tl.load(scale_ptr).to(tl.float32)
        else:
            scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-12) / 448.0
            tl.store(scale_ptr + row * scale_stride, scale)
        q = round_e4m3(tl.clamp(x / scale, -448.0, 448.0))
        tl.store(q_ptr + row * K + k, q.to(q_ptr.dtype.element_ty), mask=k < K)
    else:
        GROUPS: tl.constexpr = BLOCK // GROUP
        g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        k = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-12) / 448.0
        q = round_e4m3(tl.clamp(x / scale[:, None], -448.0, 448.0))
        tl.store(scale_ptr + row * scale_stride + g * group_stride, scale, mask=g * GROUP < K)
        tl.store(q_ptr + row * K + k, q.to(q_ptr.dtype.element_ty), mask=k < K)
