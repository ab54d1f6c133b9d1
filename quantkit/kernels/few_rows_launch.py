"""Launch of the kernels that pass shared memory by: one row of x (`gemv_kernel`), or a few (`few_rows_kernel`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantkit.kernels import gemv_launch, launch
from quantkit.kernels.few_rows import few_rows_kernel
from quantkit.kernels.gemv import AFFINE3, AFFINE4, CODEBOOK


@dataclass(frozen=True)
class FewRowsConfig:
    """Tile of `few_rows_kernel`: `steps` warps side by side along K, each with `blocks` blocks of four units of
    `unit` inputs at a time; `tiles` times 16 rows of W in a program. 64 inputs in a unit are for three bits."""

    steps: int
    tiles: int
    blocks: int
    unit: int = 32


_WIDEST = 1 << 31
#: kind -> (largest N, tiles, the fastest first), by measurement (docs/benchmarks/kernels-h100.md).
CONFIGS: dict[int, list[tuple[int, list[FewRowsConfig]]]] = {
    CODEBOOK.value: [
        (4096, [FewRowsConfig(8, 1, 1)]),
        (8192, [FewRowsConfig(4, 1, 2)]),
        (12288, [FewRowsConfig(4, 1, 1)]),
        (_WIDEST, [FewRowsConfig(4, 2, 1)]),
    ],
    AFFINE4.value: [
        (8191, []),  # `affine_gemm` is as fast there
        (8192, [FewRowsConfig(8, 1, 1)]),
        (12288, [FewRowsConfig(4, 1, 2)]),
        (16384, [FewRowsConfig(4, 1, 1)]),
        (_WIDEST, [FewRowsConfig(2, 2, 2)]),
    ],
    AFFINE3.value: [
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


def tiles(kind: int, n: int) -> list[FewRowsConfig]:
    """Tiles for a weight of n rows, the fastest first."""
    return next(found for most, found in CONFIGS[kind] if n <= most)


@cache
def _tile(kind: int, m: int, n: int, k: int, group: int) -> FewRowsConfig | None:
    """The tile for `x [m, k]` and a weight `[n, k]`; None where rows are left over, groups and blocks do not fit."""
    for tile in tiles(kind, n):
        block = 4 * tile.unit
        columns = block // group if 0 < group < block else 1
        fits = columns * group == block or group % block == 0  # 0: one group per row
        whole = fits and columns <= 4 and m * columns <= COLUMNS and k % tile.unit == 0
        if group:  # groups of a row come in whole blocks
            whole = whole and k % group == 0 and k // group % columns == 0
        if kind == AFFINE4.value and columns == 1:
            whole = False  # `affine_gemm` is as fast, with more rows faster
        if whole and n % (16 * tile.tiles) == 0:
            return tile
    return None


def tile_for(x: Tensor, codes: Tensor, kind: int | None, n: int, group: int) -> FewRowsConfig | None:
    """The tile with which the kernel multiplies `x [M, K]`, or None: it does not cover this product.

    It covers two to eight rows (at most four in groups of half a block, two of a quarter), and one row of a wide
    weight of three bits; float16 or bfloat16 at aligned addresses, on NVIDIA; weights as `_tile` says. `group` is 0
    for one group per row.
    """
    if kind is None or x.shape[0] > COLUMNS or x.dtype not in _HALVES or not launch.has_ptx():
        return None
    if x.shape[0] == 1 and (kind != AFFINE3.value or x.shape[1] < ONE_ROW_INPUTS):
        return None
    aligned = (x.data_ptr() | codes.data_ptr()) % 16 == 0 and (x.shape[0] == 1 or x.stride(0) % 8 == 0)
    if codes.dim() == 2:  # rows of their own; a codebook's follow one another
        aligned = aligned and codes.stride(0) % 16 == 0
    return _tile(kind, x.shape[0], n, x.shape[1], group) if aligned and x.stride(1) == 1 else None


def launch_few_rows(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    lut: Tensor | None,
    bias: Tensor | None,
    kind: int,
    n: int,
    group: int,
    tile: FewRowsConfig,
    asm: bool = True,
) -> Tensor:
    """`x [M, K]` times the weight `[n, K]` plus `bias [n]`: `[M, n]` in the dtype of x.

    `codes`, `scale`, `zero` and `lut` as in `quantkit.encoding`; `group` is 0 for one group per row. `asm=False`
    runs on portable loads and products.
    """
    m, k = x.shape
    out = x.new_empty((m, n))
    row_bytes = codes.stride(0) if codes.dim() == 2 else k // 2
    launch.launch(
        few_rows_kernel,
        (n // (16 * tile.tiles),),
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
        KIND=kind,
        KS=tile.steps,
        R=tile.tiles,
        H=tile.blocks,
        U=tile.unit,
        GROUP=group,
        EVEN_K=k % (tile.steps * tile.blocks * 4 * tile.unit) == 0,
        HAS_BIAS=bias is not None,
        ASM=asm,
        THREADS=32 * tile.steps,
        num_warps=tile.steps,
        num_stages=1,
    )
    return out


def multiply(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    lut: Tensor | None,
    bias: Tensor | None,
    perm: Tensor | None,
    kind: int | None,
    n: int,
    group: int,
) -> Tensor | None:
    """`x [M, K]`, its columns in the order `perm`, times W: `[M, n]`; None where neither kernel covers the product."""
    few = tile_for(x, codes, kind, n, group)
    one = gemv_launch.tile_for(x, codes, kind, n, group) if few is None else None
    if (one is None and few is None) or kind is None:
        return None
    if perm is not None:
        x = x.index_select(1, perm)
    if few is not None:
        return launch_few_rows(x, codes, scale, zero, lut, bias, kind, n, group, few)
    assert one is not None
    return gemv_launch.launch_gemv(x, codes, scale, zero, lut, bias, kind, n, group, one)
