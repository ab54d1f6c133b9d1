"""Canonical affine weights -> the tensors that onnxruntime's MatMulNBits takes.

    B           uint8   [N, ceil(K/block), block*bits/8]   low bits first: quantkit's bytes, where K is a
                                                           whole number of blocks and the bits are equal
    scales      float32 [N, ceil(K/block)]                 a group's scale, repeated over its blocks
    zero points uint8   [N, ceil(ceil(K/block)*bits/8)]    packed like B; left out where all are 2**(bits-1)

Everything here is integer arithmetic on uint8, in one pass over the bytes: it runs once per layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.kernels.cpu_sessions import Node

#: MatMulNBits' accuracy_level: 1 computes in float32, 4 rounds activations to int8 per block.
FLOAT32, INT8 = 1, 4
#: Bits that codes are widened to, by accuracy level; 8 bits at FLOAT32 become two planes of 4.
WIDTHS = {FLOAT32: {1: 4, 2: 4, 3: 4, 4: 4, 8: 4}, INT8: {1: 2, 2: 2, 3: 4, 4: 4, 8: 8}}


@dataclass(frozen=True)
class Plan:
    """`x @ W.T = sum of node(x) + (sum of x over each block) @ correction.T`."""

    nodes: tuple[Node, ...]
    block: int
    correction: Tensor | None  # float32 [N, ceil(K/block)]; None where integer zeros hold everything


def plan(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    in_features: int,
    bits: int,
    group_size: int,
    block: int,
    level: int,
) -> Plan:
    """Nodes for an affine weight in canonical layout; `block` divides the group (or the group is the row).

    Zeros that the packed integers cannot hold (floats, as HQQ's; 2**bits) move into `correction`:
    `(q - zero) * scale = (q - c) * scale + (c - zero) * scale`, c the nearest integer that they do hold.
    """
    width = WIDTHS[level][bits]
    if level == INT8 and width == 2 and block < 32:
        width = 4  # onnxruntime 1.32 has no int8 kernel for 2 bits in blocks of 16: it would dequantize
    blocks = math.ceil(in_features / block)
    scales = per_block(scale.float(), group_size, block, blocks)
    zeros = per_block(zero, group_size, block, blocks)
    attributes = {"block_size": block, "accuracy_level": level, "bits": width}

    # The integer nearest to each zero goes into the operator, so that what is left for `correction` is small.
    held = zeros if zero.dtype == torch.uint8 else zeros.float().round()
    held = held.clamp(0, 255 if bits == 8 else 2**width - 1).to(torch.uint8)
    correction = None
    if zero.dtype != torch.uint8 or not torch.equal(held, zeros):
        correction = (held.float() - zeros.float()) * scales

    def node(packed: Tensor, scales: Tensor, zeros: Tensor) -> Node:
        row = blocks * block * width // 8
        packed = pad(packed, (0, row - packed.shape[1])) if packed.shape[1] < row else packed
        weights = {"b": packed.contiguous().view(packed.shape[0], blocks, -1), "scales": scales}
        if not bool((zeros == 2 ** (width - 1)).all()):
            weights["zeros"] = pack(zeros, width)
        return Node("MatMulNBits", codes.shape[0], in_features, attributes, weights)

    if bits == 8 and width == 4:
        low = node(pack(codes & 15, 4), scales, held & 15)
        high = node(pack(codes >> 4, 4), 16 * scales, held >> 4)
        return Plan((low, high), block, correction)
    packed = codes if width == bits else pack(unpack(codes, bits, in_features), width)
    return Plan((node(packed, scales, held),), block, correction)


def per_block(per_group: Tensor, group_size: int, block: int, blocks: int) -> Tensor:
    """`[N, G]` -> contiguous `[N, blocks]`; the tensor itself where groups are blocks."""
    if per_group.shape[1] == 1:
        return per_group.expand(-1, blocks).contiguous()
    return per_group.repeat_interleave(group_size // block, dim=1)[:, :blocks].contiguous()


def unpack(codes: Tensor, bits: int, in_features: int) -> Tensor:
    """Canonical bytes -> uint8 codes `[N, K]`, as `bitpack.unpack_canonical`, without its wide temporaries."""
    if bits == 3:
        low = math.ceil(in_features / 4)
        top = unpack(codes[:, low:], 1, in_features)
        return unpack(codes[:, :low], 2, in_features) | (top << 2)
    if bits == 8:
        return codes
    parts = [(codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).flatten(1)[:, :in_features]


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes `[N, K]` -> uint8 `[N, ceil(K*bits/8)]`, low bits first; bits 2, 4 or 8."""
    if bits == 8:
        return codes.contiguous()
    per_byte = 8 // bits
    codes = pad(codes, (0, -codes.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    out = codes[..., 0].clone()
    for i in range(1, per_byte):
        out |= codes[..., i] << (bits * i)
    return out
