"""Triton backend of the codebook ops (NF4, FP4): chooses a kernel by M and launches it.

    M = 1 .. 8 (blocks of 64)           `few_rows_kernel`, where it covers the weight
    M <= codebook_tuning.FUSED_ROWS     `codebook_gemm_kernel` / `codebook_gemm_wide_kernel`
    M = 17 .. 3072                      `wide_hopper_kernel` on sm_90, where it is faster
    larger                              slices of W dequantized, multiplied by the vendor's BLAS

and the same two routes for dx = dy @ W (`codebook_backward_kernel`).

The functions have the ops' names and arguments (`quantkit.kernels.ops`); `NotImplemented` hands the
call back to the reference. Nothing waits for the device or keeps state, so CUDA graphs capture it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkit.kernels import (
    codebook_tuning,
    few_rows_launch,
    launch_weight,
    sliced,
    tuning,
    wide_hopper_dx_launch,
    wide_hopper_launch,
    wide_hopper_plan,
)
from quantkit.kernels.affine_launch import sum_splits
from quantkit.kernels.codebook_backward import codebook_backward_kernel
from quantkit.kernels.codebook_dequantize import (
    codebook_dequantize_kernel,
    codebook_dequantize_words_kernel,
)
from quantkit.kernels.codebook_gemm import codebook_gemm_kernel, codebook_gemm_wide_kernel
from quantkit.kernels.codebook_tuning import Config
from quantkit.kernels.launch import (
    DOT_TYPES,
    cdiv,
    device_of,
    has_ptx,
    large_shared_memory,
    launch,
)
from quantkit.kernels.tuning import BackwardConfig

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def codebook_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    lut: Tensor,
    bias: Tensor | None,
    out_features: int,
    block_size: int,
) -> Tensor:
    """`x [..., K]` times the packed weight `[N, K]` plus `bias [N]`: `[..., N]` in the dtype of `x`."""
    if x.dtype not in _FLOATS or x.numel() == 0 or out_features == 0:
        return NotImplemented
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    with device_of(x):
        m = rows.shape[0]
        fit = launch_weight.codebook(codes, scale, lut, out_features, block_size)
        own = wide_hopper_launch if m > wide_hopper_plan.LEAST_ROWS else few_rows_launch
        out = own.multiply(rows, fit, bias)
        if out is None and m > codebook_tuning.FUSED_ROWS:
            out = _sliced_linear(rows, codes, scale, lut, bias, out_features, block_size)
        elif out is None:
            config = codebook_tuning.config(m, out_features, large_shared_memory(), k)
            out = launch_gemm(rows, codes, scale, lut, bias, out_features, block_size, config)
    return out.view(*x.shape[:-1], out_features)


def _sliced_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    lut: Tensor,
    bias: Tensor | None,
    out_features: int,
    block_size: int,
) -> Tensor:
    k = x.shape[1]

    def fill(out: Tensor, row: int, column: int) -> None:
        launch_dequantize(codes, scale, lut, k, block_size, out, row, column)

    return sliced.linear(x, out_features, bias, fill)


def launch_gemm(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    lut: Tensor,
    bias: Tensor | None,
    out_features: int,
    block_size: int,
    config: Config,
    asm: bool | None = None,
) -> Tensor:
    """The fused product of `x [M, K]` with tiles of `config`. `asm=False` keeps to portable Triton."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    (m, k), n = x.shape, out_features
    inputs = max(32, min(config.inputs, block_size))
    row_scales = k % block_size == 0 and block_size % inputs == 0
    if row_scales and inputs == block_size:
        inputs *= min(4, config.inputs // block_size)  # a tile may span blocks
    slices = config.slices if row_scales else 1
    while slices > 1 and inputs * slices // 2 >= k:
        slices //= 2
    # The table is static shared memory (32 KB) beside the tile's own. Triton asks the driver for more than
    # 48 KB only when the tile's own share exceeds that; so it does, or is at most 16 KB. Both hold for the
    # tiles of `codebook_tuning` and not for any cut of them.
    fits = inputs == config.inputs and slices == config.slices and row_scales
    asm = (large_shared_memory() if asm is None else asm) and fits and x.dtype != torch.float32
    # Without the table, loads of codes and of table values would be staged through shared memory as well.
    stages = config.stages if asm else (2 if row_scales else 1)
    step = inputs * slices
    split = min(config.split, cdiv(k, step))
    out = x.new_empty((m, n))
    target = x.new_empty((split, m, n), dtype=torch.float32) if split > 1 else out
    sizes = (m, n, k, k // 2, x.stride(0), n)
    arguments = (x, codes, scale, lut, bias if bias is not None else x, target, *sizes)
    options: dict[str, Any] = {
        "BN": config.rows,
        "BM": config.columns,
        "BK": inputs,
        "SPLIT": split,
        "STAGES": stages,
        "BLOCK": block_size,
        "ROW_SCALES": row_scales,
        "EVEN_K": k % step == 0,
        "EVEN_N": n % config.rows == 0,
        "HAS_BIAS": bias is not None,
        "DOT": DOT_TYPES[x.dtype],
        "ASM": asm,
        "THREADS": 32 * config.warps,
        "num_warps": config.warps,
        "num_stages": stages,
    }
    grid = (cdiv(n, config.rows), split, cdiv(m, config.columns))
    if slices > 1:
        launch(codebook_gemm_kernel, grid, *arguments, **options, KS=slices, ONE_ROW=m == 1)
    else:
        launch(codebook_gemm_wide_kernel, grid, *arguments, **options)
    if split > 1:
        sum_splits(target, bias, out)
    return out


def codebook_linear_backward(
    grad: Tensor, codes: Tensor, scale: Tensor, lut: Tensor, in_features: int, block_size: int
) -> Tensor:
    """dx `[..., K]` of `grad [..., N]`, in the dtype of `grad`."""
    if grad.dtype not in _FLOATS or grad.numel() == 0 or in_features == 0:
        return NotImplemented

    n, k = grad.shape[-1], in_features
    rows = grad.reshape(-1, n)
    fused = tuning.fused_backward("codebook", rows.shape[0], n, k, 4) and grad.dtype != torch.float32
    with device_of(grad):
        if rows.shape[0] > wide_hopper_plan.LEAST_ROWS:
            weight = launch_weight.codebook(codes, scale, lut, n, block_size)
            own = wide_hopper_dx_launch.multiply(rows, weight, k)
            if own is not None:
                return own.view(*grad.shape[:-1], k)
        if fused and k % block_size == 0 and block_size % 32 == 0:
            config = tuning.backward_config("codebook", rows.shape[0], n, k)
            dx = launch_backward(rows, codes, scale, lut, k, block_size, config)
        else:

            def fill(out: Tensor, row: int, column: int) -> None:
                launch_dequantize(codes, scale, lut, in_features, block_size, out, row, column)

            dx = sliced.backward(rows, in_features, fill)
    return dx.view(*grad.shape[:-1], in_features)


def launch_backward(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    lut: Tensor,
    in_features: int,
    block_size: int,
    config: BackwardConfig,
) -> Tensor:
    """The fused product of `grad [M, N]` with the packed weight: `[M, K]`. Blocks divide K, 32 divides blocks."""
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    (m, n), k = grad.shape, in_features
    columns = min(config.columns, block_size)
    while block_size % columns:
        columns //= 2
    split = min(config.split, cdiv(n, config.outputs))
    out = grad.new_empty((m, k))
    target = grad.new_empty((split, m, k), dtype=torch.float32) if split > 1 else out
    grid = (k // columns, split, cdiv(m, config.rows))
    launch(
        codebook_backward_kernel,
        grid,
        grad,
        codes,
        scale,
        lut,
        target,
        m,
        n,
        k,
        grad.stride(0),
        k,
        BM=config.rows,
        BN=config.outputs,
        BK=columns,
        SPLIT=split,
        BLOCK=block_size,
        EVEN=n % config.outputs == 0,
        DOT=DOT_TYPES[grad.dtype],
        ASM=has_ptx(),
        num_warps=config.warps,
    )
    return sum_splits(target, None, out) if split > 1 else out


def dequantize_codebook(
    codes: Tensor,
    scale: Tensor,
    lut: Tensor,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dense weight `[N, K]` in `dtype`; equal to the reference and to bitsandbytes bit for bit."""
    if dtype not in _FLOATS:
        return NotImplemented
    out = torch.empty((out_features, in_features), dtype=dtype, device=codes.device)
    if out.numel():
        with device_of(codes):
            launch_dequantize(codes, scale, lut, in_features, block_size, out, 0, 0)
    return out


def launch_dequantize(
    codes: Tensor,
    scale: Tensor,
    lut: Tensor,
    in_features: int,
    block_size: int,
    out: Tensor,
    row: int,
    column: int,
) -> None:
    """Dense values into `out [rows, columns]`, from (`row`, `column`) of W on."""
    rows, columns = out.shape
    inputs, tall = 256, 8
    aligned = in_features % block_size == 0 and column % block_size == 0 and inputs % block_size == 0
    fits = in_features % 128 == 0 and column % 128 == 0 and rows % 16 == 0 and columns % inputs == 0
    if fits and in_features % block_size == 0 and block_size % 8 == 0 and codes.storage_offset() % 4 == 0:
        launch(
            codebook_dequantize_words_kernel,
            (columns // inputs, rows // 16),
            codes.view(torch.int32),
            scale,
            lut,
            out,
            row,
            column,
            in_features,
            out.stride(0),
            BN=16,
            BK=inputs,
            BLOCK=block_size,
            ASM=has_ptx(),
            num_warps=4,
        )
        return
    launch(
        codebook_dequantize_kernel,
        (cdiv(columns, inputs), cdiv(rows, tall)),
        codes,
        scale,
        lut,
        out,
        rows,
        columns,
        row,
        column,
        in_features,
        out.stride(0),
        BN=tall,
        BK=inputs,
        BLOCK=block_size,
        EVEN_K=in_features % 2 == 0 and column % 2 == 0,
        ROW_SCALES=aligned,
        EVEN=in_features % 2 == 0 and column % 128 == 0 and rows % tall == 0 and columns % inputs == 0,
        num_warps=4,
    )
