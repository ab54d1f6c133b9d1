"""Half-quadratic quantization (HQQ): calibration-free scales and zeros, solved group by group.

Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs, 2023)
fit a group `w` of one weight by splitting the residual off as an auxiliary variable `e`:

    minimise  sum |e|^p + beta/2 * |w - (q - zero) * scale - e|^2        over zero, q, e

alternating (1) `e = shrink(w - (q - zero) * scale)`, a generalised soft threshold that keeps only the
outliers of the residual, (2) a closed form for the zero, (3) `q = round(w / scale + zero)`.

This file keeps the alternation and the closed forms, and changes what costs quality at equal size:

* step (2) is the whole affine regression of `w - e` on `q`, so that the **scale** moves too;
* it starts from the best of a few **clipped ranges** (each end shrunk on its own), the minimum and
  maximum among them: at 2 and 3 bits one outlier otherwise decides the step of 64 weights;
* every iterate is judged with its scale and zero **as they will be stored** (float16, say), and each
  group keeps its best one, so that no group is ever worse than its start;
* at the end the scale of each group grows until the group's projection on the weight is 1. The closest
  codes shrink a weight (by 10 % at 2 bits, 3 % at 3), layer after layer; the same codes with
  `<w, w'> = <w, w>` miss by little more and give predictions that are much closer (KL halved at 2 bits);
* with `norm = 2`, the default, `e` is zero and all steps minimise the squared error. The paper's 0.7
  ranks and shrinks by |.|^0.7, in units of the step. (hqq shrinks in units of the weight, where
  the usual weights, smaller than 0.17, never pass the threshold: it too is a squared-error fit.)

Measured against hqq 0.2.8 in docs/formats/hqq.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from quantkit.errors import NumericsError

#: How far an end of the range may be drawn in, by bits: wider codes have less to gain from clipping.
_MAX_CLIP = {1: 0.6, 2: 0.5, 3: 0.35, 4: 0.25, 8: 0.04}
_CLIP_STEPS = 5
_STARTS = 2  # ranges that are refined
_BETA = 10.0  # the paper's penalty and its growth per iteration
_KAPPA = 1.01
_ELEMENTS = {"cpu": 1 << 17, "other": 1 << 24}  # worked on at once: the CPU's cache, a GPU's memory


@dataclass(frozen=True)
class GroupFit:
    """`w ~ (codes - zero) * scale` for `R` groups of `g` weights."""

    codes: Tensor  # uint8 [R, g]
    scale: Tensor  # [R] in the storage dtype, positive
    zero: Tensor  # [R] in the storage dtype


@dataclass
class _Iterate:
    """Scale, zero (float32 `[R, 1]`, rounded as stored), codes, residual `[R, g]`, error `[R, 1]`."""

    scale: Tensor
    zero: Tensor
    codes: Tensor
    residual: Tensor
    error: Tensor

    def take(self, rows: Tensor | slice) -> _Iterate:
        """A copy for some of the groups."""
        return _Iterate(*(getattr(self, field.name)[rows].clone() for field in fields(self)))


class _Problem:
    """Groups `w` float32 `[R, g]` and the rules that every iterate keeps."""

    def __init__(self, w: Tensor, bits: int, dtype: torch.dtype, round_zero: bool, norm: float) -> None:
        self.w = w
        self.top = float(2**bits - 1)
        self.dtype = dtype
        self.round_zero = round_zero
        self.norm = norm
        info = torch.finfo(dtype)
        self.scale_min = float(info.tiny) if dtype != torch.float16 else 2.0**-24  # its smallest subnormal
        self.limit = float(info.max)

    def rows(self, index: Tensor) -> _Problem:
        """The same problem for some of the groups."""
        part = object.__new__(_Problem)
        part.__dict__.update(self.__dict__)
        part.w = self.w[index]
        return part

    def stored_scale(self, scale: Tensor) -> Tensor:
        """`scale` as it will be read back, never zero and never infinite."""
        return scale.clamp(self.scale_min, self.limit).to(self.dtype).float()

    def stored_zero(self, zero: Tensor) -> Tensor:
        """`zero` as it will be read back; with `round_zero` an integer that is a valid code."""
        if self.round_zero:
            zero = zero.round().clamp(0.0, self.top)
        return zero.clamp(-self.limit, self.limit).to(self.dtype).float()

    def iterate(self, scale: Tensor, zero: Tensor) -> _Iterate:
        """Nearest codes for this scale and zero (as stored), and what they miss."""
        scale, zero = self.stored_scale(scale), self.stored_zero(zero)
        codes = (self.w / scale).add_(zero).round_().clamp_(0.0, self.top)
        residual = torch.sub(codes, zero).mul_(scale).neg_().add_(self.w)
        return _Iterate(scale, zero, codes, residual, self.loss(residual))

    def loss(self, residual: Tensor) -> Tensor:
        """Sum of |residual|^norm per group, `[R, 1]`."""
        if self.norm == 2.0:
            return (residual * residual).sum(1, keepdim=True)
        return residual.abs().pow_(self.norm).sum(1, keepdim=True)

    def outliers(self, it: _Iterate, beta: float) -> Tensor | None:
        """The auxiliary variable `e`: the residual beyond the threshold (None for norm 2: nothing)."""
        if self.norm == 2.0:
            return None
        size = it.residual.abs() / it.scale
        kept = (size - size.clamp_min(1e-6).pow(self.norm - 1) / beta).clamp_min_(0.0)
        return it.residual.sign() * kept * it.scale

    def refit(self, it: _Iterate, beta: float) -> tuple[Tensor, Tensor]:
        """Closed form: regress `w - e` on the codes; then the scale again, for the zero as stored."""
        e = self.outliers(it, beta)
        target = self.w if e is None else self.w - e
        mean_q = it.codes.mean(1, keepdim=True)
        centred = it.codes - mean_q
        spread = (centred * centred).sum(1, keepdim=True)
        slope = (centred * target).sum(1, keepdim=True) / spread.clamp_min(1e-12)
        scale = torch.where((spread > 0) & (slope > 0), slope, it.scale)
        zero = self.stored_zero(mean_q - target.mean(1, keepdim=True) / scale)
        offset = it.codes - zero
        power = (offset * offset).sum(1, keepdim=True)
        slope = (offset * target).sum(1, keepdim=True) / power.clamp_min(1e-12)
        return torch.where((power > 0) & (slope > 0), slope, scale), zero


def _range(problem: _Problem, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero that spread the codes over `[low, high]`; a constant group becomes one exact code.

    With `round_zero` the range is widened to hold 0, since the zero is then one of the codes.
    """
    if problem.round_zero:
        low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    flat = high <= low
    scale = torch.where(flat, low.abs(), (high - low) / problem.top)
    empty = scale <= 0.0  # all weights are 0
    scale = torch.where(empty, torch.ones_like(scale), scale)
    stored = problem.stored_scale(scale)
    return scale, torch.where(empty, torch.zeros_like(low), -low / stored)


def _keep_better(best: _Iterate, other: _Iterate) -> None:
    """Take over the groups in which `other` is better."""
    better = other.error < best.error
    for field in fields(best):
        mine = getattr(best, field.name)
        torch.where(better, getattr(other, field.name), mine, out=mine)


def _full_range(problem: _Problem) -> _Iterate:
    """The range from minimum to maximum, widened to hold 0 where the zero cannot be stored well otherwise."""
    low, high = problem.w.amin(1, keepdim=True), problem.w.amax(1, keepdim=True)
    it = problem.iterate(*_range(problem, low, high))
    _keep_better(it, problem.iterate(*_range(problem, low.clamp_max(0.0), high.clamp_min(0.0))))
    return it


def _clipped_starts(problem: _Problem, bits: int) -> list[_Iterate]:
    """The `_STARTS` best of the clipped ranges, group by group."""
    low, high = problem.w.amin(1, keepdim=True), problem.w.amax(1, keepdim=True)
    half = (high - low) * (_MAX_CLIP[bits] / 2)
    tried: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in range(_CLIP_STEPS):
        for j in range(_CLIP_STEPS):
            at = _range(problem, low + half * (i / (_CLIP_STEPS - 1)), high - half * (j / (_CLIP_STEPS - 1)))
            it = problem.iterate(*at)
            tried.append((it.error, it.scale, it.zero))
    errors, scales, zeros = (torch.cat(parts, dim=1) for parts in zip(*tried, strict=True))
    order = errors.topk(_STARTS, dim=1, largest=False).indices
    chosen = [order[:, rank : rank + 1] for rank in range(_STARTS)]
    return [problem.iterate(scales.gather(1, at), zeros.gather(1, at)) for at in chosen]


def _refine(problem: _Problem, best: _Iterate, start: _Iterate, iterations: int) -> None:
    """Alternate closed form and rounding from `start`; groups that stop improving drop out early."""
    active = torch.arange(len(problem.w), device=problem.w.device)
    beta, current, reached = _BETA, start, start.error
    for _ in range(iterations):
        part = problem.rows(active) if len(active) < len(problem.w) else problem
        current = part.iterate(*part.refit(current, beta))
        known = best.take(active)
        _keep_better(known, current)
        for field in fields(best):
            getattr(best, field.name)[active] = getattr(known, field.name)
        keep = (current.error < reached)[:, 0].nonzero()[:, 0]
        if len(keep) == 0:
            break
        active, reached, beta = active[keep], current.error[keep], beta * _KAPPA
        current = current.take(keep)


def _unbias(problem: _Problem, best: _Iterate, start: Tensor) -> None:
    """Scale the groups so that `<w, w'> = <w, w>`, except where that makes one worse than its start.

    Among all weights with this projection, `r` times the least-squares solution is the closest one, with
    the same codes: quantizing `r * w` instead of `w` only multiplies the scale.
    """
    w, near = problem.w, problem.w - best.residual
    along = (w * near).sum(1, keepdim=True)
    growth = (w * w).sum(1, keepdim=True) / along
    growth = torch.where(along > 0, growth, 1.0).clamp(0.5, 2.0)
    scale = problem.stored_scale(best.scale * growth)
    residual = w - (best.codes - best.zero) * scale
    loss = problem.loss(residual)
    fine = loss <= start
    for field, value in (("scale", scale), ("residual", residual), ("error", loss)):
        setattr(best, field, torch.where(fine, value, getattr(best, field)))


def fit_groups(
    groups: Tensor,
    bits: int,
    *,
    optimize: bool = True,
    round_zero: bool = False,
    dtype: torch.dtype = torch.float16,
    norm: float = 2.0,
    unbiased: bool = True,
    iterations: int = 12,
) -> GroupFit:
    """Choose codes, scale and zero for every row of `groups` (float32 `[R, g]`, finite, any device).

    Computes in float32; `dtype` is what scale and zero are stored in, and all errors are taken with
    the stored values. `optimize=False` keeps the range from minimum to maximum. `norm` is the p of
    the error that is minimised, 0 < p <= 2. `unbiased` scales each group to a projection of 1 on its
    weights (only with `optimize`). Raises NumericsError when `dtype` cannot hold a scale.
    """
    if groups.dim() != 2 or bits not in _MAX_CLIP or not 0.0 < norm <= 2.0:
        raise ValueError(f"groups {tuple(groups.shape)}, bits {bits}, norm {norm} cannot be solved")
    step = max(1, _ELEMENTS["cpu" if groups.device.type == "cpu" else "other"] // max(1, groups.shape[1]))
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
    scale = torch.empty(len(groups), dtype=dtype, device=groups.device)
    zero = torch.empty_like(scale)
    for at in range(0, len(groups), step):
        rows = slice(at, at + step)
        w = groups[rows].float()
        problem = _Problem(w, bits, dtype, round_zero, norm)
        widest = float((w.amax(1) - w.amin(1)).max())
        if max(widest / problem.top, float(w.abs().max()) / 65536) > problem.limit:
            raise NumericsError(
                f"weights spanning {widest:.3g} need a scale beyond {str(dtype).removeprefix('torch.')}",
                hint="Use compute_dtype=float32 or bfloat16.",
            )
        best = _full_range(problem)
        if optimize:
            worst = best.error.clone()
            for start in [best.take(slice(None)), *_clipped_starts(problem, bits)]:
                _keep_better(best, start)
                _refine(problem, best, start, iterations)
            if unbiased:
                _unbias(problem, best, worst)
        codes[rows] = best.codes.to(torch.uint8)
        scale[rows] = best.scale[:, 0].to(dtype)
        zero[rows] = best.zero[:, 0].to(dtype)
    return GroupFit(codes, scale, zero)
