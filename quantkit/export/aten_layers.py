"""Quantized layers as plain aten operations, for torch.export and AOTInductor.

The mathematics are `quantkit.encoding`'s; the operations are chosen so that a graph is short, cheap to run
eagerly and easy for a compiler to fuse:

* codes are unpacked by shifts of whole uint8 tensors and one `stack`;
* `q - zero` stays in small integers (it is exact there), so that only one pass writes floats;
* groups are a dimension to broadcast over, never repeated in memory;
* an input permutation moves columns of x, not of W.

Zero points are kept as the files keep them: one number where all are equal, else packed at the codes' width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from quantkit import bitpack
from quantkit.encoding import Affine, Codebook, Float8
from quantkit.kernels import reference
from quantkit.linear import QuantLinear


def aten_layer(layer: QuantLinear) -> nn.Module:
    """The module that computes what `layer` does with aten operations only, in float32."""
    kinds: dict[type, type[AtenLinear]] = {Affine: AtenAffine, Codebook: AtenCodebook, Float8: AtenFloat8}
    return kinds[type(layer.encoding)](layer)


class AtenLinear(nn.Module):
    """Base: permutation, rounding of inputs, product, bias; subclasses write the dense weight."""

    perm: Tensor | None

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.n, self.k = layer.shape
        self.out_features, self.in_features = layer.shape
        self.packed = _Rounding(layer)
        self.bias = layer.bias
        perm = getattr(layer, "perm", None)
        self.perm = None if perm is None else fixed(perm.to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        if self.packed.activation is not None:
            x = reference.round_activation(x, self.packed)  # type: ignore[arg-type]
        if self.perm is not None:
            x = torch.index_select(x, -1, self.perm)
        return torch.nn.functional.linear(x, self.dense(), bias)

    def dense(self) -> Tensor:
        """The weight `[N, K]` in float32, columns in packed order."""
        raise NotImplementedError


class _Rounding(nn.Module):
    """What `reference.round_activation` asks of a packed weight."""

    perm = None

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.activation, self.encoding = layer.activation, layer.encoding
        scale = getattr(layer, "input_scale", None)
        self.input_scale: Tensor | None = None if scale is None else fixed(scale)


class AtenAffine(AtenLinear):
    """`(q - zero) * scale` by groups."""

    zero: Tensor | None

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__(layer)
        assert isinstance(layer.encoding, Affine)
        self.bits: int = layer.encoding.bits
        packed = layer.packed
        assert packed.zero is not None
        self.codes, self.scale, zero = fixed(packed.codes), fixed(packed.scale), packed.zero
        self.groups: int = packed.scale.shape[1]
        self.group_size = min(layer.encoding.group_size, self.k)
        self.common: int | None = None
        self.packed_zeros = False
        if not zero.is_floating_point() and bool((zero == zero.flatten()[0]).all()):
            self.common, self.zero = int(zero.flatten()[0]), None
        elif not zero.is_floating_point() and self.bits in (2, 4) and int(zero.max()) < 2**self.bits:
            self.packed_zeros = True
            self.zero = fixed(bitpack.pack_low(zero, self.bits))
        else:
            self.zero = fixed(zero)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed.activation == "int8_token" and self.groups == 1:
            return self._integer_product(x)
        return super().forward(x)

    def _integer_product(self, x: Tensor) -> Tensor:
        """BitNet's rule, as `reference._int8_linear`: exact sums of integers, then both scales once."""
        if self.perm is not None:
            x = torch.index_select(x, -1, self.perm)
        rounded, scale = reference.int8_per_token(x)
        wide = torch.float64 if self.k >= 65536 else torch.float32
        product = torch.nn.functional.linear(
            rounded.to(wide), self._centred().reshape(self.n, self.k).to(wide)
        )
        out = product * (self.scale.to(wide)[:, 0] / scale.to(wide))
        return (out if self.bias is None else out + self.bias.to(wide)).float()

    def dense(self) -> Tensor:
        scale = self.scale.float()
        if self.groups * self.group_size == self.k:
            return (self._centred().float() * scale[..., None]).reshape(self.n, self.k)
        return self._centred().float() * scale.repeat_interleave(self.group_size, 1)[:, : self.k]

    def _centred(self) -> Tensor:
        """q - zero as `[N, G, group]` (`[N, K]` where the last group is short), in the smallest type."""
        q = unpack(self.codes, self.bits, self.k)
        whole = self.groups * self.group_size == self.k
        if whole:
            q = q.reshape(self.n, self.groups, self.group_size)
        small = torch.int8 if self.bits <= 4 else torch.int16
        if self.common is not None:
            return q.to(small) - self.common
        assert self.zero is not None
        zero = unpack(self.zero, self.bits, self.groups) if self.packed_zeros else self.zero
        zero = zero[..., None] if whole else zero.repeat_interleave(self.group_size, 1)[:, : self.k]
        if zero.is_floating_point():
            return q.float() - zero.float()
        # A zero of 16 bits' worth (GPTQ v1 allows 2**bits) still fits: both sides are below 256.
        return q.to(torch.int16) - zero.to(torch.int16) if self.bits > 4 else q.to(small) - zero.to(small)


class AtenCodebook(AtenLinear):
    """`lut[q] * absmax` by blocks of the flattened weight; two codes per lookup."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__(layer)
        assert isinstance(layer.encoding, Codebook)
        self.block = layer.encoding.block_size
        packed = layer.packed
        assert packed.lut is not None
        self.codes, self.lut = fixed(packed.codes), fixed(packed.lut.float())
        nested = getattr(layer, "nested_absmax", None)
        self.nested = None if nested is None else NestedAbsmax(nested)
        self.scale: Tensor | None = None if nested is not None else fixed(packed.scale)

    def dense(self) -> Tensor:
        # All 256 bytes as pairs of values, the high nibble first: one lookup per byte.
        high = self.lut.repeat_interleave(16)
        pairs = torch.stack([high, self.lut.repeat(16)], dim=-1)
        values = pairs.index_select(0, self.codes.to(torch.int32)).flatten()
        scale = self.scale if self.nested is None else self.nested()
        assert scale is not None
        count = self.n * self.k
        if count % self.block == 0:
            return (values.reshape(-1, self.block) * scale[:, None]).reshape(self.n, self.k)
        return (values[:count] * scale.repeat_interleave(self.block)[:count]).reshape(self.n, self.k)


class NestedAbsmax(nn.Module):
    """absmax of doubly quantized NF4: `map[u8] * nested[i // block] + offset`."""

    def __init__(self, nested: object) -> None:
        super().__init__()
        self.codes, self.absmax = fixed(nested.codes), fixed(nested.absmax)  # type: ignore[attr-defined]
        self.map, self.offset = fixed(nested.lut.float()), float(nested.offset)  # type: ignore[attr-defined]
        self.block = int(nested.block_size)  # type: ignore[attr-defined]

    def forward(self) -> Tensor:
        count = self.codes.numel()
        scale = self.absmax.float().repeat_interleave(self.block)[:count]
        return self.map.index_select(0, self.codes.flatten().to(torch.int32)) * scale + self.offset


class AtenFloat8(AtenLinear):
    """`e4m3(q) * scale` by tiles."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__(layer)
        assert isinstance(layer.encoding, Float8)
        self.codes, self.scale = fixed(layer.packed.codes), fixed(layer.packed.scale)
        self.tile = (min(layer.encoding.block[0], self.n), min(layer.encoding.block[1], self.k))

    def dense(self) -> Tensor:
        values = self.codes.view(torch.float8_e4m3fn).float()
        scale = self.scale.float()
        rows, columns = self.tile
        if self.n % rows == 0 and self.k % columns == 0:
            tiles = values.reshape(self.n // rows, rows, self.k // columns, columns)
            return (tiles * scale[:, None, :, None]).reshape(self.n, self.k)
        wide = scale.repeat_interleave(rows, 0)[: self.n].repeat_interleave(columns, 1)[:, : self.k]
        return values * wide


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Codes uint8 `[..., count]` of the canonical layout; `bitpack.unpack_canonical` without loops and writes."""
    if bits == 8:
        return packed[..., :count]
    if bits == 3:
        low_bytes = math.ceil(count / 4)
        low = unpack(packed[..., :low_bytes], 2, count)
        return low | (unpack(packed[..., low_bytes:], 1, count) << 2)
    mask = (1 << bits) - 1
    parts = [(packed >> shift) & mask if shift else packed & mask for shift in range(0, 8 - bits, bits)]
    parts.append(packed >> (8 - bits))
    return torch.stack(parts, dim=-1).flatten(-2)[..., :count]


def fixed(tensor: Tensor) -> nn.Parameter:
    """A frozen parameter."""
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)
