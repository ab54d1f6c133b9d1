"""Launch of `gemv_kernel`: one row of x times four- or three-bit weights, where it covers them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantkit.kernels import launch
from quantkit.kernels.gemv import AFFINE3, AFFINE4, CODEBOOK, gemv_kernel


@dataclass(frozen=True)
class GemvConfig:
    """Rows BN side by side in a program, KS steps of 256 inputs at a time, R rows per thread."""

    rows: int
    steps: int
    per_thread: int
    warps: int


#: kind -> (largest N, tile), by measurement (docs/benchmarks/kernels-h100.md).
CONFIGS: dict[int, list[tuple[int, GemvConfig]]] = {
    CODEBOOK.value: [(4096, GemvConfig(4, 8, 4, 8)), (1 << 31, GemvConfig(4, 4, 4, 4))],
    AFFINE4.value: [
        (4096, GemvConfig(4, 8, 4, 8)),
        (6144, GemvConfig(4, 4, 2, 4)),
        (1 << 31, GemvConfig(4, 4, 4, 4)),
    ],
    AFFINE3.value: [(1 << 31, GemvConfig(4, 4, 4, 4))],
}
#: From this group size on, four bits of wide weights (K >= N) stay with `affine_gemm`, which is faster there.
LONG_GROUP = 128
_HALVES = (torch.float16, torch.bfloat16)
_KINDS = {4: AFFINE4.value, 3: AFFINE3.value}


def kind_of(bits: int) -> int | None:
    """The kernel's name for affine codes of `bits`; None if it has no decoding for them."""
    return _KINDS.get(bits)


def config(kind: int, n: int) -> GemvConfig:
    """Tile for a weight of n rows."""
    return next(tile for most, tile in CONFIGS[kind] if n <= most)


@cache
def _tile(kind: int, n: int, k: int, group: int) -> GemvConfig | None:
    """The tile for a weight `[n, k]`; None where its units cross groups, rows are left over, or `affine_gemm` is
    faster."""
    if k % (64 if kind == AFFINE3.value else 32) or group % 32 or (group and k % group):
        return None
    if kind == AFFINE4.value and (group == 0 or group >= LONG_GROUP) and k >= n:
        return None
    tile = config(kind, n)
    return None if n % (tile.rows * tile.per_thread) else tile


def tile_for(x: Tensor, codes: Tensor, kind: int | None, n: int, group: int) -> GemvConfig | None:
    """The tile with which the kernel multiplies `x [M, K]`, or None: it does not cover this product.

    It covers one row of float16 or bfloat16 at aligned addresses, on NVIDIA; weights as `_tile` says. `group` is 0
    for one group per row.
    """
    if kind is None or x.shape[0] != 1 or x.dtype not in _HALVES or not launch.has_ptx():
        return None
    aligned = x.data_ptr() % 16 == 0 and codes.data_ptr() % 16 == 0
    if codes.dim() == 2:  # rows of their own; a codebook's follow one another
        aligned = aligned and codes.stride(0) % (8 if kind == AFFINE3.value else 16) == 0
    return _tile(kind, n, x.shape[1], group) if aligned else None


def launch_gemv(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    lut: Tensor | None,
    bias: Tensor | None,
    kind: int,
    n: int,
    group: int,
    tile: GemvConfig,
    asm: bool = True,
) -> Tensor:
    """`x [1, K]` times the weight `[n, K]` plus `bias [n]`: `[1, n]` in the dtype of x.

    `codes`, `scale`, `zero` and `lut` as in `quantkit.encoding`; `group` is 0 for one group per row. `asm=False`
    runs on portable loads.
    """
    k = x.shape[1]
    out = x.new_empty((1, n))
    row_bytes = codes.stride(0) if codes.dim() == 2 else k // 2
    launch.launch(
        gemv_kernel,
        (n // (tile.rows * tile.per_thread),),
        x,
        codes,
        scale,
        zero if zero is not None else scale,
        lut if lut is not None else scale,
        bias if bias is not None else x,
        out,
        k,
        row_bytes,
        k // 4,  # where three bits' plane of top bits begins
        k // group if group else 1,
        KIND=kind,
        BN=tile.rows,
        KS=tile.steps,
        R=tile.per_thread,
        GROUP=group,
        EVEN_K=k % (tile.steps * 256) == 0,
        HAS_BIAS=bias is not None,
        ASM=asm,
        THREADS=32 * tile.warps,
        num_warps=tile.warps,
        num_stages=1,
    )
    return out
