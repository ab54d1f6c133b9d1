"""Codebook layers (NF4, FP4) as ONNX operators; see `quantkit.export.onnx_layers`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantkit.algorithms.codebook import NestedScale, table
from quantkit.encoding import Codebook, PackedWeight
from quantkit.export.onnx_base import OnnxLinear, fixed, lookup
from quantkit.linear import QuantLinear


class LookupCodebook(OnnxLinear):
    """NF4 or any table of 16 entries in standard operators."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__(layer)
        packed = layer.packed
        assert isinstance(packed.encoding, Codebook) and packed.lut is not None
        self.block = packed.encoding.block_size
        self.codes = fixed(packed.codes)
        byte = torch.arange(256)
        halves = torch.stack([byte // 16, byte % 16], dim=-1)  # the first code is in the high half
        self.table = fixed(packed.lut.detach().float()[halves])
        self.absmax = Absmax(layer)

    def multiply(self, x: Tensor) -> Tensor:
        count = self.n * self.k
        values = lookup(self.codes.to(torch.int32)[:, None], self.table).reshape(-1)[:count]
        scale = self.absmax()[:, None].expand(-1, self.block).reshape(-1)[:count]
        return x @ (values * scale).reshape(self.n, self.k).t()


class Bnb4Linear(OnnxLinear):
    """NF4 and FP4 through MatMulBnb4: bitsandbytes' bytes unchanged."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__(layer)
        packed = layer.packed
        assert isinstance(packed.encoding, Codebook)
        kind = bnb4_type(packed)
        assert kind is not None
        self.attributes: dict[str, Any] = {
            "K": self.k,
            "N": self.n,
            "block_size": packed.encoding.block_size,
            "quant_type": kind,
        }
        self.codes = fixed(packed.codes)
        self.absmax = Absmax(layer)

    def multiply(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulBnb4",
            (x, self.codes, self.absmax()),
            self.attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.n),
            version=1,
        )


class Absmax(nn.Module):
    """Scales of a codebook layer: float32, or as stored by double quantization (`layer.nested_absmax`)."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        nested: NestedScale | None = getattr(layer, "nested_absmax", None)
        self.offset = 0.0
        if nested is None:
            self.scale: Tensor = fixed(layer.packed.scale)
            self.table: Tensor | None = None
            return
        self.codes, self.table, self.scale = fixed(nested.codes), fixed(nested.lut), fixed(nested.absmax)
        self.offset, self.block = nested.offset, nested.block_size

    def forward(self) -> Tensor:
        if self.table is None:
            return self.scale.float()
        count = self.codes.shape[0]
        values = torch.nn.functional.embedding(self.codes.to(torch.int32), self.table.float()[:, None])[:, 0]
        wide = self.scale.float()[:, None].expand(-1, self.block).reshape(-1)[:count]
        return values * wide + self.offset


def bnb4_type(packed: PackedWeight) -> int | None:
    """MatMulBnb4's quant_type for the layer's table (0: FP4, 1: NF4); None for a table of someone's own."""
    assert packed.lut is not None and isinstance(packed.encoding, Codebook)
    block = packed.encoding.block_size
    if block < 16 or block & (block - 1):
        return None
    lut = packed.lut.detach().float().cpu()
    # onnxruntime's own tables: quantkit.kernels.cpu reads them off the operator, a test compares.
    known = [kind for kind, name in ((0, "fp4"), (1, "nf4")) if torch.equal(lut, table(name))]
    return known[0] if known else None
