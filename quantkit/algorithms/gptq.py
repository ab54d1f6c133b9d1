"""GPTQ: codes chosen one column at a time, each rounding error repaired by the columns to come.

Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv 2210.17323. For a layer `y = W x` with inputs seen in
calibration, the error of a quantized weight `Q` is `tr((W - Q) H (W - Q)^T)`, `H = sum x x^T` `[K, K]`.
With `H^-1 = U^T U` (U upper triangular), column j is rounded and the error

    e = (w_j - q_j) / U[j, j]        is carried on:        w_k -= e U[j, k]   for all k > j.

Updates inside a block of columns are rank one, the rest of the matrix is updated once per block.
Here U comes from one Cholesky factorization of the reversed H and one triangular inversion (with
`J` the reversal, `J H J = L L^T` gives `H = M M^T`, `M = J L J` upper triangular, `U = M^-1`): half
the work of inverting and factoring again, and better conditioned.

On top of the paper: the grid of a group is searched with the errors weighted by `1 / U[j, j]^2`, the
part of a column's error that later columns cannot repair; columns are ordered group by group (see
`ordering`); `refine` re-fits scales and descends on codes afterwards. docs/adr/0010 has the numbers.

    weight   float32 [N, K]         hessian  float [K, K], the plain sum over `tokens` tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit.algorithms.grid import AffineGrid, check_range
from quantkit.algorithms.ordering import Ordering, column_order, inverse_order, sort_within_groups
from quantkit.algorithms.quantizers import AffineColumns, ColumnQuantizer
from quantkit.algorithms.refine import descend_codes, refit_scales

#: On a CPU, factorizations of matrices up to this size are done in float64.
_DOUBLE_UP_TO = 4096

MakeQuantizer = Callable[[int, int, torch.device], ColumnQuantizer]


@dataclass(frozen=True)
class GPTQOptions:
    """How codes are chosen. `group_size` -1 means one group per row."""

    group_size: int = 128
    ordering: Ordering = "groups"
    static_groups: bool = False
    damp: float = 0.05
    damp_limit: float = 1.0
    block_size: int = 128
    sweeps: int = 0


@dataclass
class GPTQResult:
    """`codes` uint8 `[N, K]`, `scale` and `zero` float32 `[N, G]`, in the weight's own column order,
    or, where `perm` (int64 `[K]`) is given, with column j holding input `perm[j]`.

    `zero` is None for codebooks. `remarks` say what was not done as asked (fallback, damping).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    perm: Tensor | None = None
    damp: float = 0.0
    remarks: list[str] = field(default_factory=list)


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor | None,
    tokens: int,
    options: GPTQOptions,
    grid: AffineGrid | None = None,
    make_quantizer: MakeQuantizer | None = None,
) -> GPTQResult:
    """Quantize `weight` `[N, K]` under the statistics `hessian` `[K, K]` (neither is modified).

    Give `grid` for affine codes, or `make_quantizer(groups, rows, device)` for another grid (NF4).
    Without usable statistics (no tokens, a Hessian that is not finite or cannot be factored) codes
    are the nearest ones under what is known, and `remarks` says so.
    """
    n, k = weight.shape
    group_size = k if options.group_size == -1 else options.group_size
    groups = math.ceil(k / group_size)
    remarks: list[str] = []
    weight = weight.detach().float()
    if grid is not None:
        check_range(weight, grid)
        quantizer: ColumnQuantizer = AffineColumns(grid, groups, n, weight.device)
    elif make_quantizer is not None:
        quantizer = make_quantizer(groups, n, weight.device)
    else:
        raise ValueError("gptq_quantize needs a grid or a make_quantizer")

    statistics = _usable(hessian, tokens, k, weight.device, remarks)
    if statistics is None:
        return _nearest(weight, None, group_size, quantizer, remarks)
    order = column_order(torch.diagonal(statistics), group_size, options.ordering)
    ordered = statistics[order][:, order]
    del statistics
    factor, damp = inverse_factor(ordered, options.damp, options.damp_limit)
    if factor is None:
        remarks.append("the Hessian could not be factored: rounded to nearest, weighted by its diagonal")
        diagonal = torch.diagonal(ordered)[inverse_order(order)]
        return _nearest(weight, diagonal, group_size, quantizer, remarks)
    if damp > options.damp:
        remarks.append(f"damping raised from {options.damp:g} to {damp:g} to factor the Hessian")

    dynamic = not options.static_groups
    follows = dynamic and options.ordering == "activation"  # groups are runs of the working order
    group_of = torch.arange(k, device=weight.device) // group_size if follows else order // group_size
    working = weight[:, order].t().contiguous()  # [K, N]
    if not dynamic:
        importance = torch.diagonal(factor).square().reciprocal()
        for g in range(groups):
            columns = torch.nonzero(group_of == g).flatten()
            quantizer.fit(g, working[columns], importance[columns])
    groups_list = group_of.tolist()
    codes, values = _columns(working.clone(), factor, quantizer, groups_list, dynamic, options.block_size)
    del factor
    if options.sweeps:
        ordered.diagonal().add_(damp * float(torch.diagonal(ordered).mean()))
        for _ in range(options.sweeps):
            refit_scales(working, codes, values, ordered, quantizer, group_of)
            if not descend_codes(working, codes, values, ordered, quantizer, groups_list, options.block_size):
                break
        refit_scales(working, codes, values, ordered, quantizer, group_of)
    perm = None
    if follows:
        perm, pick = sort_within_groups(order, group_size)
        codes = codes[pick]
    else:
        codes = codes[inverse_order(order)]
    return _result(codes, quantizer, perm, damp, remarks)


def _usable(
    hessian: Tensor | None, tokens: int, k: int, device: torch.device, remarks: list[str]
) -> Tensor | None:
    """The Hessian scaled to a mean diagonal of 1, or None with a remark."""
    if hessian is None or tokens <= 0:
        remarks.append("no calibration tokens reached this layer: rounded to nearest")
        return None
    if hessian.shape != (k, k):
        raise ValueError(f"the Hessian is {tuple(hessian.shape)}, the weight has {k} inputs")
    hessian = hessian.to(device=device, dtype=torch.float32)
    mean = float(torch.diagonal(hessian).double().mean())
    if not math.isfinite(mean) or mean <= 0:
        remarks.append("the Hessian is not usable (zero or not finite): rounded to nearest")
        return None
    scaled = (hessian.double() / mean).float() if hessian.numel() <= _DOUBLE_UP_TO**2 else hessian / mean
    if not bool(torch.isfinite(scaled).all()):
        remarks.append("the Hessian is not finite: rounded to nearest")
        return None
    return scaled


def inverse_factor(hessian: Tensor, damp: float, limit: float = 1.0) -> tuple[Tensor | None, float]:
    """`(U, damp)` with `(H + damp * mean(diag H) * I)^-1 = U^T U`, U float32 upper triangular `[K, K]`.

    Damping is raised (doubling) until the factorization succeeds; None when it does not below
    `limit`. `hessian` is restored on return.
    """
    double = hessian.device.type == "cpu" and hessian.shape[0] <= _DOUBLE_UP_TO
    flipped = hessian.double().flip(0, 1) if double else hessian.flip(0, 1)
    diagonal = torch.diagonal(flipped).clone()
    mean = float(diagonal.double().mean())
    amount = damp
    while True:
        torch.diagonal(flipped).copy_(diagonal + amount * mean)
        lower, info = torch.linalg.cholesky_ex(flipped)
        if int(info) == 0:
            identity = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
            factor = inverse.flip(0, 1).float()
            if bool(torch.isfinite(factor).all()):
                return factor.contiguous(), amount
        if amount >= limit:
            return None, amount
        amount = min(limit, max(amount * 2, 1e-3))


def _columns(
    work: Tensor, factor: Tensor, quantizer: ColumnQuantizer, group_of: list[int], fit: bool, block_size: int
) -> tuple[Tensor, Tensor]:
    """The GPTQ loop on `work` `[K, N]` (overwritten): `(codes, values)`, float `[K, N]`.

    With `fit`, a group's grid is chosen from the repaired weights when its first column comes up
    (its columns are consecutive); without, grids are there already.
    """
    k = work.shape[0]
    codes = torch.empty_like(work)
    values = torch.empty_like(work)
    diagonal = torch.diagonal(factor)
    importance = diagonal.square().reciprocal()
    inverse_diagonal = diagonal.reciprocal().tolist()
    start = 0
    while start < k:
        stop = min(start + block_size, k)
        if fit:
            # A group that begins inside a block would be fitted on columns that the block has not
            # repaired yet, so a block ends where a group does, or lies inside one.
            end = start + 1
            while end < k and group_of[end] == group_of[start]:
                end += 1
            stop = min(stop, end)
            if start == 0 or group_of[start] != group_of[start - 1]:
                quantizer.fit(group_of[start], work[start:end], importance[start:end])
        block = work[start:stop]
        inside = factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            j = start + i
            code, level = quantizer.round(block[i], group_of[j])
            codes[j] = code
            torch.mul(level, quantizer.scale[group_of[j]], out=values[j])
            error = torch.sub(block[i], values[j], out=errors[i]).mul_(inverse_diagonal[j])
            if i + 1 < stop - start:
                block[i + 1 :].addr_(inside[i, i + 1 :], error, alpha=-1)
        if stop < k:
            work[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
        start = stop
    return codes, values


def _nearest(
    weight: Tensor, importance: Tensor | None, group_size: int, quantizer: ColumnQuantizer, remarks: list[str]
) -> GPTQResult:
    """Codes nearest to the weight, group by group."""
    k = weight.shape[1]
    work = weight.t().contiguous()
    codes = torch.empty_like(work)
    for g, start in enumerate(range(0, k, group_size)):
        columns = slice(start, min(start + group_size, k))
        quantizer.fit(g, work[columns], None if importance is None else importance[columns])
        codes[columns] = quantizer.round(work[columns], g)[0]
    return _result(codes, quantizer, None, 0.0, remarks)


def _result(
    codes: Tensor, quantizer: ColumnQuantizer, perm: Tensor | None, damp: float, remarks: list[str]
) -> GPTQResult:
    zero = getattr(quantizer, "zero", None)
    return GPTQResult(
        codes.t().contiguous().to(torch.uint8),
        quantizer.scale.t().contiguous(),
        None if zero is None else zero.t().contiguous(),
        perm,
        damp,
        remarks,
    )
