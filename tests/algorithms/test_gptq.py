"""GPTQ against a float64 textbook loop, its improvements, its orders, and what breaks it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.algorithms.gptq import GPTQOptions, GPTQResult, gptq_quantize, inverse_factor
from quantkit.algorithms.grid import AffineGrid
from quantkit.algorithms.ordering import column_order, inverse_order, sort_within_groups
from quantkit.algorithms.quantizers import AffineColumns, CodebookColumns
from quantkit.algorithms.refine import descend_codes, refit_scales, row_errors
from quantkit.algorithms.rtn import rtn_quantize
from quantkit.errors import NumericsError

TOKENS = 400
PLAIN = GPTQOptions(group_size=32, ordering="natural", sweeps=0)


def layer(n: int = 24, k: int = 96, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g) * 0.05
    mix = torch.randn(k, k, generator=g) * torch.logspace(0, -1, k)[torch.randperm(k, generator=g)]
    inputs = torch.randn(TOKENS, k, generator=g) @ mix + torch.randn(k, generator=g)
    return weight, inputs.T @ inputs


def dense(result: GPTQResult, group_size: int, table: torch.Tensor | None = None) -> torch.Tensor:
    """The weight that codes stand for, `[N, K]`, written out independently of quantkit.encoding."""
    group = torch.arange(result.codes.shape[1]) // group_size
    if table is not None:
        level = table[result.codes.long()]
    else:
        assert result.zero is not None
        level = result.codes.float() - result.zero[:, group]
    value = level * result.scale[:, group]
    if result.perm is None:
        return value
    natural = torch.empty_like(value)
    natural[:, result.perm] = value
    return natural


def loss(weight: torch.Tensor, value: torch.Tensor, hessian: torch.Tensor) -> float:
    wrong = (weight - value).double()
    return float((wrong @ hessian.double() * wrong).sum())


def textbook(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, group_size: int, damp: float, order: list[int]
) -> torch.Tensor:
    """GPTQ as the paper's figure has it, unblocked, in float64, min/max symmetric scales in float16.

    Here the inverse Hessian is updated by Gaussian elimination after each column (OBQ), not by a
    Cholesky factor. Groups are runs of `order`. Returns codes `[N, K]` in the order of `order`.
    """
    work = weight.double()[:, order].clone()
    h = hessian.double()[order][:, order]
    h = h + damp * h.diagonal().mean() * torch.eye(h.shape[0], dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    codes = torch.empty_like(work)
    scale = torch.empty(0)
    for j in range(work.shape[1]):
        if j % group_size == 0:
            largest = work[:, j : j + group_size].abs().amax(1)
            scale = (2 * largest.float() / top).half().double()
        codes[:, j] = torch.clamp(torch.round(work[:, j] / scale) + middle, 0, top)
        error = (work[:, j] - (codes[:, j] - middle) * scale) / inverse[j, j]
        work[:, j:] -= error.unsqueeze(1) * inverse[j, j:]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ordering", ["natural", "groups", "activation"])
def test_same_codes_as_a_float64_textbook(bits: int, ordering: str) -> None:
    weight, hessian = layer()
    order = column_order(hessian.diagonal(), 32, ordering)  # type: ignore[arg-type]
    expected = textbook(weight, hessian, bits, 32, 0.05, order.tolist())
    options = dataclasses.replace(PLAIN, ordering=ordering)
    result = gptq_quantize(weight, hessian, TOKENS, options, AffineGrid(bits, search="minmax"))
    if ordering == "activation":
        assert result.perm is not None
        got = torch.empty_like(result.codes)
        got[:, inverse_order(order)[result.perm]] = result.codes
    else:
        assert result.perm is None
        got = result.codes[:, order]
    same = float((got.double() == expected).double().mean())
    assert same >= 0.998, same  # float32 against float64: a tie may fall the other way


def test_inverse_factor_is_the_upper_cholesky_factor_of_the_inverse() -> None:
    _, hessian = layer()
    hessian = hessian / hessian.diagonal().mean()
    before = hessian.clone()
    factor, damp = inverse_factor(hessian, 0.01)
    assert damp == 0.01 and torch.equal(hessian, before) and factor is not None
    damped = hessian.double() + 0.01 * torch.eye(96, dtype=torch.float64)
    torch.testing.assert_close(factor.double(), torch.linalg.cholesky(torch.linalg.inv(damped), upper=True))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_step_lowers_the_layer_error(bits: int, symmetric: bool) -> None:
    weight, hessian = layer(n=64)
    grid = AffineGrid(bits, symmetric=symmetric)
    base = AffineGrid(bits, symmetric=symmetric, search="minmax")
    codes, scale, zero = rtn_quantize(weight, 32, grid, hessian.diagonal())
    rtn = loss(weight, dense(GPTQResult(codes, scale, zero), 32), hessian)
    errors = [rtn]
    for options, used in (
        (PLAIN, base),
        (dataclasses.replace(PLAIN, ordering="groups"), grid),
        (dataclasses.replace(PLAIN, ordering="groups", sweeps=2), grid),
    ):
        result = gptq_quantize(weight, hessian, TOKENS, options, used)
        errors.append(loss(weight, dense(result, 32), hessian))
    assert min(errors[1:]) < 0.7 * errors[0]
    assert errors[1] > errors[2] > errors[3]


@pytest.mark.parametrize("ordering", ["natural", "groups", "activation"])
@pytest.mark.parametrize("block_size", [1, 7, 32, 1000])
def test_block_size_changes_nothing(ordering: str, block_size: int) -> None:
    weight, hessian = layer()
    results = [
        gptq_quantize(
            weight,
            hessian,
            TOKENS,
            dataclasses.replace(PLAIN, ordering=ordering, block_size=size, sweeps=1),
            AffineGrid(8, scale_dtype=torch.float32),
        )
        for size in (128, block_size)
    ]
    torch.testing.assert_close(dense(results[0], 32), dense(results[1], 32), atol=1.5e-3, rtol=0)
    assert float((results[0].codes == results[1].codes).float().mean()) > 0.97


def test_columns_stay_in_their_groups() -> None:
    diagonal = torch.tensor([1.0, 5, 2, 9, 3, 3, 7, 8, 4, 100])
    order = column_order(diagonal, 4, "groups")
    assert order.tolist() == [3, 1, 2, 0, 7, 6, 4, 5, 9, 8]  # the short group stays last
    assert column_order(diagonal, 4, "natural").tolist() == list(range(10))
    assert column_order(diagonal, 4, "activation").tolist() == [9, 3, 7, 6, 1, 8, 4, 5, 2, 0]
    perm, pick = sort_within_groups(column_order(diagonal, 4, "activation"), 4)
    assert perm.tolist() == [3, 6, 7, 9, 1, 4, 5, 8, 0, 2]
    assert torch.equal(column_order(diagonal, 4, "activation")[pick], perm)
    assert torch.equal(perm[inverse_order(perm)], torch.arange(10))
    assert column_order(diagonal, 16, "groups").tolist() == [9, 3, 7, 6, 1, 8, 4, 5, 2, 0]


@pytest.mark.parametrize("options", [{"static_groups": True}, {"group_size": -1}, {"group_size": 40}])
@pytest.mark.parametrize("ordering", ["natural", "groups", "activation"])
def test_group_variants(options: dict, ordering: str) -> None:
    weight, hessian = layer()
    merged = GPTQOptions(**{"group_size": 32, "ordering": ordering, "sweeps": 1, **options})
    result = gptq_quantize(weight, hessian, TOKENS, merged, AffineGrid(4))
    size = 96 if merged.group_size == -1 else merged.group_size
    assert (result.perm is None) == (ordering != "activation" or merged.static_groups)
    codes, scale, zero = rtn_quantize(weight, size, AffineGrid(4), hessian.diagonal())
    rtn = loss(weight, dense(GPTQResult(codes, scale, zero), size), hessian)
    assert loss(weight, dense(result, size), hessian) < 0.8 * rtn


def test_error_feedback_for_a_codebook() -> None:
    table = torch.tensor([-1.0, -0.6, -0.3, -0.1, 0.0, 0.2, 0.5, 1.0])
    weight, hessian = layer()

    def make(groups: int, rows: int, device: torch.device) -> CodebookColumns:
        return CodebookColumns(table, groups, rows, device)

    nearest = gptq_quantize(weight, None, 0, PLAIN, make_quantizer=make)
    fed = gptq_quantize(weight, hessian, TOKENS, dataclasses.replace(PLAIN, sweeps=1), make_quantizer=make)
    assert fed.zero is None and int(fed.codes.max()) < 8
    assert loss(weight, dense(fed, 32, table), hessian) < 0.7 * loss(
        weight, dense(nearest, 32, table), hessian
    )


def test_refinement_never_raises_the_error() -> None:
    weight, hessian = layer(n=40)
    target, hessian = weight.t().contiguous(), hessian / hessian.diagonal().mean()
    quantizer = AffineColumns(AffineGrid(2), 3, 40, torch.device("cpu"))
    group_of = torch.arange(96) // 32
    codes, values = torch.empty_like(target), torch.empty_like(target)
    for g in range(3):
        quantizer.fit(g, target[group_of == g], None)
        codes[group_of == g], level = quantizer.round(target[group_of == g], g)
        values[group_of == g] = level * quantizer.scale[g]
    last = row_errors(target - values, hessian)
    for _ in range(3):
        refit_scales(target, codes, values, hessian, quantizer, group_of)
        now = row_errors(target - values, hessian)
        assert bool((now <= last * (1 + 1e-5)).all())
        descend_codes(target, codes, values, hessian, quantizer, group_of.tolist(), 20)
        last = row_errors(target - values, hessian)
        assert bool((last <= now * (1 + 1e-5)).all())
        torch.testing.assert_close(values, quantizer.levels(codes, group_of) * quantizer.scale[group_of])


@pytest.mark.parametrize("tokens", [0, 5])
def test_without_statistics_codes_are_the_nearest(tokens: int) -> None:
    weight, _ = layer()
    result = gptq_quantize(weight, torch.zeros(96, 96), tokens, PLAIN, AffineGrid(4))
    codes, scale, _ = rtn_quantize(weight, 32, AffineGrid(4))
    assert torch.equal(result.codes, codes) and torch.equal(result.scale, scale)
    assert len(result.remarks) == 1 and "rounded to nearest" in result.remarks[0]


@pytest.mark.parametrize(
    "kind", ["rank one", "one token", "dead", "huge", "tiny", "nan", "inf", "negative", "ones"]
)
def test_hopeless_statistics(kind: str) -> None:
    weight, hessian = layer()
    row = torch.randn(1, 96, generator=torch.Generator().manual_seed(1))
    if kind == "rank one":
        hessian = row.T @ row
    elif kind == "one token":
        hessian = torch.zeros(96, 96)
        hessian[3, 3] = 1.0
    elif kind == "dead":
        hessian[:, ::2] = 0
        hessian[::2] = 0
    elif kind in ("huge", "tiny"):
        hessian = hessian * (1e33 if kind == "huge" else 1e-38)
    elif kind in ("nan", "inf"):
        hessian[5, 7] = float(kind)
    elif kind == "negative":
        hessian = hessian - 3 * hessian.diagonal().mean() * torch.eye(96)
    elif kind == "ones":
        hessian = torch.ones(96, 96)
    before = weight.clone(), hessian.clone()
    options = dataclasses.replace(PLAIN, ordering="groups", sweeps=2)
    result = gptq_quantize(weight, hessian, TOKENS, options, AffineGrid(4))
    assert torch.equal(weight, before[0]) and torch.equal(hessian.nan_to_num(7), before[1].nan_to_num(7))
    value = dense(result, 32)
    assert bool(torch.isfinite(value).all())
    # whatever happened, the weight is still recognisable
    assert float((value - weight).norm() / weight.norm()) < 0.75
    if kind in ("nan", "inf", "negative"):
        assert result.remarks


def test_damping_is_raised_and_reported() -> None:
    weight, _ = layer()
    hessian = torch.eye(96)
    hessian[0, 1] = hessian[1, 0] = 1.2  # eigenvalue -0.2: damping beyond 0.2 makes it definite
    result = gptq_quantize(weight, hessian, TOKENS, PLAIN, AffineGrid(4))
    assert 0.2 < result.damp <= 0.4
    assert result.remarks == [f"damping raised from 0.05 to {result.damp:g} to factor the Hessian"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_hostile_weights_are_refused(bad: float) -> None:
    weight, hessian = layer()
    weight[3, 5] = bad
    with pytest.raises(NumericsError):
        gptq_quantize(weight, hessian, TOKENS, PLAIN, AffineGrid(4))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 70),
    group=st.sampled_from([-1, 1, 8, 32, 100]),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    ordering=st.sampled_from(["natural", "groups", "activation"]),
    tokens=st.integers(1, 200),
)
def test_any_shape(
    n: int, k: int, group: int, bits: int, symmetric: bool, ordering: str, tokens: int
) -> None:
    g = torch.Generator().manual_seed(n * 1000 + k)
    weight = torch.randn(n, k, generator=g)
    inputs = torch.randn(tokens, k, generator=g)
    options = GPTQOptions(group_size=group, ordering=ordering, sweeps=1)  # type: ignore[arg-type]
    result = gptq_quantize(weight, inputs.T @ inputs, tokens, options, AffineGrid(bits, symmetric=symmetric))
    size = k if group == -1 else group
    assert result.codes.shape == (n, k) and result.codes.dtype == torch.uint8
    assert int(result.codes.max()) < 2**bits
    assert result.scale.shape == (n, -(-k // size))
    assert torch.equal(result.scale, result.scale.half().float())
    assert bool(torch.isfinite(dense(result, size)).all())
    if result.perm is not None:
        assert sorted(result.perm.tolist()) == list(range(k))
