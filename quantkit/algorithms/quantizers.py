"""Column quantizers: what GPTQ rounds to. One object holds the grids of all groups of a weight.

A quantizer works on the transposed weight: a *column* of `W[N, K]` is a contiguous row of `[K, N]`.
Every value it produces is `level * scale[group]`, which is what lets `refine` re-fit scales without
knowing the grid: levels are `q - zero` for affine grids and table entries for codebooks.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from quantkit.algorithms.grid import AffineGrid, encode, search_grid, store_scale


class ColumnQuantizer(Protocol):
    """The grids of `groups` groups for `rows` output rows; `scale` is float32 `[groups, rows]`."""

    scale: Tensor

    def fit(self, group: int, columns: Tensor, importance: Tensor | None) -> None:
        """Choose the grid of `group` for `columns` `[g, N]`, errors weighted by `importance` `[g]`."""

    def round(self, column: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """`(codes, levels)` nearest to `column` (`[N]` or `[m, N]`), both float."""

    def levels(self, codes: Tensor, group_of: Tensor) -> Tensor:
        """Levels `[K, N]` of `codes` `[K, N]` whose column i lies in group `group_of[i]`."""

    def stored(self, scale: Tensor) -> Tensor:
        """`scale` as the file will hold it (float32)."""


class AffineColumns:
    """Affine grids: `value = (q - zero) * scale` (see `quantkit.algorithms.grid`)."""

    def __init__(self, grid: AffineGrid, groups: int, rows: int, device: torch.device) -> None:
        self.grid = grid
        self.scale = torch.ones(groups, rows, device=device)
        self.zero = torch.full((groups, rows), float(grid.middle), device=device)

    def fit(self, group: int, columns: Tensor, importance: Tensor | None) -> None:
        scale, zero = search_grid(columns.t().contiguous(), self.grid, importance)
        self.scale[group], self.zero[group] = scale, zero

    def round(self, column: Tensor, group: int) -> tuple[Tensor, Tensor]:
        zero = self.zero[group]
        codes = encode(column, self.scale[group], zero, self.grid.top)
        return codes, codes - zero

    def levels(self, codes: Tensor, group_of: Tensor) -> Tensor:
        return codes - self.zero[group_of]

    def stored(self, scale: Tensor) -> Tensor:
        return store_scale(scale, self.grid.scale_dtype)


class CodebookColumns:
    """Codebook grids: `value = table[q] * scale`, scale = absmax of the group (NF4, FP4).

    `table` is float32 `[16]`, ascending or not; groups must be runs of one row, i.e. K a multiple of
    the block size.
    """

    def __init__(self, table: Tensor, groups: int, rows: int, device: torch.device) -> None:
        self.table = table.to(device=device, dtype=torch.float32)
        self.sorted, self.code_of = torch.sort(self.table)
        self.edges = (self.sorted[1:] + self.sorted[:-1]) / 2
        self.scale = torch.ones(groups, rows, device=device)

    def fit(self, group: int, columns: Tensor, importance: Tensor | None) -> None:
        largest = columns.abs().amax(0)
        self.scale[group] = torch.where(largest > 0, largest, torch.ones_like(largest))

    def round(self, column: Tensor, group: int) -> tuple[Tensor, Tensor]:
        codes = self.code_of[torch.bucketize(column / self.scale[group], self.edges)]
        return codes.float(), self.table[codes]

    def levels(self, codes: Tensor, group_of: Tensor) -> Tensor:
        return self.table[codes.long()]

    def stored(self, scale: Tensor) -> Tensor:
        return scale.clamp(min=torch.finfo(torch.float32).tiny)
