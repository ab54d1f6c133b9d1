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
from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.encoding import E4M3_MAX

#: Below this absmax, 448 / absmax would overflow float32; such tiles use the scale of this absmax.
SMALLEST_ABSMAX = 2.0**-116


def tile_grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Number of tiles along (rows, columns), the last ones possibly partial."""
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def tile_absmax(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """`[ceil(N/bn), ceil(K/bk)]`, in the weight's dtype: the largest magnitude of each tile."""
    rows, cols = tile_grid((weight.shape[0], weight.shape[1]), block)
    bands = []
    for i in range(rows):  # one band of tiles at a time: no padded copy of the whole weight
        band = weight[i * block[0] : (i + 1) * block[0]].abs().amax(dim=0)
        band = torch.nn.functional.pad(band, (0, cols * block[1] - band.numel()))
        bands.append(band.view(cols, block[1]).amax(dim=1))
    return torch.stack(bands)


def over_tiles(
    weight: Tensor, scale: Tensor, block: tuple[int, int], op: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """e4m3 bytes (uint8 `[N, K]`) of `op(weight, scale)`, clamped, applied band by band."""
    n, k = weight.shape
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    for i in range(scale.shape[0]):
        rows = slice(i * block[0], min(n, (i + 1) * block[0]))
        per_column = scale[i].repeat_interleave(block[1])[:k]
        codes[rows] = to_e4m3(op(weight[rows], per_column))
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
    dtype = scale.dtype
    best = scale.clone()
    limit = torch.finfo(dtype).max / E4M3_MAX
    for i in range(scale.shape[0]):
        band = weight[i * block[0] : (i + 1) * block[0]].float()
        # Relative to the tile's own scale, so that no error over- or underflows.
        own = best[i].float().repeat_interleave(block[1])[: band.shape[1]]
        unit = band / own
        lowest = _tile_errors(unit, torch.ones_like(own), block[1], scale.shape[1])
        for step in (*range(-4, 0), *range(1, 16)):
            trial = (scale[i].float() * 2.0 ** (step / 16)).to(dtype)
            usable = (trial > torch.finfo(dtype).tiny) & (trial.float() < limit)
            ratio = (trial.float() / scale[i].float()).repeat_interleave(block[1])[: band.shape[1]]
            error = _tile_errors(unit, ratio, block[1], scale.shape[1])
            better = (error < lowest) & usable
            best[i] = torch.where(better, trial, best[i])
            lowest = torch.where(better, error, lowest)
    return best


def _tile_errors(unit: Tensor, ratio: Tensor, width: int, tiles: int) -> Tensor:
    rounded = to_e4m3(unit / ratio).view(torch.float8_e4m3fn).float() * ratio
    error = (rounded - unit).square().sum(dim=0)
    return torch.nn.functional.pad(error, (0, tiles * width - error.numel())).view(tiles, width).sum(dim=1)
