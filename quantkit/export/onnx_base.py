"""What all of `onnx_layers` share: permutation and bias, lookups of bytes in tables, MatMulNBits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantkit.linear import QuantLinear


class OnnxLinear(nn.Module):
    """Base: a layer with `N x K` weights; subclasses multiply `[..., K]` float32 by the packed weight."""

    perm: Tensor | None

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.n, self.k = layer.shape
        self.bias = layer.bias
        perm = layer.packed.perm
        self.perm = None if perm is None else fixed(perm.to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        if self.perm is not None:
            x = torch.index_select(x, -1, self.perm)
        out = self.multiply(x)
        return out if self.bias is None else out + self.bias.float()

    def multiply(self, x: Tensor) -> Tensor:
        """`x [..., K]` in packed column order times the weight."""
        raise NotImplementedError


def fixed(tensor: Tensor) -> nn.Parameter:
    """A frozen parameter: an initializer of the graph."""
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


def lookup(index: Tensor, table: Tensor) -> Tensor:
    """`[N, C]` indices, `[entries, w]` bytes -> `[N, C*w]` bytes."""
    return torch.nn.functional.embedding(index, table).reshape(index.shape[0], -1)


def matmul_nbits(
    x: Tensor,
    b: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    *,
    bits: int,
    level: int,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`x [..., K]` by MatMulNBits: `b` uint8 `[N, blocks, block*bits/8]`, `scales [N, blocks]`, shape (N, K)."""
    inputs: list[Tensor | None] = [x, b, scales]
    if zeros is not None:
        inputs.append(zeros)
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [bias]
    block = b.shape[2] * 8 // bits
    attributes: dict[str, Any] = {
        "K": shape[1],
        "N": shape[0],
        "bits": bits,
        "block_size": block,
        "accuracy_level": level,
    }
    return torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits",
        inputs,
        attributes,
        dtype=x.dtype,
        shape=(*x.shape[:-1], shape[0]),
        version=1,
    )
