"""The definition of a quantized linear layer's product, on any device, in plain torch.

    y = act(x)[..., perm] @ dequantize(W).T + bias
    dx = dy @ dequantize(W)                      (straight through act)

The weight is dequantized in float32 and rounded once to the dtype of `x`, then multiplied by the
vendor's BLAS. Kernels are tested against these functions, which have the names and arguments of the ops
in `quantkit.kernels.ops`; they answer wherever nothing faster does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkit.encoding import (
    E4M3_MAX,
    Activation,
    Affine,
    Codebook,
    Float8,
    PackedWeight,
    affine_codes,
    dequantize,
)


def quant_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`x [..., K]` times the packed weight `[N, K]`, plus `bias [N]`; result in the dtype of `x`."""
    if packed.activation == "int8_token" and _is_integer_product(packed):
        return _int8_linear(x, packed, bias)
    weight = dequantize(packed, x.dtype)
    x = round_activation(x, packed)
    return torch.nn.functional.linear(x, weight, bias)


def affine_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    perm: Tensor | None,
    bits: int,
    group_size: int,
    activation: Activation | None,
) -> Tensor:
    """`x [..., K]` times an affine weight; `codes` u8, `scale` and `zero` `[N, G]`: `[..., N]`."""
    shape = (codes.shape[0], x.shape[-1])
    encoding = Affine(bits, group_size)
    packed = PackedWeight(encoding, shape, codes, scale, zero, perm=perm, activation=activation)
    return quant_linear(x, packed, bias)


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
    """`gate(rms_norm(x) @ W.T + bias) + residual`; each step only where asked for.

    rms_norm(x) = x / sqrt(mean(x**2) + norm_eps) * norm_weight. gate(y) = silu(y[..., :N/2]) * y[..., N/2:],
    for a W whose rows are those of a gate projection followed by those of the up projection.
    """
    if norm_weight is not None:
        x = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], norm_weight.float(), norm_eps).to(x.dtype)
    # The op, not the function: a product of many rows has a kernel even where the whole has none.
    product = torch.ops.quantkit.affine_linear
    y: Tensor = product(x, codes, scale, zero, bias, perm, bits, group_size, None)
    if gated:
        gate, up = y.float().chunk(2, dim=-1)
        y = (torch.nn.functional.silu(gate) * up).to(x.dtype)
    return y if residual is None else y + residual


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
    """Input gradient `[..., K]` from `grad [..., N]`."""
    return grad @ dequantize_affine(codes, scale, zero, perm, bits, group_size, in_features, grad.dtype)


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
    """Dense weight `[N, K]` in `dtype`, columns in the model's order."""
    shape = (codes.shape[0], in_features)
    return dequantize(PackedWeight(Affine(bits, group_size), shape, codes, scale, zero, perm=perm), dtype)


def codebook_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    lut: Tensor,
    bias: Tensor | None,
    out_features: int,
    block_size: int,
) -> Tensor:
    """`x [..., K]` times a codebook weight (NF4, FP4): `[..., N]`."""
    shape = (out_features, x.shape[-1])
    return quant_linear(x, PackedWeight(Codebook(4, block_size), shape, codes, scale, lut=lut), bias)


def codebook_linear_backward(
    grad: Tensor, codes: Tensor, scale: Tensor, lut: Tensor, in_features: int, block_size: int
) -> Tensor:
    """Input gradient `[..., K]` from `grad [..., N]`."""
    return grad @ dequantize_codebook(codes, scale, lut, grad.shape[-1], in_features, block_size, grad.dtype)


def dequantize_codebook(
    codes: Tensor,
    scale: Tensor,
    lut: Tensor,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dense weight `[N, K]` in `dtype`."""
    shape = (out_features, in_features)
    return dequantize(PackedWeight(Codebook(4, block_size), shape, codes, scale, lut=lut), dtype)


def float8_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block_n: int,
    block_k: int,
    activation: Activation | None,
    input_scale: Tensor | None,
) -> Tensor:
    """`x [..., K]` times an e4m3 weight; inputs are rounded as `activation` says: `[..., N]`."""
    shape = (codes.shape[0], codes.shape[1])
    encoding = Float8((block_n, block_k))
    packed = PackedWeight(encoding, shape, codes, scale, activation=activation, input_scale=input_scale)
    return quant_linear(x, packed, bias)


def float8_linear_backward(grad: Tensor, codes: Tensor, scale: Tensor, block_n: int, block_k: int) -> Tensor:
    """Input gradient `[..., K]` from `grad [..., N]`, straight through the rounding of inputs."""
    return grad @ dequantize_float8(codes, scale, block_n, block_k, grad.dtype)


def dequantize_float8(codes: Tensor, scale: Tensor, block_n: int, block_k: int, dtype: torch.dtype) -> Tensor:
    """Dense weight `[N, K]` in `dtype`."""
    shape = (codes.shape[0], codes.shape[1])
    return dequantize(PackedWeight(Float8((block_n, block_k)), shape, codes, scale), dtype)


def round_activation(x: Tensor, packed: PackedWeight) -> Tensor:
    """Round inputs the way the layout's runtime does, staying in the dtype of `x`.

    * int8_token (BitNet b1.58, Ma et al. 2024): s = 127 / max|x| per token, round, clamp to int8.
    * int8_block (onnxruntime's int8 mode): int8, s = 127 / max|x| per block of `activation_block` inputs,
      in the order of the packed columns.
    * fp8_token / fp8_group128: e4m3 with one scale per token, or per 128 inputs of a token.
    * fp8_static: e4m3 with the stored `input_scale`.
    """
    kind = packed.activation
    if kind is None:
        return x
    wide = x.float()
    if kind == "int8_token":
        quantized, scale = int8_per_token(wide)
        return (quantized / scale).to(x.dtype)
    if kind == "int8_block":
        assert isinstance(packed.encoding, Affine)
        if packed.perm is not None:
            wide = wide[..., packed.perm]
        wide = through_int8_blocks(wide, activation_block(packed.encoding.group_size, wide.shape[-1]))
        if packed.perm is not None:
            wide = wide[..., torch.argsort(packed.perm)]
        return wide.to(x.dtype)
    if kind == "fp8_static":
        assert packed.input_scale is not None
        return _through_e4m3(wide, packed.input_scale.float()).to(x.dtype)
    if kind == "fp8_group128":
        pad = -wide.shape[-1] % 128
        groups = torch.nn.functional.pad(wide, (0, pad)).unflatten(-1, (-1, 128))
        scale = groups.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12) / E4M3_MAX
        return _through_e4m3(groups, scale).flatten(-2)[..., : wide.shape[-1]].to(x.dtype)
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12) / E4M3_MAX
    return _through_e4m3(wide, scale).to(x.dtype)


def _is_integer_product(packed: PackedWeight) -> bool:
    """Does BitNet's rule apply: one scale per output row and integer zeros?"""
    return isinstance(packed.encoding, Affine) and packed.scale.shape[1] == 1 and packed.zero is not None


def _int8_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """BitNet's rule: the product of integers, exact, then both scales once, in float32.

    Sums stay below 2**24 for K < 65536 at 2 bits, so float32 holds them exactly in any order.
    """
    assert packed.zero is not None
    wide = torch.float64 if x.dtype == torch.float64 or packed.shape[1] >= 65536 else torch.float32
    weight = affine_codes(packed).to(wide) - packed.zero.to(wide)
    if packed.perm is not None:
        x = x[..., packed.perm]
    quantized, scale = int8_per_token(x.float())
    product = torch.nn.functional.linear(quantized.to(wide), weight)
    out = product * (packed.scale.to(wide)[:, 0] / scale.to(wide))
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)


def activation_block(group_size: int, in_features: int) -> int:
    """Inputs that share one int8 scale under `int8_block`: a power of two from 16 to 128.

    The largest that divides both the weight's group and K; else the largest that divides the group; else
    (groups that no power of two >= 16 divides) 32. A group as large as the row is no constraint.
    """
    group = 0 if group_size >= in_features else group_size
    for common in (math.gcd(group, in_features), group):
        for block in (128, 64, 32, 16):
            if common and common % block == 0:
                return block
    return 32


def through_int8_blocks(x: Tensor, block: int) -> Tensor:
    """`x [..., K]` float32 rounded to int8 per `block` inputs (scale max|x| / 127) and back."""
    groups = torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    largest = groups.abs().amax(dim=-1, keepdim=True)
    rounded = (groups * torch.where(largest == 0, 0.0, 127.0 / largest)).round() * (largest / 127.0)
    return rounded.flatten(-2)[..., : x.shape[-1]]


def int8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """(integers in -128..127 as float32, scale `[..., 1]`) with x ~ integers / scale."""
    scale = 127.0 / x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-5)
    return (x * scale).round().clamp_(-128, 127), scale


def _through_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    # Clamp first: torch casts overflow to 448 or to NaN depending on its version.
    return (x / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale
