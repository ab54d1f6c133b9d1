"""The arithmetic of affine weights on Hopper: who gets which; what it rests on, recomputed in float64; and its inline
PTX, run on numpy arrays, against `(q - zero) * scale`. (Compiled kernels on a device: `scripts/check_wide_gpu.py`.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gluon_values import Values, plain, run_ptx
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from triton.experimental.gluon import language as gl

from quantkit.kernels import wide_hopper_affine, wide_hopper_decode, wide_hopper_dx_decode
from quantkit.kernels.wide_hopper_affine import (
    FLOATS,
    PAIRS,
    SCALED,
    SPLIT,
    arithmetic,
    divisor,
    in_pairs,
    offsets,
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
        (AFFINE_8, gl.bfloat16, gl.float16, gl.float16, SCALED),
        (
            AFFINE_8,
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
            FLOATS,
        ),  # of 2 ** 31 and more, times a power of two?
        (AFFINE_8, gl.bfloat16, gl.bfloat16, gl.int8, FLOATS),  # differences of 257 and more
        (AFFINE_4, gl.bfloat16, gl.float16, gl.int32, FLOATS),
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
    for scale in (HALVES[index], HALVES[-len(index) :]):
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


DECODE, AFFINE, COLUMNS = map(plain, (wide_hopper_decode, wide_hopper_affine, wide_hopper_dx_decode))
COLUMNS["product_asm"] = AFFINE["product_asm"]  # with the names of its own module


class Kind16:
    """A dtype as the functions of Gluon ask it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.name = "bfloat16" if dtype == torch.bfloat16 else "float16"

    def is_bf16(self) -> bool:
        return self.name == "bfloat16"

    def __eq__(self, other: object) -> bool:
        return self.name == other

    __hash__ = None  # type: ignore[assignment]


def halves(registers: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Registers of two numbers, as the numbers `[..., 2]`."""
    both = np.stack([registers & 0xFFFF, registers >> 16], -1).astype(np.uint16)
    return torch.from_numpy(both.view(np.int16)).view(dtype)


def doubled(number: Values, dtype: torch.dtype) -> np.ndarray:
    """A number in both halves of a register; it must be one of `dtype`."""
    exact = torch.from_numpy(np.array(number.array, np.float32))
    kept = exact.to(dtype)
    assert torch.equal(kept.float(), exact)
    bits = kept.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    return bits | bits << np.uint32(16)


ROWS = 96
CASES = [
    (AFFINE_4, torch.bfloat16, torch.bfloat16, PAIRS), (AFFINE_4, torch.float16, torch.float16, PAIRS),
    (AFFINE_4, torch.bfloat16, torch.float16, SPLIT), (AFFINE_8, torch.bfloat16, torch.bfloat16, PAIRS),
    (AFFINE_8, torch.float16, torch.float16, PAIRS),
]  # fmt: skip


def random_rows(kind: Any, scales: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[ROWS, 64]`, scales and zeros `[ROWS]`."""
    generator = torch.Generator().manual_seed(kind.value)
    most = 15 if kind is AFFINE_4 else 255
    codes = torch.randint(0, most + 1, (ROWS, 64), generator=generator)
    scale = (torch.randn(ROWS, generator=generator) * 0.02).to(scales)
    return codes, scale, torch.randint(0, most + 1, (ROWS,), generator=generator)


def packed_bytes(kind: Any, codes: Tensor) -> np.ndarray:
    units = codes if kind is AFFINE_8 else codes[:, ::2] | codes[:, 1::2] << 4
    return units.to(torch.uint8).numpy()


@pytest.mark.parametrize(("kind", "dtype", "scales", "how"), CASES)
def test_pairs_of_a_row(kind: Any, dtype: torch.dtype, scales: torch.dtype, how: Any) -> None:
    """Every thread's two of every eight inputs."""
    codes, scale, zero = random_rows(kind, scales)
    words = packed_bytes(kind, codes).view(np.uint32)
    words = words.reshape(ROWS, 8, 1, 1) if kind is AFFINE_4 else words.reshape(ROWS, 8, 2, 1)
    place, _ = DECODE["_places"](None, kind.value, how.value, ROWS, None)
    s, z = Values(scale.float().numpy()), Values(zero.float().numpy())
    first, second, last = AFFINE["affine_numbers"](s, z, kind.value, how.value, Kind16(dtype))
    added = doubled(first, dtype)
    if how is PAIRS and dtype == torch.float16 and kind is AFFINE_4:
        added = added & np.uint32(0xFFFF) | doubled(second, dtype) & np.uint32(0xFFFF0000)
    rest = doubled(second, dtype) if how is SPLIT else added
    of_rows = [a.reshape(ROWS, 1, 1, 1) for a in (added, rest, doubled(last, dtype))]
    asm = DECODE["pairs_asm"](kind.value, how.value, Kind16(dtype))
    [out] = run_ptx(asm, np.broadcast_arrays(words, place.array, *of_rows), 1)
    got = halves(out, dtype).reshape(ROWS, 64).double()
    by = 64 if dtype == torch.bfloat16 else 1
    want = ((codes - zero[:, None]).double() * scale.double()[:, None]).to(dtype).double()
    assert torch.equal(got * by, want)


@pytest.mark.parametrize(("kind", "dtype", "scales", "how"), CASES)
def test_pairs_of_two_rows(kind: Any, dtype: torch.dtype, scales: torch.dtype, how: Any) -> None:
    """Units of 16 bits of neighbouring rows, as the gradient has them: a register holds both rows' numbers."""
    codes, scale, zero = random_rows(kind, scales)
    units = packed_bytes(kind, codes).view(np.uint16).astype(np.uint32)
    both = units[::2] | units[1::2] << np.uint32(16)
    s, z = Values(scale.float().numpy()), Values(zero.float().numpy())
    first, second, last = AFFINE["affine_numbers"](s, z, kind.value, how.value, Kind16(dtype))
    lines = []
    for number in (first, last, second if how is SPLIT else first):
        bits = doubled(number, dtype)
        lines.append((bits[::2] & np.uint32(0xFFFF) | bits[1::2] & np.uint32(0xFFFF0000)).reshape(-1, 1))
    asm = COLUMNS["pairs_asm"](kind.value, how.value, Kind16(dtype))
    got = torch.zeros(ROWS, 64, dtype=torch.float64)
    wide = 2 if kind is AFFINE_4 else 1
    for b in range(wide):
        shift = np.full((1, 1), 8 * b, np.uint32)
        arguments = np.broadcast_arrays(both, shift, shift, *lines)
        for h, out in enumerate(run_ptx(asm, arguments, 2)):
            of_rows = halves(out, dtype).permute(0, 2, 1).reshape(ROWS, -1)
            got[:, 2 * b + h :: 2 * wide] = of_rows.double()
    by = 64 if dtype == torch.bfloat16 else 1
    want = ((codes - zero[:, None]).double() * scale.double()[:, None]).to(dtype).double()
    assert torch.equal(got * by, want)


@pytest.mark.parametrize("how", [SCALED, FLOATS])
@pytest.mark.parametrize("kind", [AFFINE_4, AFFINE_8])
def test_codes_in_bits_of_float32(kind: Any, how: Any) -> None:
    """Of a row, and of two rows: subnormal codes times `powers`, or codes beside `offsets`."""
    codes, _, _ = random_rows(kind, torch.float16)
    words = packed_bytes(kind, codes).view(np.uint32)
    words = words.reshape(ROWS, 8, 1, 1) if kind is AFFINE_4 else words.reshape(ROWS, 8, 2, 1)
    place, other = DECODE["_places"](None, kind.value, how.value, ROWS, None)
    asm = AFFINE["floats_asm"](kind.value, how.value)
    outs = run_ptx(asm, np.broadcast_arrays(words, place.array, other.array), 2)
    for half, out in enumerate(outs):
        assert np.array_equal(as_codes(out, kind, how, half), codes.numpy()[:, half::2].reshape(out.shape))
    units = packed_bytes(kind, codes).view(np.uint16).astype(np.uint32)
    both = units[::2] | units[1::2] << np.uint32(16)
    asm = COLUMNS["floats_asm"](kind.value, how.value)
    wide = 2 if kind is AFFINE_4 else 1
    for b in range(wide):
        shifts = [np.full((1, 1), v, np.uint32) for v in (12 - 8 * b, 12 - 8 * b, 8 * b + 4, 8 * b + 4)]
        outs = run_ptx(asm, np.broadcast_arrays(both, *shifts), 4)
        for i, out in enumerate(outs):
            half, row = divmod(i, 2)
            want = codes.numpy()[row::2, 2 * b + half :: 2 * wide]
            assert np.array_equal(as_codes(out, kind, how, half), want)


def as_codes(bits: np.ndarray, kind: Any, how: Any, half: int) -> np.ndarray:
    values = np.ascontiguousarray(bits).view(np.float32).astype(np.float64)
    if how is SCALED:
        return values * powers(kind.value)[half] * 2.0**40
    return values - offsets(kind.value)[half]
