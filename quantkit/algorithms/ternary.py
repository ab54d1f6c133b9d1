"""Ternary weights with one scale for the whole matrix: `W ~ scale * T`, T in {-1, 0, 1}.

Three ways to choose T and the scale:

* `absmean`        BitNet b1.58's rule (arXiv:2402.17764): scale = mean|W|, T = clip(round(W / scale)).
                   Exact for models *trained* with it; poor for others.
* `fit_weight`     the scale and threshold with the smallest `|W - scale*T|^2`. For a given number m of
                   non-zeros the best ones are the m largest |w|, the best scale is their mean and the
                   error falls by `(sum of them)^2 / m`; so the optimum is found by sorting.
* `fit_hessian`    the smallest `tr((W - scale*T) H (W - scale*T)^T)`, H = X^T X of the layer's inputs:
                   GPTQ's error feedback (arXiv:2210.17323) or the nearest codes as a start, whichever
                   gets lower, then coordinate descent on the codes (QuantEase, arXiv:2309.01885)
                   alternating with the closed-form scale `<W H, T> / <T H, T>`. No step raises the error.

Weights are handled relative to their largest magnitude, so 1e30 and 1e-30 neither over- nor underflow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit.algorithms.gptq import GPTQOptions, gptq_quantize
from quantkit.algorithms.refine import descend_codes, row_errors

SMALLEST_SCALE = 1e-5  # BitNet's clamp on mean|W|
_SORT_LIMIT = 1 << 24
_DAMP = 0.01
_PROBE_ROWS = 256


@dataclass
class TernaryResult:
    """`codes` uint8 `[N, K]` in {0, 1, 2} (value + 1) and the `scale` of all of them.

    `gain` is the error relative to the absmean rule's, in the metric that was minimised (1: no better).
    """

    codes: Tensor
    scale: float
    gain: float = 1.0
    remarks: list[str] = field(default_factory=list)


class TernaryColumns:
    """The grid {-scale, 0, scale} as GPTQ's and the coordinate descent's column quantizer."""

    def __init__(self, scale: float, rows: int, device: torch.device) -> None:
        self.scale = torch.full((1, rows), scale, device=device)

    def fit(self, group: int, columns: Tensor, importance: Tensor | None) -> None:
        """The scale is given."""

    def round(self, column: Tensor, group: int) -> tuple[Tensor, Tensor]:
        level = (column / self.scale[0]).round().clamp(-1, 1)
        return level + 1, level

    def levels(self, codes: Tensor, group_of: Tensor) -> Tensor:
        return codes - 1

    def stored(self, scale: Tensor) -> Tensor:
        return scale


def nearest(weight: Tensor, scale: float) -> Tensor:
    """uint8 codes of the ternary values nearest to `weight / scale`."""
    return (weight / scale).round().clamp_(-1, 1).add_(1).to(torch.uint8)


def absmean(weight: Tensor) -> TernaryResult:
    """BitNet's rule, with transformers' arithmetic: `round(W * (1 / mean|W|))` in float32."""
    mean = weight.abs().mean()
    if not bool(torch.isfinite(mean)):  # the float32 sum overflowed
        mean = weight.abs().double().mean().float()
    inverse = 1.0 / mean.clamp(min=SMALLEST_SCALE)
    codes = (weight * inverse).round().clamp_(-1, 1).add_(1).to(torch.uint8)
    return TernaryResult(codes, max(float(mean), SMALLEST_SCALE))


def fit_weight(weight: Tensor) -> TernaryResult:
    """Least squares on the weight itself: exact up to 2**24 entries, then from a sample and refined."""
    largest = float(weight.abs().max())
    if largest == 0.0:
        return TernaryResult(torch.ones_like(weight, dtype=torch.uint8), SMALLEST_SCALE)
    unit = _unit(weight, largest)
    scale = _best_scale(unit.abs().view(-1))
    codes = nearest(unit, scale)
    rule = absmean(weight)
    ours, theirs = _square_error(unit, codes, scale), _square_error(unit, rule.codes, rule.scale / largest)
    return TernaryResult(codes, scale * largest, ours / theirs if theirs > 0 else 1.0)


def fit_hessian(
    weight: Tensor,
    hessian: Tensor | None,
    tokens: int,
    sweeps: int = 4,
    store: Callable[[float], float] = float,
) -> TernaryResult:
    """Least squares on the layer's output. `weight` float32 `[N, K]`, `hessian` float32 `[K, K]`.

    `store` rounds a scale to what the file can hold. Without usable statistics: `fit_weight`, and a
    remark.
    """
    plain = fit_weight(weight)
    largest = float(weight.abs().max())
    damped, reason = _damped(hessian, tokens, weight)
    if damped is None or largest == 0.0:
        plain.remarks.append(reason or "the weight is zero")
        return plain
    # Columns with the largest inputs first: error feedback then has the most left to repair with.
    order = torch.argsort(torch.diagonal(damped), descending=True, stable=True)
    damped = damped[order][:, order].contiguous()
    target = _unit(weight, largest)[:, order].t().contiguous()  # [K, N]

    def error(codes: Tensor, scale: float) -> float:
        return float(row_errors(target - (codes - 1) * scale, damped).double().sum())

    scale = _probe(target, damped, plain.scale / largest)
    best: tuple[float, Tensor, float] | None = None
    for start in ("nearest", "feedback"):
        codes = nearest(target, scale).float()
        if start == "feedback":
            options = GPTQOptions(group_size=-1, ordering="natural", damp=_DAMP)
            found = gptq_quantize(
                target.t().contiguous(),
                damped,
                1,
                options,
                make_quantizer=lambda groups, rows, device: TernaryColumns(scale, rows, device),
            )
            codes = found.codes.t().float()
        codes, fitted = _descend(target, codes, scale, damped, 1)
        reached = error(codes, fitted)
        if best is None or reached < best[0]:
            best = (reached, codes, fitted)
    assert best is not None
    codes, scale = _descend(target, best[1], best[2], damped, max(sweeps - 1, 0))
    scale = store(scale * largest) / largest

    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    rule = absmean(weight)
    candidates = [
        (error(codes, scale), codes, scale * largest),
        (error(plain.codes.t()[order].float(), plain.scale / largest), None, plain.scale),
    ]
    reached, kept, final = min(candidates, key=lambda c: c[0])
    chosen = plain.codes if kept is None else kept[back].t().contiguous().to(torch.uint8)
    reference = error(rule.codes.t()[order].float(), rule.scale / largest)
    return TernaryResult(chosen, final, reached / reference if reference > 0 else 1.0)


def _unit(weight: Tensor, largest: float) -> Tensor:
    """`weight / largest`, largest its greatest magnitude (a true division: no reciprocal overflows)."""
    return weight / largest


def _square_error(unit: Tensor, codes: Tensor, scale: float) -> float:
    return float((unit - (codes.float() - 1) * scale).square().sum(dtype=torch.float64))


def _best_scale(magnitude: Tensor) -> float:
    """The scale minimising `sum (|w| - scale * [|w| > scale/2])^2` over a flat tensor of |w| >= 0."""
    sample = magnitude
    if magnitude.numel() > _SORT_LIMIT:
        sample = magnitude[:: -(-magnitude.numel() // (_SORT_LIMIT // 4))]
    ordered = torch.sort(sample, descending=True).values.double()
    total = ordered.cumsum(0)
    count = torch.arange(1, len(ordered) + 1, dtype=torch.float64, device=ordered.device)
    m = int(torch.argmax(total.square() / count))
    scale = float(total[m] / count[m])
    for _ in range(30 if sample is not magnitude else 0):  # Lloyd's alternation on all of it
        kept = magnitude > scale / 2
        new = float(magnitude[kept].double().mean()) if bool(kept.any()) else scale
        if abs(new - scale) <= 1e-7 * scale:
            break
        scale = new
    return scale


def _damped(hessian: Tensor | None, tokens: int, weight: Tensor) -> tuple[Tensor | None, str]:
    """The Hessian with a mean diagonal of 1 plus damping, or (None, why not)."""
    if hessian is None or tokens <= 0:
        return None, "no calibration tokens reached this layer: fitted to the weight alone"
    hessian = hessian.to(device=weight.device, dtype=torch.float32)
    mean = float(torch.diagonal(hessian).double().mean())
    if not (0 < mean < float("inf")):
        return None, "the Hessian is not usable (zero or not finite): fitted to the weight alone"
    damped = (hessian.double() / mean).float() if hessian.numel() <= 1 << 24 else hessian / mean
    if not bool(torch.isfinite(damped).all()):
        return None, "the Hessian is not usable (not finite): fitted to the weight alone"
    torch.diagonal(damped).add_(_DAMP)
    return damped, ""


def _descend(
    target: Tensor, codes: Tensor, scale: float, damped: Tensor, sweeps: int
) -> tuple[Tensor, float]:
    """Coordinate descent on the codes `[K, N]` and the best scale for them, in turn."""
    k = target.shape[0]
    pulled = damped @ target
    group_of = [0] * k
    for sweep in range(sweeps + 1):
        level = codes - 1
        norm = float(row_errors(level, damped).double().sum())
        fitted = float((level * pulled).sum(dtype=torch.float64)) / norm if norm > 0 else scale
        scale = fitted if fitted > 0 else scale
        if sweep == sweeps:
            break
        values = level * scale
        quantizer = TernaryColumns(scale, target.shape[1], target.device)
        if not descend_codes(target, codes, values, damped, quantizer, group_of):
            break
    return codes, scale


def _probe(target: Tensor, damped: Tensor, scale: float) -> float:
    """The start scale, 0.7 to 1.3 times the weight's, that descends lowest on a sample of the rows."""
    rows = target[:, :: max(1, target.shape[1] // _PROBE_ROWS)].contiguous()
    found = []
    for factor in (0.7, 0.8, 0.9, 1.0, 1.15, 1.3):
        codes, fitted = _descend(rows, nearest(rows, scale * factor).float(), scale * factor, damped, 2)
        found.append((float(row_errors(rows - (codes - 1) * fitted, damped).double().sum()), fitted))
    return min(found)[1]
