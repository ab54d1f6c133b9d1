"""The HQQ solver: never worse than its start, near the best found by brute force, safe at the edges."""

from __future__ import annotations

import itertools

import pytest
import torch

from quantkit.algorithms.hqq import GroupFit, fit_groups
from quantkit.errors import NumericsError

BITS = (8, 4, 3, 2, 1)


def weights(rows: int = 96, group: int = 64, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, group, generator=generator)
    heavy = torch.rand(rows, group, generator=generator) < 0.02
    return (normal + heavy * normal * 4) * scale


def errors(w: torch.Tensor, fit: GroupFit, norm: float = 2.0) -> torch.Tensor:
    """Sum of |error|^norm per group, in float64."""
    dense = (fit.codes.double() - fit.zero.double()[:, None]) * fit.scale.double()[:, None]
    return (w.double() - dense).abs().pow(norm).sum(1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_group_is_worse_than_the_min_max_start(bits: int, dtype: torch.dtype) -> None:
    w = weights()
    start = errors(w, fit_groups(w, bits, optimize=False, dtype=dtype))
    solved = errors(w, fit_groups(w, bits, dtype=dtype))
    assert (solved <= start * (1 + 1e-5)).all()
    assert solved.sum() < (1.0 if bits == 8 else 0.85) * start.sum()


@pytest.mark.parametrize("norm", [0.7, 1.0])
def test_smaller_norms_lower_their_own_error(norm: float) -> None:
    w = weights()
    for bits in (4, 2):
        start = errors(w, fit_groups(w, bits, optimize=False), norm)
        solved = errors(w, fit_groups(w, bits, norm=norm), norm)
        assert (solved <= start * (1 + 1e-4)).all()
        assert solved.sum() < 0.95 * start.sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_close_to_a_dense_search(bits: int) -> None:
    """Within 3 % of the best of 40 x 40 clipped ranges, each with its least-squares scale and zero."""
    w = weights(rows=32).double()
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    top = 2**bits - 1
    best = torch.full((len(w),), torch.inf, dtype=torch.float64)
    for i, j in itertools.product(range(40), repeat=2):
        lo, hi = low * (1 - i / 60), high * (1 - j / 60)
        scale = (hi - lo) / top
        q = (w / scale - lo / scale).round().clamp(0, top)
        centred = q - q.mean(1, keepdim=True)
        slope = (centred * w).sum(1, keepdim=True) / centred.square().sum(1, keepdim=True)
        dense = w.mean(1, keepdim=True) + centred * slope
        best = torch.minimum(best, (w - dense).square().sum(1))
    solved = errors(w.float(), fit_groups(w.float(), bits, dtype=torch.float32, unbiased=False))
    assert solved.sum() < 1.03 * best.sum()


def test_codes_are_nearest_for_the_stored_scale_and_zero() -> None:
    w = weights(rows=16)
    fit = fit_groups(w, 3, unbiased=False)
    grid = (torch.arange(8).double() - fit.zero.double()[:, None]) * fit.scale.double()[:, None]
    distance = (w.double()[:, :, None] - grid[:, None, :]).abs()
    chosen = distance.gather(2, fit.codes.long()[:, :, None])[..., 0]
    assert torch.allclose(chosen, distance.amin(2), atol=1e-9)


@pytest.mark.parametrize("bits", [4, 3, 2, 1])
def test_unbiased_groups_keep_their_length_along_the_weight(bits: int) -> None:
    w = weights()
    projections = {}
    for unbiased in (True, False):
        fit = fit_groups(w, bits, unbiased=unbiased)
        dense = (fit.codes.double() - fit.zero.double()[:, None]) * fit.scale.double()[:, None]
        projections[unbiased] = (w.double() * dense).sum(1) / w.double().square().sum(1)
    plain, best = fit_groups(w, bits), fit_groups(w, bits, unbiased=False)
    assert torch.equal(plain.codes, best.codes) and torch.equal(plain.zero, best.zero)
    assert (projections[False] < 1).all()
    exact = (projections[True] - 1).abs() < 1e-3
    assert exact.double().mean() > 0.8  # the others would have become worse than their start
    assert 1 < errors(w, plain).sum() / errors(w, best).sum() < {4: 1.03, 3: 1.1, 2: 1.35, 1: 2.0}[bits]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("optimize", [True, False])
def test_constant_and_zero_groups_are_exact(bits: int, optimize: bool) -> None:
    w = torch.tensor([0.0, 0.5, -0.25, 3.0]).repeat_interleave(16).view(4, 16)
    fit = fit_groups(w, bits, optimize=optimize)
    dense = (fit.codes.float() - fit.zero.float()[:, None]) * fit.scale.float()[:, None]
    assert torch.equal(dense, w)
    assert (fit.scale > 0).all()


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e-3, 1.0, 1e3])
def test_any_magnitude_gives_finite_scales(scale: float) -> None:
    w = weights(scale=scale)
    for bits in BITS:
        fit = fit_groups(w, bits)
        assert torch.isfinite(fit.scale).all() and torch.isfinite(fit.zero).all() and (fit.scale > 0).all()
        assert errors(w, fit).sum() <= w.double().square().sum() * (1 + 1e-6)


def test_a_narrow_range_far_from_zero_is_not_lost_to_the_zero() -> None:
    """hqq's zero would be -15000 here, where float16 has steps of 8."""
    w = 1.0 + torch.rand(8, 64, generator=torch.Generator().manual_seed(1)) * 1e-3
    for optimize in (True, False):
        assert (
            errors(w, fit_groups(w, 4, optimize=optimize)).sum() / w.double().square().sum()
        ).sqrt() < 1e-2


def test_round_zero_gives_codes_as_zeros() -> None:
    for bits in (4, 2):
        w = weights() + 0.03
        fit = fit_groups(w, bits, round_zero=True)
        assert torch.equal(fit.zero, fit.zero.round())
        assert fit.zero.min() >= 0 and fit.zero.max() <= 2**bits - 1
        assert errors(w, fit).sum() <= errors(w, fit_groups(w, bits, round_zero=True, optimize=False)).sum()


def test_odd_group_lengths_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights(rows=37, group=63)
    whole = fit_groups(w, 2)
    monkeypatch.setattr("quantkit.algorithms.hqq._ELEMENTS", {"cpu": 63 * 5, "other": 63 * 5})
    parts = fit_groups(w, 2)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale, parts.scale) and torch.equal(whole.zero, parts.zero)
    single = fit_groups(torch.tensor([[0.3], [-2.0]]), 4)
    assert errors(torch.tensor([[0.3], [-2.0]]), single).max() < 1e-6


def test_the_weight_is_not_modified_and_the_result_is_deterministic() -> None:
    w = weights()
    before = w.clone()
    first, second = fit_groups(w, 4), fit_groups(w, 4)
    assert torch.equal(w, before)
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)


def test_weights_beyond_float16_are_refused_with_what_to_do() -> None:
    w = torch.tensor([[-3e38, 3e38]])
    with pytest.raises(NumericsError, match=r"float16.*compute_dtype"):
        fit_groups(w, 4)
    with pytest.raises(ValueError, match="bits 7"):
        fit_groups(weights(), 7)


def test_other_devices() -> None:
    """Runs on an accelerator where there is one; the meta device would not do."""
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator")
    w = weights()
    device = torch.accelerator.current_accelerator()
    fit = fit_groups(w.to(device), 3)
    assert fit.codes.device.type == fit.scale.device.type == device.type
    cpu = fit_groups(w, 3)
    moved = GroupFit(fit.codes.cpu(), fit.scale.cpu(), fit.zero.cpu())
    assert errors(w, moved).sum() < errors(w, cpu).sum() * 1.001


@pytest.mark.peer
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_better_than_hqq_at_equal_size(bits: int, dtype: torch.dtype) -> None:
    quantize = pytest.importorskip("hqq.core.quantize")
    w = weights(rows=512)
    for round_zero in (True, False):
        codes, meta = quantize.Quantizer.quantize(
            w, nbits=bits, group_size=64, axis=1, round_zero=round_zero, bitpack=False, device="cpu"
        )
        theirs = GroupFit(codes, meta["scale"][:, 0].to(dtype), meta["zero"][:, 0].to(dtype))
        for unbiased, limits in (
            (True, {8: 1.0, 4: 0.97, 3: 0.95, 2: 0.92, 1: 1.0}),
            (False, {8: 1.0, 4: 0.97, 3: 0.92, 2: 0.85, 1: 0.8}),
        ):
            ours = fit_groups(w, bits, dtype=dtype, unbiased=unbiased)
            assert (errors(w, ours).sum() / errors(w, theirs).sum()).sqrt() < limits[bits]
