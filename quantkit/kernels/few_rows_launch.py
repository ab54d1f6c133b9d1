"""Launch of the kernels that pass shared memory by: one row of x (`gemv_kernel`), or a few (`few_rows_kernel`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantkit.kernels import gemv_launch, launch
from quantkit.kernels.few_rows import few_rows_kernel
from quantkit.kernels.gemv_launch import KINDS
from quantkit.kernels.launch_weight import Kind, LaunchWeight


@dataclass(frozen=True)
class FewRowsConfig:
    """Tile of `few_rows_kernel`: `steps` warps side by side along K, each with `blocks` blocks of `slices` times four
    units of `unit` inputs at a time; `tiles` times 16 / `slices` rows of W in a program. 64 inputs in a unit are for
    three bits."""

    steps: int
    tiles: int
    blocks: int
    unit: int = 32
    slices: int = 1
    resident: int = 0
    ahead: int = 1


#: Affine codes that this kernel or `gemv_kernel` decodes.
AFFINE_BITS = (3, 4)
_WIDEST = 1 << 31
#: kind -> (largest N, tiles, the fastest first), by measurement (docs/benchmarks/kernels-h100.md).
CONFIGS: dict[Kind, list[tuple[int, list[FewRowsConfig]]]] = {
    "codebook": [
        (4096, [FewRowsConfig(8, 1, 1)]),
        (8192, [FewRowsConfig(4, 1, 2)]),
        (12288, [FewRowsConfig(4, 1, 1)]),
        (_WIDEST, [FewRowsConfig(4, 2, 1)]),
    ],
    "affine4": [
        (8191, []),  # `affine_gemm` is as fast there
        (8192, [FewRowsConfig(8, 1, 1)]),
        (12288, [FewRowsConfig(4, 1, 2)]),
        (16384, [FewRowsConfig(4, 1, 1)]),
        (_WIDEST, [FewRowsConfig(2, 2, 2)]),
    ],
    "affine3": [
        (4096, [FewRowsConfig(8, 2, 1, 64), FewRowsConfig(8, 1, 2)]),
        (6144, [FewRowsConfig(8, 1, 1, 64), FewRowsConfig(4, 2, 2)]),
        (8192, [FewRowsConfig(8, 2, 1, 64), FewRowsConfig(4, 2, 2)]),
        (12288, [FewRowsConfig(4, 1, 1, 64), FewRowsConfig(4, 2, 2)]),
        (_WIDEST, [FewRowsConfig(4, 2, 1, 64), FewRowsConfig(4, 2, 2)]),
    ],
}
#: From this K on, one row of three bits is faster here than through `gemv_kernel`.
ONE_ROW_INPUTS = 8192
#: Columns of an mma: rows of x times the groups of a block.
COLUMNS = 8
_HALVES = (torch.float16, torch.bfloat16)


def tiles(kind: Kind, n: int) -> list[FewRowsConfig]:
    """Tiles for a weight of n rows, the fastest first."""
    return next(found for most, found in CONFIGS[kind] if n <= most)


@cache
def _tile(kind: Kind, m: int, n: int, k: int, group: int) -> FewRowsConfig | None:
    """The tile for `x [m, k]` and a weight `[n, k]`; None where rows are left over, groups and blocks do not fit."""
    for tile in tiles(kind, n):
        block = 4 * tile.unit
        columns = block // group if 0 < group < block else 1
        fits = columns * group == block or group % block == 0  # 0: one group per row
        whole = fits and columns <= 4 and m * columns <= COLUMNS and k % tile.unit == 0
        if group:  # groups of a row come in whole blocks
            whole = whole and k % group == 0 and k // group % columns == 0
        if kind == "affine4" and columns == 1:
            whole = False  # `affine_gemm` is as fast, with more rows faster
        if whole and n % (16 * tile.tiles) == 0:
            return tile
    return None


def tile_for(x: Tensor, weight: LaunchWeight) -> FewRowsConfig | None:
    """The tile with which the kernel multiplies `x [M, K]`, or None: it does not cover this product.

    It covers two to eight rows (at most four in groups of half a block, two of a quarter), and one row of a wide
    weight of three bits; float16 or bfloat16 at aligned addresses, on NVIDIA; weights as `_tile` says.
    """
    (m, k), kind, codes = x.shape, weight.kind, weight.codes
    if m == 1 and (kind != "affine3" or k < ONE_ROW_INPUTS):
        return None
    if m > COLUMNS or kind not in KINDS or x.dtype not in _HALVES or not launch.has_ptx():
        return None
    aligned = (x.data_ptr() | codes.data_ptr()) % 16 == 0 and (m == 1 or x.stride(0) % 8 == 0)
    if kind != "codebook":  # rows of their own; a codebook's follow one another
        aligned = aligned and codes.stride(0) % 16 == 0
    return _tile(kind, m, weight.n, k, weight.group) if aligned and x.stride(1) == 1 else None


def launch_few_rows(
    x: Tensor, weight: LaunchWeight, bias: Tensor | None, tile: FewRowsConfig, asm: bool = True
) -> Tensor:
    """`x [M, K]`, its columns in the weight's order, times W plus `bias [N]`: `[M, N]` in the dtype of x.

    `asm=False` runs on portable loads and products.
    """
    kind, n, group, codes, scale, zero, lut, _, _ = weight
    m, k = x.shape
    out = x.new_empty((m, n))
    row_bytes = codes.stride(0) if kind != "codebook" else k // 2
    count = n * tile.slices // (16 * tile.tiles)
    programs = min(count, 132 * tile.resident) if tile.resident else count
    launch.launch(
        few_rows_kernel,
        (programs,),
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
        H=tile.blocks,
        U=tile.unit,
        GROUP=group,
        EVEN_K=k % (tile.steps * tile.blocks * tile.slices * 4 * tile.unit) == 0,
        HAS_BIAS=bias is not None,
        ASM=asm,
        THREADS=32 * tile.steps,
        AHEAD=tile.ahead,
        num_warps=tile.steps,
        num_stages=1,
    )
    return out


def multiply(x: Tensor, weight: LaunchWeight, bias: Tensor | None) -> Tensor | None:
    """`x [M, K]` times the weight plus `bias [N]`: `[M, N]`; None where neither kernel covers the product."""
    few = tile_for(x, weight)
    one = gemv_launch.tile_for(x, weight) if few is None else None
    if one is None and few is None:
        return None
    if weight.perm is not None:
        x = x.index_select(1, weight.perm)
    if few is not None:
        return launch_few_rows(x, weight, bias, few)
    assert one is not None
    return gemv_launch.launch_gemv(x, weight, bias, one)
