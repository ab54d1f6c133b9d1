"""Launches of the affine kernels: from tensors to pointers, strides and compile-time constants.

Nothing here waits for the device or depends on a tensor's values, so CUDA graphs capture every launch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from quantkit.kernels import launch as device
from quantkit.kernels import tuning
from quantkit.kernels.affine_backward import affine_backward_kernel
from quantkit.kernels.affine_dequantize import affine_dequantize_kernel
from quantkit.kernels.affine_dequantize3 import affine_dequantize3_kernel
from quantkit.kernels.affine_gemm import affine_gemm_kernel, sum_splits_kernel
from quantkit.kernels.affine_gemm_wide import affine_gemm_wide_kernel, split_inputs_kernel
from quantkit.kernels.launch import cdiv

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_DOT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class AffineWeight(NamedTuple):
    """The packed tensors of one affine weight `[N, K]` (`quantkit.encoding`)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    perm: Tensor | None
    bits: int
    group_size: int

    @property
    def group(self) -> int:
        """Group size, or 0 for one group per row."""
        return 0 if self.scale.shape[1] == 1 else self.group_size

    @property
    def parts(self) -> int:
        """Codes that share a byte of the low plane (3 bits: 4, the top bits lie in another plane)."""
        return 4 if self.bits == 3 else 8 // self.bits

    @property
    def high_offset(self) -> int:
        """Byte offset of the 3-bit layout's top-bit plane inside a row; 0 for the others.

        A row of w low bytes has ceil(w / 2) high ones, so w is two thirds of the row, rounded down.
        """
        return 2 * self.codes.shape[1] // 3 if self.bits == 3 else 0


@dataclass(frozen=True)
class Fusion:
    """What surrounds a product of few rows: see `affine_gemm` for each."""

    residual: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_eps: float = 0.0
    gated: bool = False


_ALONE = Fusion()

#: (kernel, its options with the stages that did not fit) -> one fewer
_fitting_stages: dict[tuple[Any, ...], int] = {}


def launch_fitting(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Launch with as many of `options["STAGES"]` pipeline stages as the chip's shared memory holds."""
    options["num_stages"] = options["STAGES"]
    while _fitting_stages and (fewer := _fitting_stages.get((id(kernel), *options.values()))):
        options["STAGES"] = options["num_stages"] = fewer
    try:
        device.launch(kernel, grid, *arguments, **options)
    except OutOfResources:
        if options["STAGES"] == 1:
            raise
        _fitting_stages[id(kernel), *options.values()] = options["STAGES"] - 1
        launch_fitting(kernel, grid, arguments, options)


def launch_gemm(
    x: Tensor,
    weight: AffineWeight,
    bias: Tensor | None,
    config: tuning.GemmConfig,
    fusion: Fusion | None = None,
    asm: bool | None = None,
) -> Tensor:
    """The fused product of `x [M, K]` with tiles of `config`: `[M, N]` (`[M, N / 2]` when gated)."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    (m, k), n, groups = x.shape, weight.codes.shape[0], weight.scale.shape[1]
    group, parts = weight.group, weight.parts
    if device.target()[0] == "hip":
        # AMD's matrix units take no 8 columns, and Triton cannot lower a tile of several groups for all of them.
        one_group = min(config.inputs, 1 << (group.bit_length() - 1) if group else config.inputs)
        config = replace(config, columns=max(16, config.columns), inputs=one_group)
    config, row_scales = tuning.fit_inputs(config, k, group, parts)
    step = config.inputs * config.slices
    split = config.split if step * config.split <= k and fusion is None else 1
    dot = _DOT[x.dtype]
    if x.dtype == torch.float32 and row_scales and device.has_ptx():
        dot = tl.bfloat16  # in three pieces, see the kernel
    fusion = fusion or _ALONE
    out = x.new_empty((m, n // 2 if fusion.gated else n))
    target = x.new_empty((split, m, n), dtype=torch.float32) if split > 1 else out
    grid = (cdiv(n, config.rows), split, cdiv(m, config.columns))
    if fusion.gated:
        grid = (cdiv(n // 2, config.rows // 2), *grid[1:])
    shape = (m, n, k, weight.codes.stride(0), weight.high_offset, groups)
    options: dict[str, Any] = {
        "BITS": weight.bits,
        "BN": config.rows,
        "BM": config.columns,
        "BKB": config.inputs // parts,
        "SPLIT": split,
        # Scales of every weight would be copied to shared memory as well, for each stage.
        "STAGES": config.stages if row_scales else 1,
        "GROUP": group,
        "ROW_SCALES": row_scales,
        "CENTRED": x.dtype == torch.float32,
        "EVEN_K": k % step == 0,
        "EVEN_N": n % config.rows == 0,
        "HAS_BIAS": bias is not None,
        "DOT": dot,
        "ASM": device.has_ptx() if asm is None else asm,
        "num_warps": config.warps,
    }
    packed = (weight.codes, weight.scale, weight.zero, bias if bias is not None else x)
    if config.slices > 1:
        inputs = x if weight.perm is None else x.index_select(1, weight.perm)
        options |= {
            "KS": config.slices,
            "ONE_ROW": m == 1,
            "HAS_RESIDUAL": fusion.residual is not None,
            "HAS_NORM": fusion.norm_weight is not None,
            "GATED": fusion.gated,
        }
        around = (
            fusion.residual if fusion.residual is not None else x,
            fusion.norm_weight if fusion.norm_weight is not None else x,
        )
        strides = (inputs.stride(0), out.shape[1])
        arguments: tuple[Any, ...] = (inputs, *packed, *around, target, fusion.norm_eps, *shape, *strides)
        launch_fitting(affine_gemm_kernel, grid, arguments, options)
    else:
        tile = config.inputs // parts
        inputs, sums = launch_split_inputs(x, weight.perm, parts, tile)
        eighths = inputs
        if weight.bits == 3 and row_scales and tile >= 32:
            eighths, _ = launch_split_inputs(x, weight.perm, 8, tile // 2)
        arguments = (inputs, eighths, sums, *packed, target, *shape, inputs.shape[-1], n)
        launch_fitting(affine_gemm_wide_kernel, grid, arguments, options)
    if split > 1:
        sum_splits(target, bias, out)
    return out


def launch_split_inputs(x: Tensor, perm: Tensor | None, parts: int, tile: int) -> tuple[Tensor, Tensor]:
    """`x [M, K]` as `[parts, M, width]`, and sums float32 `[width / tile, M]` of the tiles of its columns.

    Part r holds x[:, perm][:, r::parts], padded with zeros to a multiple of `tile`.
    """
    m, k = x.shape
    tiles = cdiv(cdiv(k, parts), tile)
    width = tiles * tile
    out = x.new_empty((parts, m, width))
    sums = x.new_empty((tiles, m), dtype=torch.float32)
    together = max(1, 512 // tile)
    device.launch(
        split_inputs_kernel,
        (cdiv(tiles, together), m),
        x,
        perm if perm is not None else x,
        out,
        sums,
        m,
        k,
        x.stride(0),
        width,
        PER=parts,
        TILES=together,
        BKB=tile,
        HAS_PERM=perm is not None,
        num_warps=4,
    )
    return out, sums


def sum_splits(parts: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """out `[M, N]` = the float32 `parts [S, M, N]` added in order, plus bias: the same bits on every run."""
    block = 256
    device.launch(
        sum_splits_kernel,
        (cdiv(out.numel(), block),),
        parts,
        bias if bias is not None else out,
        out,
        out.shape[1],
        out.numel(),
        SPLIT=parts.shape[0],
        BLOCK=block,
        HAS_BIAS=bias is not None,
        num_warps=2,
    )
    return out


def launch_backward(
    grad: Tensor, weight: AffineWeight, in_features: int, config: tuning.BackwardConfig
) -> Tensor:
    """The fused product of `grad [M, N]` with the packed weight, tiles of `config`: `[M, K]`."""
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    (m, n), k, groups = grad.shape, in_features, weight.scale.shape[1]
    group, parts = weight.group, weight.parts
    columns = max(config.columns, 16 * parts)
    while columns > 16 * parts and group and group % columns:
        columns //= 2
    row_scales = group == 0 or group % columns == 0
    out = grad.new_empty((m, k))
    split = min(config.split, cdiv(n, config.outputs))
    target = grad.new_empty((split, m, k), dtype=torch.float32) if split > 1 else out
    arguments = (
        grad,
        weight.codes,
        weight.scale,
        weight.zero,
        weight.perm if weight.perm is not None else weight.codes,
        target,
        m,
        n,
        k,
        weight.codes.stride(0),
        weight.high_offset,
        groups,
        grad.stride(0),
        k,
    )
    options = {
        "BITS": weight.bits,
        "BM": config.rows,
        "BN": config.outputs,
        "BKB": columns // parts,
        "SPLIT": split,
        "STAGES": config.stages if row_scales else 1,
        "GROUP": group,
        "ROW_SCALES": row_scales,
        "HAS_PERM": weight.perm is not None,
        "EVEN": n % config.outputs == 0 and k % columns == 0,
        "DOT": _DOT[grad.dtype],
        "num_warps": config.warps,
    }
    grid = (cdiv(k, columns), split, cdiv(m, config.rows))
    launch_fitting(affine_backward_kernel, grid, arguments, options)
    if split > 1:
        sum_splits(target, None, out)
    return out


def launch_dequantize(
    weight: AffineWeight, out: Tensor, rows: tuple[int, int], columns: tuple[int, int]
) -> Tensor:
    """Dense values of `rows` (start, count) and `columns` (start, a multiple of 128; count) into `out`.

    Columns come in the model's order where the weight has a permutation and all of them are asked for.
    """
    group, tile = weight.group, 128
    if weight.bits == 3 and weight.perm is None and _fits_words(weight, out, rows, columns):
        device.launch(
            affine_dequantize3_kernel,
            (columns[1] // 256, rows[1] // 16),
            weight.codes.view(torch.int16),
            weight.codes,
            weight.scale,
            weight.zero,
            out,
            rows[0],
            columns[0],
            weight.codes.stride(0),
            weight.high_offset,
            weight.scale.shape[1],
            out.stride(0),
            BN=16,
            BK=256,
            GROUP=group,
            num_warps=4,
        )
        return out
    while group and group % tile and tile > max(32, 16 * weight.parts):
        tile //= 2
    tall = 32 * 128 // tile
    device.launch(
        affine_dequantize_kernel,
        (cdiv(columns[1], tile), cdiv(rows[1], tall)),
        weight.codes,
        weight.scale,
        weight.zero,
        weight.perm if weight.perm is not None else weight.codes,
        out,
        rows[1],
        columns[1],
        rows[0],
        columns[0],
        weight.codes.stride(0),
        weight.high_offset,
        weight.scale.shape[1],
        out.stride(0),
        BITS=weight.bits,
        BN=tall,
        BKB=tile // weight.parts,
        GROUP=group,
        ROW_SCALES=group == 0 or group % tile == 0,
        HAS_PERM=weight.perm is not None,
        EVEN=rows[1] % tall == 0 and columns[1] % tile == 0,
        num_warps=4,
    )
    return out


def _fits_words(weight: AffineWeight, out: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> bool:
    """Do whole tiles and aligned 16-bit pieces cover the range?"""
    codes = weight.codes
    aligned = codes.stride(0) % 2 == 0 and codes.storage_offset() % 2 == 0 and weight.group % 8 == 0
    return aligned and rows[1] % 16 == 0 and columns[1] % 256 == 0 and columns[0] % 8 == 0
