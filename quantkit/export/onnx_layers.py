"""Quantized linear layers as ONNX operators on weights that stay packed in the file.

    layer                          operators                                                   domain
    affine, 4 bits                 MatMulNBits                                                 com.microsoft
    affine, 2 and 8 bits           MatMulNBits; for exact arithmetic widened at load to 4-bit  com.microsoft
    affine, 1 and 3 bits           MatMulNBits on codes widened at load to 4 bits              com.microsoft
    affine, groups not of 16       table lookup of the codes, (q - zero) * scale, MatMul       standard
    affine, BitNet activations     MatMulNBits on the rounded integers, then both scales       com.microsoft
    NF4, FP4, float32 arithmetic   table lookup at load, MatMul                                standard
    NF4, FP4, int8 activations     sum of two 8-bit MatMulNBits, their codes looked up at load com.microsoft
    fp8                            DequantizeLinear (blocked along K), MatMul                  standard

*At load*: nodes whose inputs are all weights are computed once, when onnxruntime opens the file (its
constant folding). The file holds codes, scales and zeros as the checkpoint does (3 bits in 3 bits, 16-bit
scales, 8-bit absmax of NF4's double quantization); what the operators want beyond that (float32 scales,
wider codes, one scale per block) is made by such nodes. Conversions of codes are table lookups: a byte of
codes is the index of the bytes it becomes.

In standard mode (`contrib=False`) 4-bit affine layers are DequantizeLinear over UINT4 `[K, N]`, blocked
along K, and all other affine and codebook layers table lookups; onnxruntime then folds those into dense
float32 weights in memory, though not in the file.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.encoding import Affine, Codebook, Float8, PackedWeight, affine_codes
from quantkit.export.onnx_base import OnnxLinear, fixed, lookup, matmul_nbits
from quantkit.export.onnx_codebook import CodebookPlanes, LookupCodebook, plane_block
from quantkit.kernels import cpu_weights, reference
from quantkit.kernels.cpu_weights import FLOAT32, INT8
from quantkit.linear import QuantLinear

#: Prefix of parameters that `onnx_graph` turns from packed bytes into UINT4 tensors.
UINT4 = "uint4_"


def onnx_layer(layer: QuantLinear, *, level: int, contrib: bool) -> OnnxLinear:
    """The module that stands for `layer` in the traced decoder.

    level: 1 for float32 arithmetic, 4 for int8 activations (see docs/export.md).
    """
    packed = layer.packed
    encoding = packed.encoding
    if isinstance(encoding, Affine):
        block = cpu_weights_block(encoding.group_size, packed.shape[1])
        if not contrib and encoding.bits == 4 and block is not None and _uint4_holds(packed):
            return DequantizeAffine(layer, block)
        if not contrib or block is None or packed.activation not in (None, "int8_token"):
            return LookupAffine(layer)
        if packed.activation == "int8_token" and (packed.scale.shape[1] != 1 or packed.shape[1] >= 65536):
            return LookupAffine(layer)
        return NBitsLinear(layer, block, FLOAT32 if packed.activation else level)
    if isinstance(encoding, Codebook):
        block = plane_block(packed) if contrib and level == INT8 else None
        return LookupCodebook(layer) if block is None else CodebookPlanes(layer, block)
    return Float8Linear(layer)


def cpu_weights_block(group_size: int, in_features: int) -> int | None:
    """MatMulNBits' block for a group: see `quantkit.kernels.cpu.ort_block`."""
    block = reference.activation_block(group_size, in_features)
    return block if group_size >= in_features or group_size % block == 0 else None


def _uint4_holds(packed: PackedWeight) -> bool:
    zero = packed.zero
    assert zero is not None
    return zero.dtype == torch.uint8 and int(zero.max()) < 16 and packed.shape[0] % 2 == 0


# -- MatMulNBits --------------------------------------------------------------------------------------


class NBitsLinear(OnnxLinear):
    """Affine weights through MatMulNBits; arithmetic as in `quantkit.kernels.cpu`.

    Zeros that integers cannot hold (HQQ's floats) are split: the nearest integer goes into the operator,
    what is left multiplies the sum of x over each group.
    """

    table: Tensor
    low_table: Tensor
    high_table: Tensor

    def __init__(self, layer: QuantLinear, block: int, level: int) -> None:
        super().__init__(layer)
        packed = layer.packed
        encoding = packed.encoding
        assert isinstance(encoding, Affine) and packed.zero is not None
        self.bits, self.group, self.block, self.level = encoding.bits, encoding.group_size, block, level
        self.width = cpu_weights.WIDTHS[level][self.bits]
        if level == INT8 and self.width == 2 and block < 32:
            self.width = 4
        self.blocks = math.ceil(self.k / block)
        self.groups = packed.scale.shape[1]
        self.per_group = self.blocks if self.groups == 1 else self.group // block
        self.integer = packed.activation == "int8_token"
        self.codes = fixed(packed.codes)
        self.scale = fixed(packed.scale)
        held = packed.zero if packed.zero.dtype == torch.uint8 else packed.zero.float().round()
        largest = 255 if self.bits == 8 else 2**self.width - 1
        held = held.clamp(0, largest).to(torch.uint8)
        self.zero: Tensor | None = None
        if not torch.equal(held.to(packed.zero.dtype), packed.zero):
            self.zero = fixed(packed.zero)  # the exact zeros, for the correction
        self.planes = 2 if self.bits == 8 and self.width == 4 else 1
        zeros = cpu_weights.per_block(held, self.group, block, self.blocks)
        self.zeros = nn.ParameterList()
        for plane in (zeros & 15, zeros >> 4) if self.planes == 2 else (zeros,):
            if bool((plane == 2 ** (self.width - 1)).all()):  # the operator's default
                plane = plane[:0]
            elif bool((plane == plane[:1]).all()):  # one row says it all; repeated at load
                plane = plane[:1]
            self.zeros.append(fixed(cpu_weights.pack(plane, self.width)))
        if self.planes == 2:
            self.register_buffer("low_table", half_table(True))
            self.register_buffer("high_table", half_table(False))
        elif self.width != self.bits:
            wide = three_bit_table() if self.bits == 3 else widening_table(self.bits, self.width)
            self.register_buffer("table", wide)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None or self.planes == 2 or self.zero is not None or self.integer:
            return super().forward(x)
        if self.perm is not None:
            x = torch.index_select(x, -1, self.perm)
        scales = self._per_block(self.scale.float())
        return self._node(x, self._widened(), scales, self.zeros[0], self.bias.float())

    def multiply(self, x: Tensor) -> Tensor:
        token_scale = None
        if self.integer:
            x, token_scale = reference.int8_per_token(x)
        scales = self._per_block(self.scale.float())
        ones = torch.ones_like(scales) if self.integer else scales
        if self.planes == 2:
            out = self._node(x, _lookup_pairs(self.codes, self.k, self.low_table), ones, self.zeros[0])
            high = _lookup_pairs(self.codes, self.k, self.high_table)
            out = out + self._node(x, high, ones * 16, self.zeros[1])
        else:
            out = self._node(x, self._widened(), ones, self.zeros[0])
        if self.zero is not None:
            out = out + self._correction(x, scales)
        if token_scale is not None:
            out = out * (self.scale.float()[:, 0] / token_scale)
        return out

    def _node(
        self, x: Tensor, b: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        row = self.blocks * self.block * self.width // 8
        if b.shape[1] < row:
            b = torch.nn.functional.pad(b, (0, row - b.shape[1]))
        b = b.reshape(self.n, self.blocks, -1)
        given = None
        if zeros.numel():
            given = zeros if zeros.shape[0] == self.n else zeros.expand(self.n, -1)
        shape = (self.n, self.k)
        return matmul_nbits(x, b, scales, shape, bits=self.width, level=self.level, zeros=given, bias=bias)

    def _per_block(self, per_group: Tensor) -> Tensor:
        if self.per_group == 1:
            return per_group
        wide = per_group[:, :, None].expand(-1, -1, self.per_group).reshape(self.n, -1)
        return wide[:, : self.blocks]

    def _widened(self) -> Tensor:
        if self.width == self.bits:
            return self.codes
        if self.bits == 3:
            low, high = math.ceil(self.k / 4), math.ceil(self.k / 8)
            # A byte of the 1-bit plane serves two bytes of the 2-bit plane.
            top = self.codes[:, low : low + high].to(torch.int32)
            pair = torch.stack([top % 16, top // 16], dim=-1).reshape(self.n, -1)[:, :low]
            index = self.codes[:, :low].to(torch.int32) * 16 + pair
            return lookup(index, self.table)
        return lookup(self.codes.to(torch.int32), self.table)

    def _correction(self, x: Tensor, scales: Tensor) -> Tensor:
        assert self.zero is not None
        if self.level == INT8:  # the definition rounds every x, those that only the zeros multiply included
            x = reference.through_int8_blocks(x, self.block)
        zero = self.zero.float()
        held = torch.clamp(torch.round(zero), 0.0, 255.0 if self.bits == 8 else 2.0**self.width - 1)
        left = (held - zero) * self.scale.float()
        width = self.k if self.groups == 1 else self.group
        x = torch.nn.functional.pad(x, (0, self.groups * width - self.k))
        return x.unflatten(-1, (self.groups, width)).sum(-1) @ left.t()


def _lookup_pairs(codes: Tensor, k: int, table: Tensor) -> Tensor:
    """8-bit codes `[N, K]` -> bytes `[N, ceil(K/2)]` holding the low or the high halves of two codes."""
    if k % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    pair = codes.to(torch.int32).unflatten(1, (-1, 2))
    return lookup(pair[:, :, 0] * 256 + pair[:, :, 1], table)


# Tables are made once and shared by all layers, so that the file holds each once.


@cache
def half_table(low: bool) -> Tensor:
    """uint8 `[65536, 1]`: the low (or high) halves of two bytes in one (index first*256 + second)."""
    values = torch.arange(65536)
    first, second = values // 256, values % 256
    half = (first % 16 + second % 16 * 16) if low else (first // 16 + second // 16 * 16)
    return half.to(torch.uint8)[:, None]


@cache
def widening_table(bits: int, width: int) -> Tensor:
    """uint8 `[256, width/bits]`: the bytes that a byte of `bits`-bit codes becomes at `width` bits."""
    codes = cpu_weights.unpack(torch.arange(256).to(torch.uint8)[:, None], bits, 8 // bits)
    return cpu_weights.pack(codes, width)


@cache
def three_bit_table() -> Tensor:
    """uint8 `[4096, 2]`: four 2-bit codes and their four top bits (index low*16 + top) at 4 bits each."""
    index = torch.arange(4096)
    low = cpu_weights.unpack((index // 16).to(torch.uint8)[:, None], 2, 4)
    top = cpu_weights.unpack((index % 16).to(torch.uint8)[:, None], 1, 4)
    return cpu_weights.pack(low + 4 * top, 4)


# -- standard operators -----------------------------------------------------------------------------------


class DequantizeAffine(OnnxLinear):
    """4-bit affine weights as UINT4 `[K, N]` through DequantizeLinear, blocked along K."""

    def __init__(self, layer: QuantLinear, block: int) -> None:
        super().__init__(layer)
        packed = layer.packed
        encoding = packed.encoding
        assert isinstance(encoding, Affine) and packed.zero is not None
        self.block = encoding.group_size if packed.scale.shape[1] > 1 else self.k
        if self.k % self.block:
            self.block = block
        blocks = math.ceil(self.k / self.block)
        self.pad = blocks * self.block - self.k
        codes = torch.nn.functional.pad(affine_codes(packed), (0, self.pad))
        self.uint4_codes = fixed(cpu_weights.pack(codes.t().contiguous(), 4))
        scale = cpu_weights.per_block(packed.scale, encoding.group_size, self.block, blocks)
        zero = cpu_weights.per_block(packed.zero, encoding.group_size, self.block, blocks)
        self.scale = fixed(scale.t())
        self.uint4_zero = fixed(cpu_weights.pack(zero.t().contiguous(), 4))
        self.activation = packed.activation
        self.packed_activation = None if packed.activation is None else packed

    def multiply(self, x: Tensor) -> Tensor:
        if self.packed_activation is not None:
            x = reference.round_activation(x, self.packed_activation)
        if self.pad:
            x = torch.nn.functional.pad(x, (0, self.pad))
        weight = torch.onnx.ops.symbolic(
            "::DequantizeLinear",
            (self.uint4_codes, self.scale.float(), self.uint4_zero),
            {"axis": 0, "block_size": self.block},
            dtype=torch.float32,
            shape=(self.k + self.pad, self.n),
        )
        return x @ weight


class LookupAffine(OnnxLinear):
    """Any affine weight in standard operators: codes from a table, then (q - zero) * scale."""

    table: Tensor
    top_table: Tensor

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__(layer)
        packed = layer.packed
        encoding = packed.encoding
        assert isinstance(encoding, Affine) and packed.zero is not None
        self.bits, self.group = encoding.bits, encoding.group_size
        self.codes, self.scale, self.zero = fixed(packed.codes), fixed(packed.scale), fixed(packed.zero)
        self.activation_of = None if packed.activation is None else packed
        if self.bits != 8:
            self.register_buffer("table", code_table(2 if self.bits == 3 else self.bits))
        if self.bits == 3:
            self.register_buffer("top_table", code_table(1))

    def multiply(self, x: Tensor) -> Tensor:
        if self.activation_of is not None:
            x = reference.round_activation(x, self.activation_of)
        if self.bits == 8:
            codes = self.codes.float()
        elif self.bits == 3:
            low = math.ceil(self.k / 4)
            two = lookup(self.codes[:, :low].to(torch.int32), self.table)[:, : self.k]
            one = lookup(self.codes[:, low:].to(torch.int32), self.top_table)[:, : self.k]
            codes = two + 4.0 * one
        else:
            codes = lookup(self.codes.to(torch.int32), self.table)[:, : self.k]
        codes = codes - self._expand(self.zero.float())
        return x @ (codes * self._expand(self.scale.float())).t()

    def _expand(self, per_group: Tensor) -> Tensor:
        if per_group.shape[1] == 1:
            return per_group
        wide = per_group[:, :, None].expand(-1, -1, self.group).reshape(self.n, -1)
        return wide[:, : self.k]


@cache
def code_table(bits: int) -> Tensor:
    """float32 `[256, 8/bits]`: the codes in each byte, low bits first."""
    return cpu_weights.unpack(torch.arange(256).to(torch.uint8)[:, None], bits, 8 // bits).float()


class Float8Linear(OnnxLinear):
    """e4m3 weights through DequantizeLinear with scales repeated over rows, blocked along K."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__(layer)
        packed = layer.packed
        assert isinstance(packed.encoding, Float8)
        self.rows, self.columns = packed.encoding.block
        self.codes = fixed(packed.codes.view(torch.float8_e4m3fn))
        self.scale = fixed(packed.scale)
        self.activation_of = None if packed.activation is None else packed

    def multiply(self, x: Tensor) -> Tensor:
        if self.activation_of is not None:
            x = reference.round_activation(x, self.activation_of)
        scale = self.scale.float()
        if scale.numel() == 1:
            return self._product(x, scale.reshape(()), {})
        if scale.shape[1] == 1:
            return self._product(x, self._rows(scale).reshape(-1), {"axis": 0})
        weight = self.codes.float()
        wide = self._rows(scale)[:, :, None].expand(-1, -1, self.columns).reshape(self.n, -1)
        return x @ (weight * wide[:, : self.k]).t()

    def _product(self, x: Tensor, scale: Tensor, attributes: dict[str, Any]) -> Tensor:
        weight = torch.onnx.ops.symbolic(
            "::DequantizeLinear", (self.codes, scale), attributes, dtype=torch.float32, shape=(self.n, self.k)
        )
        return x @ weight.t()

    def _rows(self, scale: Tensor) -> Tensor:
        if self.rows == 1:
            return scale
        wide = scale[:, None, :].expand(-1, min(self.rows, self.n), -1).reshape(-1, scale.shape[1])
        return wide[: self.n]
