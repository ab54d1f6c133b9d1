"""Thresholds and tile shapes of the Triton kernels: data, measured and shipped; nothing is tuned at run time.

`docs/benchmarks/kernels-h100.md` and `kernels-h200.md` say how each number was found. Other devices start from the same
tables: what was measured where is in `MEASURED_ON`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from quantkit.kernels import tuned

MEASURED_ON = "NVIDIA H100 and H200 (sm_90, 132 multiprocessors), torch 2.11, triton 3.6"


@dataclass(frozen=True)
class GemmConfig:
    """Tile of a fused product: rows BN, columns BM of x.T, inputs BK per slice, KS slices.

    `affine_gemm_kernel` runs more than one slice, `warps` of them at a time; `affine_gemm_wide_kernel`
    runs one. `split` programs share a row's K.
    """

    rows: int  # BN
    columns: int  # BM
    inputs: int  # BK, at most the group size
    slices: int  # KS
    split: int = 1
    stages: int = 3
    warps: int = 4


@dataclass(frozen=True)
class BackwardConfig:
    """Tile of `affine_backward_kernel`: BM rows of dx, BK columns, BN outputs per step, split over N."""

    rows: int
    columns: int
    outputs: int
    split: int = 1
    stages: int = 3
    warps: int = 4


#: Largest M for which the fused kernel beats dequantizing and calling the vendor's BLAS.
FUSED_ROWS = 128
#: The same for three bits, whose two planes of codes are twice the products.
FUSED_ROWS_3BIT = 64
#: The same for dx = dy @ W: see `fused_backward`.
FUSED_BACKWARD_ROWS = 128
#: Largest M for which norm, gate and residual join the product in one launch.
ONE_LAUNCH_ROWS = 16
#: Most bytes of dense weight that one slice of dequantize-then-BLAS takes.
SLICE_BYTES = 128 << 20
#: From BACKWARD_SLICED_ROWS on, dx is computed in at least this many slices: a third of the extra memory at
#: about the same speed. With fewer rows the slices' own launches would cost more than the product.
BACKWARD_SLICES = 3
#: Rows and columns of the tiles in which the vendor's BLAS makes large products (sm_90).
BLAS_TILE = (128, 256)
BACKWARD_SLICED_ROWS = 2048


def gemm_config(m: int, n: int, k: int, bits: int) -> GemmConfig:
    """Tile for `x [m, k]` times `W [n, k]`, m up to FUSED_ROWS."""
    found = tuned.find("affine", bits, m, n, k, GemmConfig)
    if found is not None:
        return found
    if bits == 3 and m <= 64:
        return _gemm_config3(m, n)
    if m <= 8:
        if n <= 6144 or (m == 1 and (k >= 8192 or bits == 8)):
            return GemmConfig(16, 8, 128, 8)
        return GemmConfig(32, 8, 128, 8 if m > 1 and n <= 12288 else 4)
    if m <= 16:
        if n <= 6144:
            return GemmConfig(32, 16, 128, 4, split=2 if k >= 2 * n else 1)
        return GemmConfig(32 if n <= 12288 or bits == 8 else 64, 16, 128, 4)
    if m <= 32:
        if bits == 8:
            rows = 64 if 6144 < n <= 12288 else 128
            return GemmConfig(rows, 32, 128, 1, split=4 if n <= 12288 else 1)
        if n <= 6144:
            return GemmConfig(32, 32, 128, 4)
        if 8192 < n <= 16384:
            return GemmConfig(64, 32, 128, 1)
        return GemmConfig(128, 32, 128, 1, split=4)
    if m <= 64:
        if bits == 8:
            if n <= 12288:
                return GemmConfig(128, 64, 128, 1, split=4, warps=8 if n <= 6144 else 4)
            return GemmConfig(64, 64, 128, 1)
        return GemmConfig(128, 64, 128, 1, split=4 if n <= 8192 else 1)
    split = 4 if n <= 6144 else 2 if n <= 8192 or (bits == 8 and n > 16384) else 1
    return GemmConfig(64, 128, 128, 1, split=split)


def _gemm_config3(m: int, n: int) -> GemmConfig:
    """Three bits are two planes of codes, twice the products and twice the pieces of memory."""
    if m <= 8:
        return GemmConfig(16 if n <= 6144 else 32, 8, 256, 4)
    if m <= 16:
        return GemmConfig(32, 16, 256, 4)
    return GemmConfig(64, 32 if m <= 32 else 64, 128, 1, split=4 if n <= 8192 else 1)


def fused_backward(kind: str, m: int, n: int, k: int, bits: int) -> bool:
    """Is `dy [m, n]` times `W [n, k]` fused? Otherwise slices of W go through the vendor's BLAS, there as fast.

    `kind` is "affine", "codebook" or "float8".
    """
    if kind == "codebook":
        return m <= 64
    if bits == 3:
        return False
    return m <= (FUSED_BACKWARD_ROWS if kind == "float8" or n * k > 1 << 25 else 64)


def backward_config(kind: str, m: int, n: int, k: int) -> BackwardConfig:
    """Tile for `dy [m, n]` times `W [n, k]`, where fused."""
    if m <= 16:
        return BackwardConfig(16, 128, 64, split=16 if kind == "affine" and k <= 4096 else 8)
    if m <= 64:
        return BackwardConfig(64, 128, 64, split=8 if kind != "codebook" and k <= 4096 else 4)
    if k <= 4096 or kind == "codebook":
        return BackwardConfig(64, 128, 64, split=4)
    return BackwardConfig(128, 128, 64, split=4, warps=4 if kind == "affine" else 8)


@cache
def fit_inputs(config: GemmConfig, k: int, group: int, parts: int) -> tuple[GemmConfig, bool]:
    """The config with `inputs` cut to the group, and whether one scale serves a row of the tile.

    `group` is 0 for one group per row. A dot needs 16 bytes of codes, so 16 * parts inputs. With several slices
    `inputs` may be two or four groups, which the kernel takes apart: then one scale serves a row of each.
    """
    least = 16 * parts

    def row_scales(inputs: int) -> bool:
        if group == 0 or group % inputs == 0:
            return True
        return config.slices > 1 and group >= least and inputs in (2 * group, 4 * group)

    inputs = max(config.inputs, least)
    while inputs > least and (not row_scales(inputs) or inputs // 2 >= k):
        inputs //= 2
    slices = config.slices
    while slices > 2 and inputs * slices // 2 >= k:
        slices //= 2
    return replace(config, inputs=inputs, slices=slices), row_scales(inputs)
