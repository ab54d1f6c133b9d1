"""Grids: stored scales, ranges, searches, round to nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.algorithms.grid import AffineGrid, check_range, encode, minmax, search_grid, store_scale
from quantkit.algorithms.rtn import fit_groups, rtn_quantize
from quantkit.encoding import dequantize, pack_affine
from quantkit.errors import NumericsError

BITS = [2, 3, 4, 8]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int, weigh=None
) -> torch.Tensor:
    s, z = scale.unsqueeze(1), zero.unsqueeze(1)
    wrong = ((encode(groups, s, z, top) - z) * s - groups) ** 2
    return (wrong if weigh is None else wrong * weigh).sum(1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_minmax_matches_textbook(bits: int, symmetric: bool) -> None:
    groups = random(50, 32) + 0.3
    scale, zero = minmax(groups, AffineGrid(bits, symmetric=symmetric, scale_dtype=torch.float32))
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    top = 2**bits - 1
    if symmetric:
        torch.testing.assert_close(scale, 2 * groups.abs().amax(1) / top)
        assert bool((zero == 2 ** (bits - 1)).all())
    else:
        torch.testing.assert_close(scale, (high - low) / top)
        assert torch.equal(zero, torch.round(-low / scale))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_searches_never_lose_to_minmax(bits: int, symmetric: bool) -> None:
    groups = random(64, 64) * 0.02
    weigh = random(64, seed=1).abs() + 0.01
    grid = AffineGrid(bits, symmetric=symmetric)
    base = error(groups, *minmax(groups, grid), grid.top)
    found = search_grid(groups, AffineGrid(bits, symmetric=symmetric, search="mse"))
    assert bool((error(groups, *found, grid.top) <= base * (1 + 1e-6)).all())
    assert float(error(groups, *found, grid.top).sum()) < float(base.sum())
    weighted = search_grid(groups, grid, weigh)
    assert float(error(groups, *weighted, grid.top, weigh).sum()) < float(
        error(groups, *found, grid.top, weigh).sum()
    )


def test_signed_scale_halves_two_bit_error_of_a_one_sided_group() -> None:
    groups = random(256, 64).abs() * torch.where(torch.arange(256) % 2 == 0, 1.0, -1.0).unsqueeze(1)
    found = {
        signed: float(error(groups, *search_grid(groups, AffineGrid(2, signed_scale=signed)), 3).sum())
        for signed in (True, False)
    }
    assert found[True] < 0.75 * found[False]


def test_positive_scales_only_when_asked() -> None:
    scale, _ = search_grid(random(100, 32), AffineGrid(2, signed_scale=False))
    assert bool((scale > 0).all())


def test_least_zero_is_respected() -> None:
    groups = random(100, 32).abs()  # wants a zero of 0
    _, zero = search_grid(groups, AffineGrid(4, symmetric=False))
    assert bool((zero == 0).any())
    for search in ("minmax", "mse", "importance"):
        _, zero = search_grid(groups, AffineGrid(4, symmetric=False, least_zero=1, search=search))
        assert int(zero.min()) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_scales_survive_their_dtype(dtype: torch.dtype) -> None:
    scale = torch.tensor([0.0, 1e-30, 1e30, -1e-30, 0.1, -0.1, 65519.0])
    stored = store_scale(scale, dtype)
    assert torch.equal(stored, stored.to(dtype).float())
    assert bool(torch.isfinite(stored).all()) and bool((stored != 0).all())
    assert bool((stored.sign() == torch.where(scale < 0, -1.0, 1.0)).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.25, -0.25, 7e-6, 1e4])
def test_constant_rows(bits: int, symmetric: bool, value: float) -> None:
    weight = torch.full((3, 64), value)
    codes, scale, zero = rtn_quantize(weight, 32, AffineGrid(bits, symmetric=symmetric))
    dense = dequantize(pack_affine(codes, scale, zero.to(torch.uint8), bits, 32))
    tolerance = abs(value) * 2e-3 + 1e-7  # one float16 scale
    assert float((dense - weight).abs().max()) <= tolerance


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_weights_beyond_the_grid_are_refused(bad: float) -> None:
    weight = random(4, 32)
    weight[2, 3] = bad
    with pytest.raises(NumericsError, match="a weight is"):
        rtn_quantize(weight, 32, AffineGrid(4))
    check_range(torch.empty(0, 4), AffineGrid(4))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 90),
    group=st.integers(1, 40),
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    magnitude=st.floats(1e-5, 1e3),
)
def test_rtn_any_shape(n: int, k: int, group: int, bits: int, symmetric: bool, magnitude: float) -> None:
    weight = random(n, k, seed=k) * magnitude
    grid = AffineGrid(bits, symmetric=symmetric, search="minmax")
    codes, scale, zero = rtn_quantize(weight, group, grid)
    packed = pack_affine(codes, scale, zero.to(torch.uint8), bits, group)
    dense = dequantize(packed)
    # Within half a step, except at the top of a symmetric grid, which is one level short; and a float16 scale
    # below 2**-14 is itself rounded to multiples of 2**-24, an error that the top level has `top` times.
    step = scale.abs()[:, torch.arange(k) // group]
    stored = (2**bits - 1) * 2.0**-25
    assert bool(((dense - weight).abs() <= step * 1.01 + stored + 1e-7).all())
    importance = random(k, seed=1).abs()
    again, _ = fit_groups(weight, group, AffineGrid(bits, symmetric=symmetric), importance)
    assert again.shape == scale.shape
