"""What all of `onnx_layers` share: permutation and bias, and lookups of bytes in tables."""

from __future__ import annotations

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
