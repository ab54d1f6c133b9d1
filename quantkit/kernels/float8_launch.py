"""Launches of the float8 kernels: from tensors to pointers, strides and compile-time constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkit.kernels import tuning
from quantkit.kernels.affine_launch import sum_splits
from quantkit.kernels.float8_backward import float8_backward_kernel
from quantkit.kernels.float8_dequantize import float8_dequantize_kernel
from quantkit.kernels.float8_gemm import float8_gemm_kernel, float8_gemm_wide_kernel
from quantkit.kernels.float8_native import float8_native_kernel
from quantkit.kernels.float8_tuning import Config
from quantkit.kernels.launch import DOT_TYPES, cdiv, has_ptx, launch


def launch_gemm(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block_n: int,
    block_k: int,
    config: Config,
    *,
    x_scale: Tensor | None = None,
    group: int = 0,
    asm: bool | None = None,
) -> Tensor:
    """The fused product of `x [M, K]`; with `x_scale` (per row, or per `group` inputs) x holds e4m3 values."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    (m, k), n = x.shape, codes.shape[0]
    whole = block_k >= k
    inputs = config.inputs
    while inputs > 32 and ((not whole and block_k % inputs) or (group and group % inputs)):
        inputs //= 2
    if not whole and block_k % inputs:
        return NotImplemented  # tiles narrower than 32, or odd ones
    slices = config.slices
    while slices > 1 and inputs * slices // 2 >= k:
        slices //= 2
    step = inputs * slices
    split = min(config.split, cdiv(k, step))
    out = x.new_empty((m, n))
    target = x.new_empty((split, m, n), dtype=torch.float32) if split > 1 else out
    x_stride = 0 if x_scale is None or x_scale.shape[0] == 1 else x_scale.stride(0)
    arguments = (
        x,
        codes,
        scale,
        x_scale if x_scale is not None else scale,
        bias if bias is not None else x,
        target,
        m,
        n,
        k,
        block_n,
        scale.stride(0),
        x_stride,
        x.stride(0),
        n,
    )
    options: dict[str, Any] = {
        "BN": config.rows,
        "BM": config.columns,
        "BK": inputs,
        "SPLIT": split,
        "STAGES": config.stages,
        "BLOCK_K": 0 if whole else block_k,
        "X_GROUP": -1 if x_scale is None else group,
        "EVEN_K": k % step == 0,
        "EVEN_N": n % config.rows == 0,
        "HAS_BIAS": bias is not None,
        "DOT": DOT_TYPES[x.dtype],
        "ASM": has_ptx() if asm is None else asm,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    grid = (cdiv(n, config.rows), split, cdiv(m, config.columns))
    if slices > 1:
        launch(float8_gemm_kernel, grid, *arguments, **options, KS=slices, ONE_ROW=m == 1)
    else:
        launch(float8_gemm_wide_kernel, grid, *arguments, **options)
    if split > 1:
        sum_splits(target, bias, out)
    return out


def launch_native(
    q: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block_n: int,
    block_k: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """`q [M, K]` e4m3 times W on the fp8 matrix unit, in `dtype`; tiles of W span multiples of 128 inputs."""
    (m, k), n = q.shape, codes.shape[0]
    out = torch.empty((m, n), dtype=dtype, device=q.device)
    rows = 128 if m > 64 else 64
    launch(
        float8_native_kernel,
        (cdiv(m, rows) * cdiv(n, 128),),
        q,
        codes.view(torch.float8_e4m3fn),
        x_scale,
        scale,
        bias if bias is not None else out,
        out,
        m,
        n,
        k,
        block_n,
        scale.stride(0),
        0 if x_scale.shape[0] == 1 else x_scale.stride(0),
        n,
        BM=rows,
        BN=128,
        BK=128,
        BLOCK_K=0 if block_k >= k else block_k,
        X_GROUP=group,
        EVEN_K=k % 128 == 0,
        HAS_BIAS=bias is not None,
        num_warps=8 if rows == 128 else 4,
        num_stages=4,
    )
    return out


def launch_backward(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    block_n: int,
    block_k: int,
    config: tuning.BackwardConfig,
    asm: bool | None = None,
) -> Tensor:
    """The fused product of `grad [M, N]` with the packed weight: `[M, K]`. Tiles span multiples of 32 inputs."""
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    (m, n), k = grad.shape, codes.shape[1]
    whole = block_k >= k
    columns = config.columns
    while not whole and block_k % columns:
        columns //= 2
    split = min(config.split, cdiv(n, config.outputs))
    out = grad.new_empty((m, k))
    target = grad.new_empty((split, m, k), dtype=torch.float32) if split > 1 else out
    grid = (cdiv(k, columns), split, cdiv(m, config.rows))
    launch(
        float8_backward_kernel,
        grid,
        grad,
        codes,
        scale,
        target,
        m,
        n,
        k,
        block_n,
        scale.stride(0),
        grad.stride(0),
        k,
        BM=config.rows,
        BN=config.outputs,
        BK=columns,
        SPLIT=split,
        STAGES=config.stages,
        BLOCK_K=0 if whole else block_k,
        EVEN=n % config.outputs == 0 and k % columns == 0,
        DOT=DOT_TYPES[grad.dtype],
        ASM=has_ptx() if asm is None else asm,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return sum_splits(target, None, out) if split > 1 else out


def launch_dequantize(
    codes: Tensor, scale: Tensor, block_n: int, block_k: int, out: Tensor, row: int, column: int
) -> None:
    """Dense values into `out [rows, columns]`, from (`row`, `column`) of W on."""
    rows, columns = out.shape
    inputs, tall = 128, 32
    launch(
        float8_dequantize_kernel,
        (cdiv(columns, inputs), cdiv(rows, tall)),
        codes,
        scale,
        out,
        rows,
        columns,
        row,
        column,
        codes.shape[1],
        block_n,
        scale.stride(0),
        out.stride(0),
        BN=tall,
        BK=inputs,
        BLOCK_K=0 if block_k >= codes.shape[1] else block_k,
        EVEN=column % 128 == 0 and rows % tall == 0 and columns % inputs == 0,
        num_warps=4,
    )
