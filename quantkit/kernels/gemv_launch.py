"""Launch of `gemv_kernel`: one row of x times four- or three-bit weights, where it covers them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantkit.kernels import launch
from quantkit.kernels.gemv import AFFINE3, AFFINE4, CODEBOOK, gemv_kernel
from quantkit.kernels.launch_weight import Kind, LaunchWeight

#: The decodings of `gemv_kernel` and `few_rows_kernel`: their `KIND`.
KINDS: dict[Kind, int] = {"codebook": CODEBOOK.value, "affine4": AFFINE4.value, "affine3": AFFINE3.value}


@dataclass(frozen=True)
class GemvConfig:
    """Rows BN side by side in a program, KS steps of 256 inputs at a time, R rows per thread."""

    rows: int
    steps: int
    per_thread: int
    warps: int


#: kind -> (largest N, tile), by measurement (docs/benchmarks/kernels-h100.md).
CONFIGS: dict[Kind, list[tuple[int, GemvConfig]]] = {
    "codebook": [(4096, GemvConfig(4, 8, 4, 8)), (1 << 31, GemvConfig(4, 4, 4, 4))],
    "affine4": [
        (4096, GemvConfig(4, 8, 4, 8)),
        (6144, GemvConfig(4, 4, 2, 4)),
        (1 << 31, GemvConfig(4, 4, 4, 4)),
    ],
    "affine3": [(1 << 31, GemvConfig(4, 4, 4, 4))],
}
#: From this group size on, four bits of wide weights (K >= N) stay with `affine_gemm`, which is faster there.
LONG_GROUP = 128
_HALVES = (torch.float16, torch.bfloat16)


def config(kind: Kind, n: int) -> GemvConfig:
    """Tile for a weight of n rows."""
    return next(tile for most, tile in CONFIGS[kind] if n <= most)


@cache
def _tile(kind: Kind, n: int, k: int, group: int) -> GemvConfig | None:
    """The tile for a weight `[n, k]`; None where its units cross groups, rows are left over, or `affine_gemm` is
    faster."""
    if k % (64 if kind == "affine3" else 32) or group % 32 or (group and k % group):
        return None
    if kind == "affine4" and (group == 0 or group >= LONG_GROUP) and k >= n:
        return None
    tile = config(kind, n)
    return None if n % (tile.rows * tile.per_thread) else tile


def tile_for(x: Tensor, weight: LaunchWeight) -> GemvConfig | None:
    """The tile with which the kernel multiplies `x [M, K]`, or None: it does not cover this product.

    It covers one row of float16 or bfloat16 at aligned addresses, on NVIDIA; weights as `_tile` says.
    """
    (m, k), kind, codes = x.shape, weight.kind, weight.codes
    if m != 1 or kind not in KINDS or x.dtype not in _HALVES or not launch.has_ptx():
        return None
    aligned = x.data_ptr() % 16 == 0 and codes.data_ptr() % 16 == 0
    if kind != "codebook":  # rows of their own; a codebook's follow one another
        aligned = aligned and codes.stride(0) % (8 if kind == "affine3" else 16) == 0
    return _tile(kind, weight.n, k, weight.group) if aligned else None


def launch_gemv(
    x: Tensor, weight: LaunchWeight, bias: Tensor | None, tile: GemvConfig, asm: bool = True
) -> Tensor:
    """`x [1, K]`, its columns in the weight's order, times W plus `bias [N]`: `[1, N]` in the dtype of x.

    `asm=False` runs on portable loads.
    """
    kind, n, group, codes, scale, zero, lut, _, _ = weight
    k = x.shape[1]
    out = x.new_empty((1, n))
    row_bytes = codes.stride(0) if kind != "codebook" else k // 2
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
        KIND=KINDS[kind],
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
