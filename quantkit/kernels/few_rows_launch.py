"""Launch of `few_rows_kernel`: one to eight rows of x times four- or three-bit weights, where it covers them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantkit.kernels import launch
from quantkit.kernels.few_rows import few_rows_kernel
from quantkit.kernels.few_rows_loads import AFFINE3, AFFINE4, CODEBOOK
from quantkit.kernels.launch_weight import Kind, LaunchWeight
from quantkit.kernels.sliced import multiprocessors

#: The decodings of the kernel: its `KIND`.
KINDS: dict[Kind, int] = {"codebook": CODEBOOK.value, "affine4": AFFINE4.value, "affine3": AFFINE3.value}
#: Affine codes that it decodes.
AFFINE_BITS = (3, 4)


@dataclass(frozen=True)
class FewRowsConfig:
    """Tile of `few_rows_kernel`: `steps` warps side by side along K, each with `slices` times four units of `unit`
    inputs at a time; `tiles` times 16 / `slices` rows of W at a time. 64 inputs in a unit are for three bits.
    `resident`: programs for each multiprocessor, which share the tiles; 0: a program for each tile."""

    steps: int
    tiles: int
    unit: int = 32
    slices: int = 1
    resident: int = 0

    @property
    def registers(self) -> int | None:
        """Most registers of a thread; None: the compiler's choice."""
        return REGISTERS if self.tiles <= 2 else None

    def columns(self, group: int) -> int | None:
        """Columns of a slice, one for each of its groups (0: one group per row); None where they do not fit."""
        inputs = 4 * self.unit
        columns = inputs // group if 0 < group < inputs else 1
        fits = columns * group == inputs or group % inputs == 0
        return columns if fits and columns <= 4 else None


_T = FewRowsConfig
_WIDEST = 1 << 31
#: (kind, are groups shorter than 128) -> (largest N, tiles), of which the first that fits x and the groups is taken:
#: for one row of x, for two, for three and four, for more. By measurement (docs/benchmarks/kernels-h100.md).
CONFIGS: dict[tuple[Kind, bool], list[tuple[int, list[FewRowsConfig]]]] = {
    ("codebook", True): [
        (4096, [_T(4, 2, slices=4), _T(8, 2, slices=2), _T(8, 1)]),
        (6144, [_T(4, 2, slices=2), _T(4, 1)]),
        (8192, [_T(4, 2, slices=4, resident=4), _T(4, 2, slices=2), _T(8, 2)]),
        (12288, [_T(4, 2, slices=4, resident=4), _T(8, 1, slices=2, resident=2), _T(4, 2)]),
        (16384, [_T(4, 2, slices=4, resident=4), _T(4, 2, slices=2, resident=4), _T(4, 2)]),
        (_WIDEST, [_T(4, 2, slices=4, resident=4), _T(4, 2, slices=2, resident=4), _T(8, 2)]),
    ],
    ("affine4", True): [
        (4096, [_T(4, 2, slices=4), _T(8, 2, slices=2), _T(8, 1)]),
        (6144, [_T(2, 2, slices=4), _T(4, 2, slices=2), _T(8, 2)]),
        (8192, [_T(4, 2, slices=4, resident=4), _T(4, 2, slices=2), _T(8, 2)]),
        (12288, [_T(4, 2, slices=4, resident=4), _T(2, 2, slices=2), _T(4, 1)]),
        (16384, [_T(4, 2, slices=4, resident=4), _T(2, 2, slices=2), _T(4, 2)]),
        (_WIDEST, [_T(4, 2, slices=4, resident=4), _T(8, 2, slices=2, resident=2), _T(4, 2)]),
    ],
    ("affine4", False): [  # five and more rows: `affine_gemm` is as fast or faster but for 8193 to 16384
        (4096, [_T(2, 2, slices=8), _T(4, 2, slices=4), _T(8, 2, slices=2)]),
        (8192, [_T(2, 2, slices=4), _T(4, 2, slices=2)]),
        (
            16384,
            [_T(2, 2, slices=8, resident=8), _T(4, 2, slices=4, resident=4), _T(2, 2, slices=2), _T(4, 2)],
        ),
        (_WIDEST, [_T(2, 2, slices=8, resident=8), _T(4, 2, slices=4, resident=4), _T(2, 2, slices=2)]),
    ],
    ("affine3", False): [
        (4096, [_T(2, 2, slices=8), _T(4, 2, slices=4), _T(8, 2, slices=2), _T(8, 1)]),
        (6144, [_T(2, 2, slices=4), _T(4, 2, slices=2), _T(8, 2)]),
        (8192, [_T(2, 2, 64, 4), _T(2, 2, slices=4), _T(4, 2, slices=2), _T(8, 2)]),
        (
            12288,
            [_T(2, 2, slices=8, resident=8), _T(4, 2, slices=4, resident=4), _T(2, 2, slices=2), _T(4, 2)],
        ),
        (16384, [_T(2, 2, slices=4), _T(4, 2, slices=2), _T(4, 2)]),
        (_WIDEST, [_T(2, 4, 64, 4, 8), _T(2, 2, slices=4), _T(2, 2, slices=2), _T(4, 2)]),
    ],
}
CONFIGS["codebook", False] = CONFIGS["codebook", True]
CONFIGS["affine3", True] = CONFIGS["affine3", False]
#: Registers of a thread for tiles of up to 32 rows of W: four warps a scheduler. Said to the compiler it also orders
#: instructions for so many, which is faster by itself; larger tiles would spill.
REGISTERS = 128
#: Columns of an mma: rows of x times slices times the groups of a slice.
COLUMNS = 8
_HALVES = (torch.float16, torch.bfloat16)


def tiles(kind: Kind, n: int, group: int) -> list[FewRowsConfig]:
    """Tiles for a weight of n rows with groups of `group` (0: one a row), the fastest first."""
    return next(found for most, found in CONFIGS[kind, 0 < group < 128] if n <= most)


@cache
def _tile(kind: Kind, m: int, n: int, k: int, group: int) -> FewRowsConfig | None:
    """The tile for `x [m, k]` and a weight `[n, k]`; None where rows are left over, groups and slices do not fit."""
    for tile in tiles(kind, n, group):
        columns = tile.columns(group)
        if columns is None or m * columns * tile.slices > COLUMNS or k % tile.unit:
            continue
        if group and (k % group or k // group % columns):  # groups of a row come in whole slices
            continue
        if n * tile.slices % (16 * tile.tiles) == 0:
            return tile
    return None


def tile_for(x: Tensor, weight: LaunchWeight) -> FewRowsConfig | None:
    """The tile with which the kernel multiplies `x [M, K]`, or None: it does not cover this product.

    It covers one to eight rows (at most four in groups of half a slice, two of a quarter, and of four bits in longer
    groups where `CONFIGS` says so); float16 or bfloat16 at aligned addresses, on NVIDIA; weights as `_tile` says.
    """
    (m, k), kind, codes = x.shape, weight.kind, weight.codes
    if m > COLUMNS or kind not in KINDS or x.dtype not in _HALVES or not launch.has_ptx():
        return None
    aligned = (x.data_ptr() | codes.data_ptr()) % 16 == 0 and (m == 1 or x.stride(0) % 8 == 0)
    if kind != "codebook":  # rows of their own; a codebook's follow one another
        aligned = aligned and codes.stride(0) % 16 == 0
    return _tile(kind, m, weight.n, k, weight.group) if aligned and x.stride(1) == 1 else None


def programs(tile: FewRowsConfig, count: int, device: torch.device) -> int:
    """How many programs share `count` tiles."""
    most = tile.resident * multiprocessors(device)
    return min(count, most) if most else count


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
    launch.launch(
        few_rows_kernel,
        (programs(tile, count, x.device) if most is None else min(most, count),),
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
