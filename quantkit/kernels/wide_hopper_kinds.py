"""Kinds of weights that the wide Hopper kernels decode (Gluon; see `wide_hopper`)."""

# mypy: ignore-errors
# Gluon's language is not Python's type system: jit functions are compiled, not called.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

#: Kinds of weights.
AFFINE_4 = gl.constexpr(4)
AFFINE_8 = gl.constexpr(8)
AFFINE_3 = gl.constexpr(3)
AFFINE_2 = gl.constexpr(2)
FLOAT8 = gl.constexpr(1)
TABLE_4 = gl.constexpr(0)


@gluon.constexpr_function
def bits_of(kind):
    """Bits of a code."""
    if kind in (AFFINE_2, AFFINE_3):
        return 2 if kind == AFFINE_2 else 3
    return 4 if kind in (AFFINE_4, TABLE_4) else 8


@gluon.constexpr_function
def is_affine(kind):
    """Has the weight zeros?"""
    return kind in (AFFINE_2, AFFINE_3, AFFINE_4, AFFINE_8)


@gluon.constexpr_function
def by_planes(kind):
    """Are codes of a turn of two steps copied together, and decoded by `wide_hopper_planes`?"""
    return kind in (AFFINE_2, AFFINE_3)


@gluon.constexpr_function
def pair_type(dtype):
    """What PTX calls two numbers of `dtype` in a register."""
    return "bf16x2" if dtype == gl.bfloat16 else "f16x2"
