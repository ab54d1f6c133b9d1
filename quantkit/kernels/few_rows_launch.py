"""Launch of `few_rows_kernel`: one to sixteen rows of x times four- or three-bit weights, where it covers them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quantkit.kernels import launch
from quantkit.kernels.few_rows import few_rows_kernel
from quantkit.kernels.few_rows_loads import AFFINE3, AFFINE4, CODEBOOK
from quantkit.kernels.few_rows_tuning import COLUMNS, TABLES, FewRowsConfig, tiles
from quantkit.kernels.launch_weight import Kind, LaunchWeight
from quantkit.kernels.sliced import multiprocessors

#: The decodings of the kernel: its `KIND`.
KINDS: dict[Kind, int] = {"codebook": CODEBOOK.value, "affine4": AFFINE4.value, "affine3": AFFINE3.value}
#: Affine codes that it decodes.
AFFINE_BITS = (3, 4)
_HALVES = (torch.float16, torch.bfloat16)


def tables() -> int:
    """How many tables of values a multiprocessor's memory holds."""
    return TABLES.get(launch.target()[1], 2)


@cache
def _tile(kind: Kind, m: int, n: int, k: int, group: int, held: int) -> FewRowsConfig | None:
    """The tile for `x [m, k]` and a weight `[n, k]`; None where rows are left over, groups and slices do not fit.

    `held`: `tables`. Two warps on a table are enough only where a multiprocessor has six.
    """
    for tile in tiles(kind, n, k, group):
        if kind == "codebook" and tile.steps == 2 and held < 6:
            continue
        columns = tile.columns(group)
        if columns is None or m * columns * tile.slices > COLUMNS * tile.blocks or k % tile.unit:
            continue
        if group and (k % group or k // group % columns):  # groups of a row come in whole slices
            continue
        if n * tile.slices % (16 * tile.tiles) == 0:
            return tile
    return None


def tile_for(x: Tensor, weight: LaunchWeight) -> FewRowsConfig | None:
    """The tile with which the kernel multiplies `x [M, K]`, or None: it does not cover this product.

    It covers one to sixteen rows where `CONFIGS` says so (at most eight in groups of half a slice, four of a quarter);
    float16 or bfloat16 at aligned addresses, on NVIDIA; weights as `_tile` says.
    """
    (m, k), kind, codes = x.shape, weight.kind, weight.codes
    if m > 2 * COLUMNS or kind not in KINDS or x.dtype not in _HALVES or not launch.has_ptx():
        return None
    aligned = (x.data_ptr() | codes.data_ptr()) % 16 == 0 and (m == 1 or x.stride(0) % 8 == 0)
    if kind != "codebook":  # rows of their own; a codebook's follow one another
        aligned = aligned and codes.stride(0) % 16 == 0
    return _tile(kind, m, weight.n, k, weight.group, tables()) if aligned and x.stride(1) == 1 else None


def programs(tile: FewRowsConfig, kind: Kind, count: int, device: torch.device) -> int:
    """How many programs share `count` tiles."""
    units = multiprocessors(device)
    return min(count, tile.resident(kind, tables()) * units) if units and tile.shared else count


def launch_few_rows(
    x: Tensor,
    weight: LaunchWeight,
    bias: Tensor | None,
    tile: FewRowsConfig,
    asm: bool = True,
    most: int | None = None,
) -> Tensor:
    """`x [M, K]`, its columns in the weight's order, times W plus `bias [N]`: `[M, N]` in the dtype of x.

    `asm=False` runs on portable loads and products; `most`: programs, instead of what the tile says.
    """
    kind, n, group, codes, scale, zero, lut, _, _ = weight
    m, k = x.shape
    out = x.new_empty((m, n))
    row_bytes = codes.stride(0) if kind != "codebook" else k // 2
    count = n * tile.slices // (16 * tile.tiles)
    grid = programs(tile, kind, count, x.device) if most is None else min(most, count)
    launch.launch(
        few_rows_kernel,
        (grid,),
        x,
        codes,
        scale,
        zero if zero is not None else scale,
        lut if lut is not None else scale,
        bias if bias is not None else x,
        out,
        m,
        n,
        k,
        row_bytes,
        k // 4,  # where three bits' plane of top bits begins
        k // group if group else 1,
        x.stride(0),
        count,
        KIND=KINDS[kind],
        KS=tile.steps,
        S=tile.slices,
        R=tile.tiles,
        U=tile.unit,
        GROUP=group,
        EVEN_K=k % (tile.steps * tile.slices * 4 * tile.unit) == 0,
        HAS_BIAS=bias is not None,
        ASM=asm,
        THREADS=32 * tile.steps,
        B=tile.blocks,
        num_warps=tile.steps,
        num_stages=1,
        maxnreg=tile.registers,
    )
    return out


def multiply(x: Tensor, weight: LaunchWeight, bias: Tensor | None) -> Tensor | None:
    """`x [M, K]` times the weight plus `bias [N]`: `[M, N]`; None where the kernel does not cover the product."""
    tile = tile_for(x, weight)
    if tile is None:
        return None
    if weight.perm is not None:
        x = x.index_select(1, weight.perm)
    return launch_few_rows(x, weight, bias, tile)
