"""Grids: which values a group of weights may take, and how their scale and zero are chosen.

An affine grid of `bits` bits holds the values `(q - zero) * scale`, `0 <= q < 2**bits`; `scale` and
`zero` are chosen for each group (a run of inputs of one output row). Three searches:

* `minmax`     the range of the group: every weight is representable, nothing is clipped;
* `mse`        the clipping ratio with the smallest squared rounding error;
* `importance` the same with each column's error weighted (diagonal of the Hessian, or what GPTQ's
               later columns cannot repair), then the scale re-fitted in closed form.

Scales are rounded to the dtype in which they will be stored BEFORE codes are chosen, so codes are
right for the scale that the file holds. Everything is float32, vectorised over groups, any device.

Symmetric grids have the constant zero `2**(bits-1)`, hence one more negative level than positive
ones. `signed_scale` lets a group flip its scale's sign, so that the spare level lies on the side
where it helps (2 bits: {-2,-1,0,1} or {2,1,0,-1} times |scale|).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantkit.errors import NumericsError

Search = Literal["minmax", "mse", "importance"]

#: A search weighs a group by at least this share of its mean importance: columns that calibration
#: never saw still keep a sane scale.
_IMPORTANCE_FLOOR = 1e-3


@dataclass(frozen=True)
class AffineGrid:
    """What affine grids are allowed and how one is searched.

    `steps` clipping ratios between `shrink` and `stretch` times the min/max scale are tried, then
    `refits` closed-form re-fits of the scale; `scale_dtype` is what the file stores and
    `least_zero` the smallest zero that it can hold.
    """

    bits: int
    symmetric: bool = True
    search: Search = "importance"
    steps: int = 40
    shrink: float | None = None
    stretch: float = 1.07
    refits: int = 2
    signed_scale: bool = True
    least_zero: int = 0
    scale_dtype: torch.dtype = torch.float16

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero of a symmetric grid."""
        return 1 << (self.bits - 1)

    def ratios(self) -> list[float]:
        """Clipping ratios in the order they are tried, 1.0 (no clipping beyond min/max) first."""
        low = self.shrink if self.shrink is not None else {2: 0.3, 3: 0.45, 4: 0.55}.get(self.bits, 0.85)
        count = max(self.steps, 2)
        spread = [low + (self.stretch - low) * i / (count - 1) for i in range(count)]
        return [1.0, *reversed(spread)]


def store_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as `dtype` will hold it, in float32: rounded, never zero, never infinite."""
    limit = torch.finfo(dtype)
    least = limit.smallest_normal * limit.eps  # the smallest subnormal
    size = scale.abs().clamp(min=least, max=limit.max)
    return torch.where(scale < 0, -size, size).to(dtype).float()


def check_range(groups: Tensor, grid: AffineGrid) -> None:
    """NumericsError when `groups` is not finite, or too large for a stored scale."""
    if groups.numel() == 0:
        return
    low, high = torch.aminmax(groups)
    largest = float(torch.maximum(low.abs(), high.abs()))
    limit = torch.finfo(grid.scale_dtype).max * grid.top / 2
    if not largest <= limit:  # also catches NaN
        kind = "NaN or infinite" if largest != largest or largest == float("inf") else f"{largest:.3g}"
        raise NumericsError(
            f"a weight is {kind}; {grid.bits} bits with {str(grid.scale_dtype)[6:]} scales hold {limit:.3g}",
            hint="Check the source checkpoint, or leave this layer unquantized.",
        )


def encode(x: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Codes (as float) of `x`: `clamp(round(x / scale) + zero, 0, top)`; shapes broadcast."""
    return (x / scale).round_().add_(zero).clamp_(0, top)


def minmax(groups: Tensor, grid: AffineGrid) -> tuple[Tensor, Tensor]:
    """`(scale, zero)` `[R]` float32 covering the range of each row of `groups` `[R, g]` and zero."""
    low, high = torch.aminmax(groups, dim=-1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if grid.symmetric:
        span = 2 * torch.maximum(-low, high)
    else:
        span = high - low
    scale = torch.where(span > 0, span / grid.top, torch.ones_like(span))
    scale = store_scale(scale, grid.scale_dtype)
    if grid.symmetric:
        zero = torch.full_like(scale, grid.middle)
    else:
        zero = (-low / scale).round().clamp(grid.least_zero, grid.top)
    return scale, zero


def search_grid(groups: Tensor, grid: AffineGrid, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Best `(scale, zero)`, each float32 `[R]`, for the rows of `groups` `[R, g]` (float32).

    `importance` (`[g]` or `[R, g]`, >= 0) weighs squared errors; it is used by the `importance`
    search only. Scales come back already rounded to `grid.scale_dtype`.
    """
    if grid.search == "minmax":
        return minmax(groups, grid)
    weigh = _weights(groups, importance) if grid.search == "importance" and importance is not None else None
    start, start_zero = minmax(groups, grid)
    best = _Best(groups, weigh, grid.top)
    for ratio in grid.ratios():
        scale = store_scale(start * ratio, grid.scale_dtype)
        for signed, zero in _orientations(scale, start_zero, groups, grid):
            best.offer(signed, zero)
    for _ in range(grid.refits):
        fitted = _refit(groups, best.scale, best.zero, weigh, grid.top)
        best.offer(store_scale(fitted, grid.scale_dtype), best.zero)
    return best.scale, best.zero


class _Best:
    """The best (scale, zero) seen so far for each row."""

    def __init__(self, groups: Tensor, weigh: Tensor | None, top: int) -> None:
        self.groups, self.weigh, self.top = groups, weigh, top
        self.error = groups.new_full(groups.shape[:1], float("inf"))
        self.scale = torch.ones_like(self.error)
        self.zero = torch.zeros_like(self.error)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        s, z = scale.unsqueeze(1), zero.unsqueeze(1)
        wrong = encode(self.groups, s, z, self.top).sub_(z).mul_(s).sub_(self.groups).square_()
        error = wrong.sum(1) if self.weigh is None else _weighted_sum(wrong, self.weigh)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)


def _weighted_sum(values: Tensor, weigh: Tensor) -> Tensor:
    return values @ weigh if weigh.dim() == 1 else (values * weigh).sum(1)


def _weights(groups: Tensor, importance: Tensor) -> Tensor:
    """Importance as finite weights with mean 1 and a floor."""
    weigh = importance.to(groups).clamp(min=0)
    mean = weigh.mean(-1, keepdim=True)
    weigh = weigh / mean.clamp(min=torch.finfo(weigh.dtype).tiny)
    weigh = torch.where(mean > 0, weigh, torch.ones_like(weigh))
    return weigh.clamp(min=_IMPORTANCE_FLOOR)


def _orientations(
    scale: Tensor, start_zero: Tensor, groups: Tensor, grid: AffineGrid
) -> Iterator[tuple[Tensor, Tensor]]:
    """The (signed scale, zero) pairs to try at one clipping ratio."""
    if grid.symmetric:
        yield scale, start_zero
        if grid.signed_scale:
            yield -scale, start_zero
    elif grid.bits <= 3:  # few levels: every zero is worth a try
        for code in range(grid.least_zero, grid.top + 1):
            yield scale, torch.full_like(scale, code)
    else:
        for shift in (0, -1, 1):
            yield scale, (start_zero + shift).clamp(grid.least_zero, grid.top)


def _refit(groups: Tensor, scale: Tensor, zero: Tensor, weigh: Tensor | None, top: int) -> Tensor:
    """Least-squares scale for the codes that `scale`, `zero` give: sum(h x l) / sum(h l^2)."""
    level = encode(groups, scale.unsqueeze(1), zero.unsqueeze(1), top) - zero.unsqueeze(1)
    if weigh is None:
        over, under = (groups * level).sum(1), level.square().sum(1)
    else:
        over, under = _weighted_sum(groups * level, weigh), _weighted_sum(level.square(), weigh)
    fitted = over / under.clamp(min=1e-20)
    return torch.where((under > 0) & (fitted * scale > 0), fitted, scale)
