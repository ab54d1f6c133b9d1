"""e4m3 weights: one scale per tile, `w ~ e4m3(q) * scale`.

e4m3 (`float8_e4m3fn`: 4 exponent bits, 3 mantissa bits, largest 448, no infinity; arXiv:2209.05433)
keeps a constant relative precision over most of its range, so the plain choice `scale = absmax / 448`
is close to the best one; `search_scale` finds the rest.

Two owners compute the same formula with different roundings, and files are compared bit for bit:

* `quantize_float32`: transformers' fine-grained fp8. Everything in float32, `w * (448 / absmax)`.
* `quantize_in_dtype`: compressed-tensors. Everything in the *model's* dtype: the scale `absmax / 448`
  and the quotient `w / scale` are rounded to bfloat16 before the cast to e4m3.

Tiles are `(bn, bk)`; the last ones may be cut off by the edge of the matrix (zero padding does not
change an absmax).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from quantkit.encoding import E4M3_MAX

#: Below this absmax, 448 / absmax would overflow float32; such tiles use the scale of this absmax.
SMALLEST_ABSMAX = 2.0**-116
_CHUNK = 1 << 24  # weights handled at a time


def tile_grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Number of tiles along (rows, columns), the last ones possibly partial."""
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def _row_chunks(weight: Tensor) -> Iterator[slice]:
    """Row ranges of about 2**24 weights, so that temporaries stay small for any tile size."""
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def _per_weight(per_tile: Tensor, rows: slice, block: tuple[int, int], columns: int) -> Tensor:
    """`[len(rows), columns]`: the value of each weight's tile."""
    index = torch.arange(rows.start, rows.stop, device=per_tile.device) // block[0]
    picked = per_tile[index]
    return picked if block[1] == 1 else picked.repeat_interleave(block[1], dim=1)[:, :columns]


def _column_tiles(rows: Tensor, width: int) -> Tensor:
    """`[rows, K]` -> `[rows, ceil(K / width), width]`, zero padded."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % width)).unflatten(1, (-1, width))


def tile_absmax(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """`[ceil(N/bn), ceil(K/bk)]`, in the weight's dtype: the largest magnitude of each tile."""
    per_row = torch.cat([_column_tiles(weight[rows].abs(), block[1]).amax(2) for rows in _row_chunks(weight)])
    padded = torch.nn.functional.pad(per_row, (0, 0, 0, -per_row.shape[0] % block[0]))
    return padded.unflatten(0, (-1, block[0])).amax(1)


def over_tiles(
    weight: Tensor, scale: Tensor, block: tuple[int, int], op: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """e4m3 bytes (uint8 `[N, K]`) of `op(weight, its tile's scale)`, clamped."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows in _row_chunks(weight):
        codes[rows] = to_e4m3(op(weight[rows], _per_weight(scale, rows, block, weight.shape[1])))
    return codes


def to_e4m3(values: Tensor) -> Tensor:
    """uint8 bytes of the nearest e4m3 values (ties to even); beyond 448 the largest one.

    torch's own treatment of overflow changed between versions, so values are clamped first.
    """
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def quantize_float32(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(codes uint8 `[N, K]`, scale float32 `[tiles]`) with transformers' roundings.

    A tile of zeros gets the scale 1.
    """
    absmax = tile_absmax(weight, block)
    forward = torch.where(absmax > 0, E4M3_MAX / absmax.clamp(min=SMALLEST_ABSMAX), torch.ones_like(absmax))
    return over_tiles(weight, forward, block, torch.mul), 1.0 / forward


def quantize_in_dtype(weight: Tensor, block: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes uint8 `[N, K]`, scale `[tiles]` in `dtype`) with compressed-tensors' roundings.

    `weight` is float32 holding values of `dtype` exactly. A scale that is zero in `dtype` becomes its
    machine epsilon, as the owner has it.
    """
    scale = absmax_scale(tile_absmax(weight, block).to(dtype))

    def divide(rows: Tensor, per_column: Tensor) -> Tensor:
        return rows.to(dtype) / per_column + 0.0  # + 0.0: the owner adds a zero point, -0 becomes 0

    return over_tiles(weight, scale, block, divide), scale


def absmax_scale(absmax: Tensor) -> Tensor:
    """`absmax / 448` in the dtype of `absmax`, never zero."""
    scale = absmax / torch.tensor(E4M3_MAX, dtype=absmax.dtype)
    return torch.where(scale == 0, torch.finfo(absmax.dtype).eps, scale).to(absmax.dtype)


def quantize_given_scale(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Codes (uint8 `[N, K]`) nearest to float32 `weight` for given scales: divided in float32."""
    return over_tiles(weight, scale.float(), block, torch.div)


def search_scale(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Per tile, the scale (dtype kept) with the smallest squared error; never worse than `scale`.

    Tries `scale * 2**(i/16)` over one octave upwards (where the grid's spacing repeats) and a quarter
    octave downwards (clipping the largest weights).
    """
    own = scale.float()
    limit = torch.finfo(scale.dtype).max / E4M3_MAX
    best, lowest = scale.clone(), _tile_errors(weight, own, torch.ones_like(own), block)
    for step in (*range(-4, 0), *range(1, 16)):
        trial = (own * 2.0 ** (step / 16)).to(scale.dtype)
        usable = (trial > torch.finfo(scale.dtype).tiny) & (trial.float() < limit)
        # An unusable trial (subnormal, infinite) is measured as the present scale: no better.
        ratio = torch.where(usable, trial.float() / own, torch.ones_like(own))
        error = _tile_errors(weight, own, ratio, block)
        better = (error < lowest) & usable
        best = torch.where(better, trial, best)
        lowest = torch.where(better, error, lowest)
    return best


def _tile_errors(weight: Tensor, scale: Tensor, ratio: Tensor, block: tuple[int, int]) -> Tensor:
    """Squared errors `[tiles]` at `scale * ratio`, in units of `scale`: nothing over- or underflows."""
    total = torch.zeros_like(scale)
    for rows in _row_chunks(weight):
        unit = weight[rows].float() / _per_weight(scale, rows, block, weight.shape[1])
        factor = _per_weight(ratio, rows, block, weight.shape[1])
        rounded = to_e4m3(unit / factor).view(torch.float8_e4m3fn).float() * factor
        error = _column_tiles((rounded - unit).square(), block[1]).sum(2)
        index = torch.arange(rows.start, rows.stop, device=weight.device) // block[0]
        total.index_add_(0, index, error)
    return total
