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
from quantkit.kernels.float8_activation import round_rows_kernel
from quantkit.kernels.float8_launch import launch_backward, launch_dequantize, launch_gemm, launch_native
from quantkit.kernels.launch import cdiv, device_of, has_float8, large_shared_memory, launch

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


def dequantize_float8(codes: Tensor, scale: Tensor, block_n: int, block_k: int, dtype: torch.dtype) -> Tensor:
    """Dense weight `[N, K]` in `dtype`; equal to the reference bit for bit."""
    if dtype not in _FLOATS:
        return NotImplemented
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if out.numel():
        with device_of(codes):
            launch_dequantize(codes, scale, block_n, block_k, out, 0, 0)
    return out
