"""The arithmetic of affine weights on Hopper: what it rests on, recomputed in float64; who gets which.

That the kernels compute so only a device shows: `scripts/check_wide_gpu.py` (W bit for bit).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from triton.experimental.gluon import language as gl

from quantkit.kernels.wide_hopper_affine import (
    FLOATS,
    PAIRS,
    SCALED,
    SPLIT,
    arithmetic,
    divisor,
    in_pairs,
    powers,
)
from quantkit.kernels.wide_hopper_kinds import AFFINE_4, AFFINE_8

#: Every positive finite number of float16; of bfloat16 from 2 ** -60 to 2 ** 20.
HALVES = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).double()
BRAINS = torch.arange((127 - 60) << 7, (127 + 20) << 7, 3, dtype=torch.int16).view(torch.bfloat16).double()


@pytest.mark.parametrize(
    ("kind", "dtype", "scale", "zero", "how"),
    [
        (AFFINE_4, gl.bfloat16, gl.bfloat16, gl.uint8, PAIRS),
        (AFFINE_8, gl.float16, gl.float16, gl.uint8, PAIRS),
        (AFFINE_4, gl.bfloat16, gl.float16, gl.uint8, SPLIT),
        (AFFINE_8, gl.bfloat16, gl.float16, gl.uint8, SCALED),
        (AFFINE_4, gl.bfloat16, gl.float16, gl.float16, SCALED),
        (AFFINE_8, gl.bfloat16, gl.bfloat16, gl.bfloat16, SCALED),
        (AFFINE_4, gl.float16, gl.float16, gl.float16, FLOATS),
        (AFFINE_8, gl.float16, gl.bfloat16, gl.uint8, FLOATS),
        (AFFINE_4, gl.bfloat16, gl.float32, gl.uint8, FLOATS),
        (AFFINE_4, gl.bfloat16, gl.float16, gl.float32, FLOATS),
    ],
)
def test_dtypes_choose(kind: Any, dtype: Any, scale: Any, zero: Any, how: Any) -> None:
    assert arithmetic(kind.value, dtype, scale, zero) == how.value
    expected = 2.0**40 if how is SCALED else 2.0**6 if in_pairs(how.value) and dtype is gl.bfloat16 else 1.0
    assert divisor(kind.value, dtype, scale, zero) == expected


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """float64, in numbers of `dtype`: of float64 that `exact` fits in, so this is the only rounding."""
    return exact.to(dtype).double()


@pytest.mark.parametrize(("most", "scales"), [(15, BRAINS), (255, BRAINS), (15, HALVES), (255, HALVES)])
def test_pairs_round_once(most: int, scales: Tensor) -> None:
    """q - zero is a number of 16 bits, also divided by 64, and so is no intermediate result rounded."""
    dtype = torch.bfloat16 if scales is BRAINS else torch.float16
    difference = torch.arange(-255.0, most + 1.0, dtype=torch.float64)
    for exact in (difference, difference / 64) if dtype == torch.bfloat16 else (difference,):
        assert torch.equal(rounded(exact, dtype), exact)
    product = difference[:, None] * scales
    assert torch.equal(product.float().double(), product), "`dequantize` rounds once, too"


def test_split_scales_round_once() -> None:
    """d * scale = d * large + d * small, where d * small is exact in bfloat16."""
    large = (HALVES.float().view(torch.int32) & -0x10000).view(torch.float32).double()
    small = HALVES - large
    assert torch.equal(rounded(large, torch.bfloat16), large)
    assert bool((small != 0).any()) and torch.equal(rounded(small, torch.bfloat16), small)
    for d in range(-16, 16):
        rest = d / 64 * small
        assert torch.equal(rounded(rest, torch.bfloat16), rest)
        total = d / 64 * large + rest
        assert torch.equal(total, d / 64 * HALVES), "float64 holds it"
        assert torch.equal(rounded(total, torch.bfloat16) * 64, rounded(d * HALVES, torch.bfloat16))


@pytest.mark.parametrize("kind", [AFFINE_4, AFFINE_8])
def test_scaled_weights_are_those_of_dequantize(kind: Any) -> None:
    """fma(code, scale, -zero * scale) in float32, of subnormal codes and divided by a power of two, against
    (q - zero) * scale, rounded to bfloat16; every code, random scales, zeros of codes and between them."""
    first, second = powers(kind.value)
    # In float32 a code's bits stand for this much: first code, second code.
    values = (2.0**-137, 2.0**-133) if kind is AFFINE_4 else (2.0**-141, 2.0**-141)
    most = 15 if kind is AFFINE_4 else 255
    least = 2.0**-10 if kind is AFFINE_4 else 2.0**-6
    generator = torch.Generator().manual_seed(7)
    code = torch.arange(most + 1.0, dtype=torch.float64).view(-1, 1)
    index = torch.randint(0, len(HALVES), (200_000 // most,), generator=generator)
    for scale in (HALVES[index], BRAINS[index % len(BRAINS)]):
        zero = (torch.rand(len(scale), generator=generator) * most).clamp(min=least).half().double()
        for z in (zero, zero.round(), torch.zeros_like(zero)):
            for value, power in zip(values, (first, second)):
                times, plus = (scale.float() * power), -(z.float() * (scale.float() * 2.0**-40))
                assert bool(times.isfinite().all()) and torch.equal(plus.double() * 2.0**40, -z * scale)
                # Bits of code are subnormal: exact. The product and the sum fit in float64.
                total = (code * value) * times.double() + plus.double()
                got = total.float().bfloat16().double() * 2.0**40
                difference = (code - z).float()
                want = (difference * scale.float()).bfloat16().double()
                assert torch.equal(got, want)
