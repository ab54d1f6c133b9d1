"""Codebook layers (NF4, FP4) as ONNX operators; see `quantkit.export.onnx_layers`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from quantkit.algorithms.codebook import NestedScale
from quantkit.encoding import Codebook, PackedWeight
from quantkit.export.onnx_base import OnnxLinear, fixed, lookup, matmul_nbits
from quantkit.kernels import reference
from quantkit.linear import QuantLinear


class LookupCodebook(OnnxLinear):
    """NF4 or any table of 16 entries: looked up and scaled when the file is opened, then a dense product."""

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


class CodebookPlanes(OnnxLinear):
    """NF4 or FP4 as the sum of two MatMulNBits of 8 bits, with activations rounded to int8.

    Any 16 values are, closely enough, `fine * i + coarse * j` for 8-bit integers i and j (`planes`). A byte of
    codes is looked up in two tables, when the file is opened, and becomes two bytes for each operator.
    """

    def __init__(self, layer: QuantLinear, block: int) -> None:
        super().__init__(layer)
        packed = layer.packed
        assert isinstance(packed.encoding, Codebook) and packed.lut is not None
        self.block, self.blocks = block, self.k // block
        self.repeat = packed.encoding.block_size // block
        self.codes = fixed(packed.codes)
        made = planes(_values(packed))
        byte = torch.arange(256)
        halves = torch.stack([byte // 16, byte % 16], dim=-1)
        self.tables = nn.ParameterList([fixed(plane.codes[halves]) for plane in made])
        self.units = [plane.unit for plane in made]
        self.absmax = Absmax(layer)

    def multiply(self, x: Tensor) -> Tensor:
        index = self.codes.to(torch.int32)[:, None]
        scale = self.absmax()[:, None].expand(-1, self.repeat).reshape(self.n, self.blocks)
        parts = [
            matmul_nbits(
                x,
                lookup(index, table).reshape(self.n, self.blocks, self.block),
                scale * unit,
                (self.n, self.k),
                bits=8,
                level=4,
            )
            for table, unit in zip(self.tables, self.units)
        ]
        return parts[0] + parts[1]


def plane_block(packed: PackedWeight) -> int | None:
    """How many inputs share a scale in `CodebookPlanes`; None where it does not fit the layer."""
    assert isinstance(packed.encoding, Codebook) and packed.lut is not None
    size, k = packed.encoding.block_size, packed.shape[1]
    if size < 16 or size & (size - 1) or k % size or packed.lut.numel() != 16:
        return None
    worst = max(plane.error for plane in planes(_values(packed)))
    return reference.activation_block(size, k) if worst < PLANES_ERROR else None


def planes_table(packed: PackedWeight) -> Tensor:
    """The layer's table, float32 `[16]`, as its planes give it."""
    total = sum(plane.unit * (plane.codes.double() - 128) for plane in planes(_values(packed)))
    assert isinstance(total, Tensor)
    return total.float()


def _values(packed: PackedWeight) -> tuple[float, ...]:
    assert packed.lut is not None
    return tuple(packed.lut.detach().float().tolist())


#: Largest error of a table's value, in units of its largest, that planes may stand for.
PLANES_ERROR = 1e-5


@dataclass(frozen=True)
class Plane:
    """One term of a table: `unit * (codes - 128)`; `error` is the largest of the sum of terms."""

    codes: Tensor  # uint8 [16]
    unit: float
    error: float


@cache
def planes(lut: tuple[float, ...]) -> tuple[Plane, Plane]:
    """`lut[q] ~ coarse.unit * (coarse.codes[q] - 128) + fine.unit * (fine.codes[q] - 128)`, float64.

    Tries many pairs of units, since the 16 values are all that must be hit; the best has 2.8e-6 (RMS) of the
    largest value for NF4, 1e-8 for FP4. The obvious pair (1/127, 1/127/254) would have 8e-6.
    """
    values = torch.tensor(lut, dtype=torch.float64)
    largest = float(values.abs().max())
    values = values / largest
    coarse = torch.linspace(1 / 127, 1 / 64, 4001, dtype=torch.float64)[:, None]
    first = (values / coarse).round()
    rest = values - first * coarse
    spread = rest.abs().amax(1, keepdim=True)
    best: tuple[float, float, float] | None = None
    for stretch in torch.linspace(1, 1.6, 601, dtype=torch.float64).tolist():
        fine = (spread * stretch / 127).clamp(min=1e-12)
        error = (rest - (rest / fine).round() * fine).square().mean(1)
        at = int(error.argmin())
        if best is None or float(error[at]) < best[0]:
            best = float(error[at]), float(coarse[at]), float(fine[at])
    assert best is not None
    _, one, two = best
    i = (values / one).round()
    j = ((values - i * one) / two).round()
    worst = float((values - i * one - j * two).abs().max())
    return tuple(  # type: ignore[return-value]
        Plane((codes + 128).to(torch.uint8), unit * largest, worst) for codes, unit in ((i, one), (j, two))
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
