"""Triton backend of the float8 ops: chooses a kernel by M and by how activations are rounded.

    weights only                 M <= FUSED_ROWS: `float8_gemm`; 17 .. 3072 on sm_90: `wide_hopper_kernel`, where
                                 it is faster; larger: slices of W dequantized, BLAS
    rounded activations          q(x) and its scales first (`float8_activation`), then
        M < NATIVE_ROWS          `float8_gemm` on the exact values of q: bound by the weight's bytes anyway
        larger, sm_89+           `float8_native`: both operands on the fp8 matrix unit
        SCALED_ROWS and more     torch's scaled product, where it runs (`float8_scaled`)
        larger, other chips      q(x) times its scale, then as weights only

dx = dy @ W is one fused product up to `tuning.FUSED_BACKWARD_ROWS` rows (`float8_backward`), then slices of W
dequantized and BLAS. The functions have the ops' names and arguments
(`quantkit.kernels.ops`); `NotImplemented` hands the call back to the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from quantkit.kernels import (
    float8_scaled,
    float8_tuning,
    launch_weight,
    sliced,
    tuning,
    wide_hopper_dx_launch,
    wide_hopper_launch,
    wide_hopper_plan,
)
from quantkit.kernels.affine_launch import sum_splits
from quantkit.kernels.float8_activation import round_rows_kernel
from quantkit.kernels.float8_backward import float8_backward_kernel
from quantkit.kernels.float8_dequantize import float8_dequantize_kernel
from quantkit.kernels.float8_gemm import float8_gemm_kernel, float8_gemm_wide_kernel
from quantkit.kernels.float8_native import float8_native_kernel
from quantkit.kernels.float8_tuning import Config
from quantkit.kernels.launch import (
    DOT_TYPES,
    cdiv,
    device_of,
    has_float8,
    has_ptx,
    large_shared_memory,
    launch,
)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_GROUPS = {"fp8_token": 0, "fp8_static": 0, "fp8_group128": 128}
#: Longest row that one program rounds at once.
_LONGEST_ROW = 65536


def float8_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block_n: int,
    block_k: int,
    activation: str | None,
    input_scale: Tensor | None,
) -> Tensor:
    """`x [..., K]` times the packed weight `[N, K]` plus `bias [N]`: `[..., N]` in the dtype of `x`."""
    n, k = codes.shape
    if x.dtype not in _FLOATS or x.numel() == 0 or n == 0:
        return NotImplemented
    if activation is not None and (activation not in _GROUPS or k > _LONGEST_ROW):
        return NotImplemented
    rows = x.reshape(-1, k)
    with device_of(x):
        if activation is None:
            out = _weight_only(rows, codes, scale, bias, block_n, block_k)
        else:
            out = _rounded(rows, codes, scale, bias, block_n, block_k, activation, input_scale)
    return out if out is NotImplemented else out.view(*x.shape[:-1], n)


def _rounded(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block_n: int,
    block_k: int,
    activation: str,
    input_scale: Tensor | None,
) -> Tensor:
    (m, k), n, group = x.shape, codes.shape[0], _GROUPS[activation]
    weight = (codes, scale, bias, block_n, block_k)
    if m >= float8_tuning.NATIVE_ROWS and has_float8() and _tiles(k, block_k) % 128 == 0:
        recipe = float8_scaled.recipe(x, *weight, activation)
        blocks = recipe is float8_scaled.Recipe.BLOCK
        q, x_scale = round_activation(x, activation, input_scale, torch.float8_e4m3fn, blocks)
        if recipe is not None:
            out = float8_scaled.multiply(q, x_scale, codes, scale, bias, recipe, m, x.dtype)
            if out is not None:
                return out
        return launch_native(q[:m], x_scale[:m].contiguous(), *weight, group, x.dtype)
    q, x_scale = round_activation(x, activation, input_scale, x.dtype)
    if m > float8_tuning.FUSED_ROWS:
        return _weight_only(_unround(q, x_scale), *weight)
    config = float8_tuning.config(m, n, large_shared_memory(), k)
    return launch_gemm(q, *weight, config, x_scale=x_scale, group=group)


def _tiles(k: int, block_k: int) -> int:
    """Inputs that a step must not exceed: the tile, or no limit (128 divides it)."""
    return 128 if block_k >= k else block_k


def _weight_only(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, block_n: int, block_k: int
) -> Tensor:
    (m, k), n = x.shape, codes.shape[0]
    if m > wide_hopper_plan.LEAST_ROWS:
        fit = launch_weight.float8(codes, scale, block_n, block_k)
        if (out := wide_hopper_launch.multiply(x, fit, bias)) is not None:
            return out
    if m <= float8_tuning.FUSED_ROWS:
        config = float8_tuning.config(m, n, large_shared_memory(), k)
        return launch_gemm(x, codes, scale, bias, block_n, block_k, config)

    def fill(out: Tensor, row: int, column: int) -> None:
        launch_dequantize(codes, scale, block_n, block_k, out, row, column)

    return sliced.linear(x, n, bias, fill)


def _unround(q: Tensor, x_scale: Tensor) -> Tensor:
    """Values of rounded activations in the dtype of `q [M, K]`."""
    _m, k = q.shape
    if x_scale.numel() == 1 or x_scale.shape[1] == 1:
        return (q.float() * x_scale).to(q.dtype)
    wide = x_scale.repeat_interleave(128, 1)[:, :k]
    return (q.float() * wide).to(q.dtype)


def round_activation(
    x: Tensor, activation: str, input_scale: Tensor | None, dtype: torch.dtype, blocks: bool = False
) -> tuple[Tensor, Tensor]:
    """(q `[M, K]` in `dtype`: e4m3 or the exact values, scales float32 `[M or 1, groups]`) of `x [M, K]`.

    With `blocks` as `float8_scaled.Recipe.BLOCK` demands: M is rounded up (what the rows beyond hold is not
    defined, and reaches no other row), and scales are contiguous along M.
    """
    (m, k), group = x.shape, _GROUPS[activation]
    if x.stride(-1) != 1:
        x = x.contiguous()
    static = activation == "fp8_static"
    rows = cdiv(m, float8_scaled.BLOCK_ROWS) * float8_scaled.BLOCK_ROWS if blocks else m
    if static:
        assert input_scale is not None
        x_scale = input_scale.reshape(1, 1).float()
    else:
        groups = cdiv(k, group) if group else 1
        shape = (groups, rows) if blocks else (rows, groups)
        x_scale = x.new_empty(shape, dtype=torch.float32)
        x_scale = x_scale.T if blocks else x_scale
    q = x.new_empty((rows, k), dtype=dtype)
    block = 1024 if group else triton.next_power_of_2(k)
    grid = (m, cdiv(k, block))
    warps = 4 if group else min(16, max(1, block // 256))
    launch(
        round_rows_kernel,
        grid,
        x,
        q,
        x_scale,
        k,
        x.stride(0),
        x_scale.stride(0),
        x_scale.stride(1),
        BLOCK=block,
        GROUP=group,
        STATIC=static,
        num_warps=warps,
    )
    return q, x_scale


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


def float8_linear_backward(grad: Tensor, codes: Tensor, scale: Tensor, block_n: int, block_k: int) -> Tensor:
    """dx `[..., K]` of `grad [..., N]`, in the dtype of `grad`."""
    n, k = codes.shape
    if grad.dtype not in _FLOATS or grad.numel() == 0 or k == 0:
        return NotImplemented

    rows = grad.reshape(-1, n)
    fused = tuning.fused_backward("float8", rows.shape[0], n, k, 8) and grad.dtype != torch.float32
    with device_of(grad):
        if rows.shape[0] > wide_hopper_plan.LEAST_ROWS:
            own = wide_hopper_dx_launch.multiply(
                rows, launch_weight.float8(codes, scale, block_n, block_k), k
            )
            if own is not None:
                return own.view(*grad.shape[:-1], k)
        if fused and (block_k >= k or block_k % 32 == 0):
            config = tuning.backward_config("float8", rows.shape[0], n, k)
            dx = launch_backward(rows, codes, scale, block_n, block_k, config)
        else:

            def fill(out: Tensor, row: int, column: int) -> None:
                launch_dequantize(codes, scale, block_n, block_k, out, row, column)

            dx = sliced.backward(rows, k, fill)
    return dx.view(*grad.shape[:-1], k)


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


def dequantize_float8(codes: Tensor, scale: Tensor, block_n: int, block_k: int, dtype: torch.dtype) -> Tensor:
    """Dense weight `[N, K]` in `dtype`; equal to the reference bit for bit."""
    if dtype not in _FLOATS:
        return NotImplemented
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if out.numel():
        with device_of(codes):
            launch_dequantize(codes, scale, block_n, block_k, out, 0, 0)
    return out


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
