"""Quantized linear layers on CPUs: onnxruntime where it is installed, else torch's own operator.

    encoding, activation            onnxruntime (extra `quantkit[cpu]`)                 without it
    affine, exact                   MatMulNBits, 4 bits, float32 arithmetic             int4 op (4 bits)
    affine, int8_block              MatMulNBits, 2/4/8 bits, accuracy_level 4           reference
    affine, int8_token (BitNet)     MatMulNBits on integers: exact, then both scales    reference
    codebook (NF4, FP4), exact      `cpu_codebook`: decoded in the cache                the same
    float8                          `cpu_float8`: likewise, rounded activations too     the same

*Exact* means that activations are not rounded: every product and sum is float32, and the weight is not
rounded to the dtype of `x` either (the reference does round it). onnxruntime's float32 kernels exist for
4 bits only, so codes of 1, 2 and 3 bits are widened to 4, and 8 bits run as two 4-bit planes:

    q - zero = 16 * (q >> 4  -  zero >> 4)  +  (q & 15  -  zero & 15)

*int8_block* rounds activations to int8, one scale per block of at most 128 inputs
(`quantkit.kernels.reference.activation_block`); 1 and 3 bits are widened to 2 and 4.

Zeros that the packed integers cannot hold (floats, as HQQ's; 2**bits) go into a small dense product:

    (q - zero) * scale = (q - c) * scale + (c - zero) * scale,       c the nearest integer
    y = MatMulNBits(x, q, scale, c) + (sum of x over each group) @ ((c - zero) * scale).T

Groups whose size has no power of two >= 16 as a factor go to the reference, as does float64.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantkit.encoding import Float8, PackedWeight
from quantkit.kernels import cpu_codebook, cpu_float8, cpu_sessions, cpu_torch, cpu_weights, reference
from quantkit.kernels.cpu_sessions import Session
from quantkit.kernels.cpu_weights import FLOAT32, INT8

log = logging.getLogger(__name__)

#: What a prepared affine weight was made for: activation, bits, group size, K.
Kind = tuple[str | None, int, int, int]


@dataclass(frozen=True)
class Prepared:
    """An affine weight's sessions: `y = sum of sessions(x) + block_sums(x) @ correction.T`."""

    sessions: tuple[Session, ...]
    block: int
    correction: Tensor | None  # float32 [N, ceil(K/block)]
    int8: bool  # are activations rounded?

    def __call__(self, x: Tensor) -> Tensor:
        out = self.sessions[0](x)
        for session in self.sessions[1:]:
            out += session(x)
        if self.correction is not None:
            x = x.float()
            if self.int8:  # the definition rounds every x, those that only the zeros multiply included
                x = reference.through_int8_blocks(x, self.block)
            padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % self.block))
            out.addmm_(padded.unflatten(-1, (-1, self.block)).sum(-1), self.correction.t())
        return out


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
    """See `quantkit.kernels.reference.affine_linear`; NotImplemented where only that will do."""
    shape, dtype = x.shape, x.dtype
    if dtype == torch.float64 or x.numel() == 0 or codes.shape[0] == 0:
        return NotImplemented
    k = shape[-1]
    # First what every call but a layer's first one needs: Python is cold after each product.
    tensors, kind = (codes, scale, zero), (activation, bits, group_size, k)
    weight: Prepared | None = cpu_sessions.find(kind, tensors)
    if weight is None:
        if activation not in (None, "int8_block", "int8_token"):
            return NotImplemented
        if not cpu_sessions.available():
            _say_once()
            if activation is not None or perm is not None:
                return NotImplemented
            return cpu_torch.int4_linear(x, codes, scale, zero, bias, bits, group_size)
        block = ort_block(group_size, k)
        if block is None or (activation == "int8_token" and (scale.shape[1] != 1 or k >= 65536)):
            return NotImplemented
        weight = _prepare(kind, tensors, block)
    flat = x if len(shape) == 2 else x.reshape(-1, k)
    if perm is not None:
        flat = flat[:, perm]
    if activation == "int8_token":
        rounded, token_scale = reference.int8_per_token(flat.float())
        out = weight(rounded) * (scale.float()[:, 0] / token_scale)
    else:
        out = weight(flat)
    if bias is not None:
        out += bias
    if dtype != torch.float32:
        out = out.to(dtype)
    return out if len(shape) == 2 else out.view(*shape[:-1], -1)


def codebook_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    lut: Tensor,
    bias: Tensor | None,
    out_features: int,
    block_size: int,
) -> Tensor:
    """See `quantkit.kernels.reference.codebook_linear`; NotImplemented where only that will do."""
    if x.dtype == torch.float64 or x.numel() == 0 or out_features == 0:
        return NotImplemented
    out = cpu_codebook.linear(x.reshape(-1, x.shape[-1]), codes, scale, lut, out_features, block_size)
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], out_features)


def codebook_linear_backward(
    grad: Tensor, codes: Tensor, scale: Tensor, lut: Tensor, in_features: int, block_size: int
) -> Tensor:
    """See `quantkit.kernels.reference.codebook_linear_backward`."""
    if grad.dtype == torch.float64 or grad.numel() == 0 or in_features == 0:
        return NotImplemented
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
    """Dense weight `[N, K]` in `dtype`; equal to the reference bit for bit."""
    if dtype == torch.float64 or out_features * in_features == 0:
        return NotImplemented
    return cpu_codebook.dense(codes, scale, lut, out_features, in_features, block_size).to(dtype)


def float8_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block_n: int,
    block_k: int,
    activation: reference.Activation | None,
    input_scale: Tensor | None,
) -> Tensor:
    """See `quantkit.kernels.reference.float8_linear`; NotImplemented where only that will do."""
    n, k = codes.shape
    if x.dtype == torch.float64 or x.numel() == 0 or n == 0 or not cpu_float8.covers(codes, scale):
        return NotImplemented
    rows = x.reshape(-1, k)
    if activation is not None:
        packed = PackedWeight(
            Float8((block_n, block_k)), (n, k), codes, scale, activation=activation, input_scale=input_scale
        )
        rows = reference.round_activation(rows, packed)
    out = cpu_float8.linear(rows, codes, scale, block_n, block_k)
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], n)


def float8_linear_backward(grad: Tensor, codes: Tensor, scale: Tensor, block_n: int, block_k: int) -> Tensor:
    """See `quantkit.kernels.reference.float8_linear_backward`."""
    dense = dequantize_float8(codes, scale, block_n, block_k, grad.dtype)
    return NotImplemented if dense is NotImplemented else grad @ dense


def dequantize_float8(codes: Tensor, scale: Tensor, block_n: int, block_k: int, dtype: torch.dtype) -> Tensor:
    """Dense weight `[N, K]` in `dtype`; equal to the reference bit for bit."""
    if dtype == torch.float64 or codes.numel() == 0 or not cpu_float8.covers(codes, scale):
        return NotImplemented
    return cpu_float8.dense(codes, scale, block_n, block_k, dtype)


def ort_block(group_size: int, in_features: int) -> int | None:
    """MatMulNBits' block for groups of `group_size`; None when no power of two >= 16 divides the group.

    A group as large as the row takes any block.
    """
    block = reference.activation_block(group_size, in_features)
    return block if group_size >= in_features or group_size % block == 0 else None


def _prepare(kind: Kind, tensors: tuple[Tensor, Tensor, Tensor], block: int) -> Prepared:
    """The weight's sessions, built and kept; BitNet's rule multiplies the integers alone."""
    activation, bits, group_size, k = kind
    level = INT8 if activation == "int8_block" else FLOAT32

    @torch.no_grad()
    def build() -> Prepared:
        codes, scale, zero = (t.detach() for t in tensors)
        scale = torch.ones_like(scale, dtype=torch.float32) if activation == "int8_token" else scale
        plan = cpu_weights.plan(codes, scale, zero, k, bits, group_size, block, level)
        sessions = tuple(node.session(tensors) for node in plan.nodes)
        return Prepared(sessions, plan.block, plan.correction, level == INT8)

    prepared: Prepared = cpu_sessions.prepared(kind, tensors, build)
    return prepared


@cache
def _say_once() -> None:
    log.warning(
        "onnxruntime is not installed: quantized layers on the CPU run torch's operators, several times "
        "slower. Install quantkit[cpu]."
    )
