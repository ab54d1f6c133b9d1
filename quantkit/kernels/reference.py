"""The definition of a quantized linear layer's product, on any device, in plain torch.

    y = act(x)[..., perm] @ dequantize(W).T + bias

The weight is dequantized in float32 and rounded once to the dtype of `x`, then multiplied by the
vendor's BLAS. Kernels are tested against these functions; `QuantLinear` uses them where nothing
faster is registered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.encoding import E4M3_MAX, PackedWeight, dequantize


def quant_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`x [..., K]` times the packed weight `[N, K]`, plus `bias [N]`; result in the dtype of `x`."""
    weight = dequantize(packed, x.dtype)
    x = round_activation(x, packed)
    return torch.nn.functional.linear(x, weight, bias)


def round_activation(x: Tensor, packed: PackedWeight) -> Tensor:
    """Round inputs the way the layout's runtime does, staying in the dtype of `x`.

    * int8_token (BitNet b1.58, Ma et al. 2024): s = 127 / max|x| per token, round, clamp to int8.
    * fp8_token / fp8_group128: e4m3 with one scale per token, or per 128 inputs of a token.
    * fp8_static: e4m3 with the stored `input_scale`.
    """
    kind = packed.activation
    if kind is None:
        return x
    wide = x.float()
    if kind == "int8_token":
        scale = 127.0 / wide.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-5)
        return ((wide * scale).round().clamp_(-128, 127) / scale).to(x.dtype)
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


def _through_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    # Clamp first: torch casts overflow to 448 or to NaN depending on its version.
    return (x / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale
