"""START HERE: what a quantized weight is, in memory.

A weight `W[N, K]` (N = out_features, K = in_features) is stored as small integer *codes* plus
*scales*. Three encodings serve every format; which codes are chosen is the business of
`quantkit.algorithms`, and how they lie in a file is the business of `quantkit.formats`.

Affine(bits, group_size)         w[n, k] = (q[n, k] - zero[n, g]) * scale[n, g],   g = k // group_size

    codes  uint8 [N, ceil(K*bits/8)]      K-contiguous, low bits first; one row per output
    scale  float [N, G]                   G = ceil(K / group_size); the last group may be short
    zero   uint8 [N, G] (integer zeros) or float [N, G] (HQQ)

    bits = 4:   byte j of a row holds   q[2j] in bits 0..3,  q[2j+1] in bits 4..7
    bits = 3:   a 2-bit plane [ceil(K/4)] followed by a 1-bit plane [ceil(K/8)]
    bits = 2:   byte j holds q[4j] .. q[4j+3] at bits 0, 2, 4, 6

Codebook(4, block_size)          w.flat[i] = lut[q[i]] * scale[i // block_size]

    codes  uint8 [ceil(N*K/2)]            flattened row-major, FIRST code in the HIGH nibble: these are
                                          bitsandbytes' (and onnxruntime MatMulBnb4's) bytes unchanged
    scale  float32 [ceil(N*K/block_size)] absmax; blocks run over the flattened weight, across rows
    lut    float32 [16]

Float8((bn, bk))                 w[n, k] = e4m3(q[n, k]) * scale[n // bn, k // bk]

    codes  uint8 [N, K]                   the bytes of float8_e4m3fn
    scale  float32 [ceil(N/bn), ceil(K/bk)]   (N, K): per tensor, (1, K): per channel, (128, 128): blocks

`perm` (optional, int64 [K]): column j of the packed matrix multiplies input feature `perm[j]`; this
is how GPTQ's act-order (`g_idx`) looks in memory. `activation` says how the layout wants inputs
rounded before the product (BitNet: int8 per token; fp8: e4m3 per token).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from quantkit import bitpack

Activation = Literal["int8_token", "int8_block", "fp8_token", "fp8_static", "fp8_group128"]

E4M3_MAX = 448.0


@dataclass(frozen=True)
class Affine:
    """`w = (q - zero) * scale` over groups of `group_size` consecutive inputs of one output row."""

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4, 8):
            raise ValueError(f"affine codes have 1, 2, 3, 4 or 8 bits, not {self.bits}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be positive, not {self.group_size}")

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of `in_features` columns (the last one may be short)."""
        return math.ceil(in_features / self.group_size)


@dataclass(frozen=True)
class Codebook:
    """`w = lut[q] * absmax` over blocks of the flattened weight (NF4, FP4)."""

    bits: int = 4
    block_size: int = 64


@dataclass(frozen=True)
class Float8:
    """`w = e4m3(q) * scale` with one scale per `block = (rows, columns)` tile."""

    block: tuple[int, int]


Encoding = Affine | Codebook | Float8


@dataclass(frozen=True)
class PackedWeight:
    """One quantized weight, in quantkit's canonical layout (see the module's docstring).

    `shape` is `(out_features, in_features)` of the dense weight. The tensors are plain; all of them
    live on one device. Constructors do not copy.
    """

    encoding: Encoding
    shape: tuple[int, int]
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    lut: Tensor | None = None
    perm: Tensor | None = None
    activation: Activation | None = None
    input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        check_shapes(self)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        names = ("codes", "scale", "zero", "lut", "perm", "input_scale")
        return {n: t for n in names if (t := getattr(self, n)) is not None}

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device (dtypes unchanged)."""
        return replace(self, **{n: t.to(device) for n, t in self.tensors().items()})  # type: ignore[arg-type]

    def nbytes(self) -> int:
        """Bytes held by all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def bits_per_weight(self) -> float:
        """Average bits per weight, scales and zeros included."""
        return self.nbytes() * 8 / (self.shape[0] * self.shape[1])


def expected_shapes(encoding: Encoding, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of `codes` and `scale` for a weight of `shape`; `zero` has the shape of `scale`."""
    n, k = shape
    if isinstance(encoding, Affine):
        if encoding.bits == 3:
            width = bitpack.packed_length(k, 2) + bitpack.packed_length(k, 1)
        else:
            width = bitpack.packed_length(k, encoding.bits)
        return {"codes": (n, width), "scale": (n, encoding.groups(k))}
    if isinstance(encoding, Codebook):
        return {"codes": (math.ceil(n * k / 2),), "scale": (math.ceil(n * k / encoding.block_size),)}
    bn, bk = encoding.block
    return {"codes": (n, k), "scale": (math.ceil(n / bn), math.ceil(k / bk))}


def check_shapes(packed: PackedWeight) -> None:
    """Raise ValueError unless every tensor has the shape and kind that the encoding asks for."""
    want = expected_shapes(packed.encoding, packed.shape)
    for name, shape in want.items():
        got = tuple(getattr(packed, name).shape)
        if got != shape:
            raise ValueError(
                f"{name} of {packed.encoding} for weight {packed.shape} must be {shape}, is {got}"
            )
    if packed.codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, are {packed.codes.dtype}")
    if isinstance(packed.encoding, Affine):
        if packed.zero is None or packed.zero.shape != packed.scale.shape:
            raise ValueError(f"affine weights need a zero of shape {want['scale']}")
    if isinstance(packed.encoding, Codebook) and (packed.lut is None or packed.lut.shape != (16,)):
        raise ValueError("codebook weights need a lut of 16 entries")
    if packed.perm is not None and packed.perm.shape != (packed.shape[1],):
        raise ValueError(f"perm must have {packed.shape[1]} entries, has {tuple(packed.perm.shape)}")


def affine_codes(packed: PackedWeight) -> Tensor:
    """Unpacked codes of an affine weight: uint8 `[N, K]`, in packed column order."""
    assert isinstance(packed.encoding, Affine)
    return bitpack.unpack_canonical(packed.codes, packed.encoding.bits, packed.shape[1])


def expand_groups(per_group: Tensor, group_size: int, in_features: int) -> Tensor:
    """`[N, G]` -> `[N, K]`: repeat each group's value over its columns (short last group allowed)."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :in_features]


def dequantize(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dense weight `[N, K]` in `dtype`: computed in float32 (float64 if asked), rounded once.

    Columns come back in the model's order (`perm` undone). This is the definition that every
    kernel is tested against.
    """
    n, k = packed.shape
    math_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    enc = packed.encoding
    if isinstance(enc, Affine):
        assert packed.zero is not None
        codes = affine_codes(packed).to(math_dtype)
        zero = expand_groups(packed.zero.to(math_dtype), enc.group_size, k)
        dense = (codes - zero) * expand_groups(packed.scale.to(math_dtype), enc.group_size, k)
    elif isinstance(enc, Codebook):
        assert packed.lut is not None
        codes = bitpack.unpack_nibbles_high_first(packed.codes)[: n * k]
        scale = packed.scale.to(math_dtype).repeat_interleave(enc.block_size)[: n * k]
        dense = (packed.lut.to(math_dtype)[codes.long()] * scale).view(n, k)
    else:
        bn, bk = enc.block
        scale = packed.scale.to(math_dtype).repeat_interleave(bn, 0)[:n].repeat_interleave(bk, 1)[:, :k]
        dense = packed.codes.view(torch.float8_e4m3fn).to(math_dtype) * scale
    if packed.perm is not None:
        dense = torch.empty_like(dense).index_copy_(1, packed.perm.long(), dense)
    return dense.to(dtype)


def pack_affine(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    *,
    perm: Tensor | None = None,
    activation: Activation | None = None,
) -> PackedWeight:
    """PackedWeight from unpacked integer codes `[N, K]` and per-group `scale`, `zero` `[N, G]`."""
    n, k = codes.shape
    return PackedWeight(
        Affine(bits, group_size),
        (n, k),
        bitpack.pack_canonical(codes.to(torch.uint8), bits),
        scale,
        zero,
        perm=perm,
        activation=activation,
    )
