"""Triton backend of the affine ops: chooses a route by M.

    M = 1 .. 16         `few_rows`, where it covers the weight (4 and 3 bits)
    M <= FUSED_ROWS     `affine_gemm`, `affine_gemm_wide`: codes to tensor cores, no dense weight anywhere
    M = 17 .. 4096      `wide_hopper` on sm_90, where it covers the weight and measured faster (not 1 bit)
    larger              W, or a slice of it at a time, is dequantized and the vendor's BLAS multiplies

and the same routes for dx = dy @ W (`wide_hopper_dx` from 17 rows on, 4 and 8 bits). The functions have the ops' names
and arguments (`quantkit.kernels.ops`); `NotImplemented` hands the call back to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.kernels import (
    few_rows_launch,
    launch_weight,
    sliced,
    ternary,
    tuning,
    wide_hopper_dx_launch,
    wide_hopper_launch,
    wide_hopper_plan,
)
from quantkit.kernels.affine_launch import (
    FLOATS,
    AffineWeight,
    Fusion,
    launch_backward,
    launch_dequantize,
    launch_gemm,
)
from quantkit.kernels.launch import device_of


def affine_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    perm: Tensor | None,
    bits: int,
    group_size: int,
    activation: str | None,
) -> Tensor:
    """`x [..., K]` times the packed weight `[N, K]` plus `bias [N]`: `[..., N]` in the dtype of `x`."""
    if x.dtype not in FLOATS or x.numel() == 0:
        return NotImplemented
    k, n = x.shape[-1], codes.shape[0]
    rows = x.reshape(-1, k)
    if activation is not None:
        weight = AffineWeight(codes, scale, zero, perm, bits, group_size)
        if not ternary.covers(weight, activation):
            return NotImplemented
        with device_of(x):
            return ternary.int8_linear(rows, weight, bias).view(*x.shape[:-1], n)
    with device_of(x):
        m, out = rows.shape[0], None
        own = wide_hopper_launch if m > wide_hopper_plan.LEAST_ROWS else few_rows_launch
        if bits in own.AFFINE_BITS:
            fit = launch_weight.affine(codes, scale, zero, perm, n, bits, group_size)
            out = own.multiply(rows, fit, bias)
        if out is None:
            weight = AffineWeight(codes, scale, zero, perm, bits, group_size)
            if m > (tuning.FUSED_ROWS_3BIT if bits == 3 else tuning.FUSED_ROWS):
                out = _sliced_linear(rows, weight, bias)
            else:
                out = launch_gemm(rows, weight, bias, tuning.gemm_config(m, n, k, bits))
    return out.view(*x.shape[:-1], n)


def affine_fused_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    perm: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    gated: bool,
    bits: int,
    group_size: int,
) -> Tensor:
    """One launch for few rows; the reference composes the same steps for many."""
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    if x.dtype not in FLOATS or x.numel() == 0 or perm is not None or rows.shape[0] > tuning.ONE_LAUNCH_ROWS:
        return NotImplemented
    n = codes.shape[0] // 2 if gated else codes.shape[0]
    if residual is not None:
        residual = residual.reshape(-1, n).contiguous()
    fusion = Fusion(residual, norm_weight, norm_eps, gated)
    weight = AffineWeight(codes, scale, zero, perm, bits, group_size)
    config = tuning.gemm_config(rows.shape[0], codes.shape[0], k, bits)
    with device_of(x):
        return launch_gemm(rows, weight, bias, config, fusion).view(*x.shape[:-1], n)


def _sliced_linear(x: Tensor, weight: AffineWeight, bias: Tensor | None) -> Tensor:
    k = x.shape[1]

    def fill(out: Tensor, row: int, _: int) -> None:
        launch_dequantize(weight, out, (row, out.shape[0]), (0, k))

    return sliced.linear(x, weight.codes.shape[0], bias, fill)


def affine_linear_backward(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    perm: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """dx `[..., K]` of `grad [..., N]`, in the dtype of `grad`."""
    if grad.dtype not in FLOATS or grad.numel() == 0:
        return NotImplemented
    n, k = grad.shape[-1], in_features
    rows = grad.reshape(-1, n)
    weight = AffineWeight(codes, scale, zero, perm, bits, group_size)
    with device_of(grad):
        m = rows.shape[0]
        if m > wide_hopper_plan.LEAST_ROWS:
            packed = launch_weight.affine(codes, scale, zero, perm, n, bits, group_size)
            own = wide_hopper_dx_launch.multiply(rows, packed, k)
            if own is not None:
                return own.view(*grad.shape[:-1], k)
        if tuning.fused_backward("affine", m, n, k, bits) and grad.dtype != torch.float32:
            out = launch_backward(rows, weight, k, tuning.backward_config("affine", m, n, k))
        else:
            out = _sliced_backward(rows, weight, k)
    return out.view(*grad.shape[:-1], k)


def _sliced_backward(grad: Tensor, weight: AffineWeight, in_features: int) -> Tensor:
    packed_order = weight._replace(perm=None)

    def fill(out: Tensor, _: int, column: int) -> None:
        launch_dequantize(packed_order, out, (0, out.shape[0]), (column, out.shape[1]))

    out = sliced.backward(grad, in_features, fill)
    return out if weight.perm is None else torch.empty_like(out).index_copy_(1, weight.perm, out)


def dequantize_affine(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    perm: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dense weight `[N, K]` in `dtype`, columns in the model's order; equal to the reference bit for bit."""
    if dtype not in FLOATS:
        return NotImplemented
    out = torch.empty((codes.shape[0], in_features), dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    weight = AffineWeight(codes, scale, zero, perm, bits, group_size)
    with device_of(codes):
        return launch_dequantize(weight, out, (0, codes.shape[0]), (0, in_features))
