"""Round to nearest: the codes closest to each weight on a searched grid, no calibration needed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkit.algorithms.grid import AffineGrid, check_range, encode, search_grid


def fit_groups(
    weight: Tensor, group_size: int, grid: AffineGrid, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`(scale, zero)`, float32 `[N, G]`, for groups of `group_size` inputs of `weight` `[N, K]`.

    The last group may be short. `importance` (`[K]`) weighs the columns.
    """
    n, k = weight.shape
    full = k // group_size
    scales, zeros = [], []
    if full:
        rows = weight[:, : full * group_size].reshape(n * full, group_size)
        weigh = None
        if importance is not None:
            weigh = importance[: full * group_size].view(1, full, group_size)
            weigh = weigh.expand(n, full, group_size).reshape(n * full, group_size)
        scale, zero = search_grid(rows, grid, weigh)
        scales.append(scale.view(n, full))
        zeros.append(zero.view(n, full))
    if full * group_size < k:
        tail = None if importance is None else importance[full * group_size :]
        scale, zero = search_grid(weight[:, full * group_size :].contiguous(), grid, tail)
        scales.append(scale.unsqueeze(1))
        zeros.append(zero.unsqueeze(1))
    return torch.cat(scales, 1), torch.cat(zeros, 1)


def rtn_quantize(
    weight: Tensor, group_size: int, grid: AffineGrid, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(codes uint8 [N, K], scale float32 [N, G], zero float32 [N, G])` by rounding to nearest.

    `weight` is float32 `[N, K]`, any device; NumericsError when it is not finite or too large.
    """
    weight = weight.float()
    k = weight.shape[1]
    check_range(weight, grid)
    scale, zero = fit_groups(weight, group_size, grid, importance)
    repeat = torch.arange(k, device=weight.device) // group_size
    assert scale.shape[1] == math.ceil(k / group_size)
    codes = encode(weight, scale[:, repeat], zero[:, repeat], grid.top)
    return codes.to(torch.uint8), scale, zero
