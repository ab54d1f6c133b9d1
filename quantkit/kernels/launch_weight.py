"""A weight as the kernels with a launch of their own take it: `few_rows` and `wide_hopper`.

Each op builds it once a call, and passes it to whichever of them answers.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from quantkit.encoding import Affine, Codebook, PackedWeight

#: How codes become numbers. `KINDS` of `few_rows_launch` and of `wide_hopper_launch` say which of
#: these a kernel has, and by which number it knows them.
Kind = Literal["codebook", "affine1", "affine2", "affine3", "affine4", "affine8", "float8"]

#: By the bits of a code.
AFFINE: dict[int, Kind] = {1: "affine1", 2: "affine2", 3: "affine3", 4: "affine4", 8: "affine8"}


class LaunchWeight(NamedTuple):
    """One packed weight `[N, K]`; its tensors as `quantkit.encoding` defines them."""

    kind: Kind
    n: int  #: rows of W
    group: int  #: inputs that share a scale, 0 for all K; of a codebook the block, which may run across rows
    codes: Tensor  #: uint8 [N, bytes of K]; of a codebook flat, [ceil(N * K / 2)]
    scale: Tensor  #: float [ceil(N / scale_rows), ceil(K / group)]; of a codebook flat, [ceil(N * K / group)]
    zero: Tensor | None = None  #: uint8 or float [N, ceil(K / group)] of affine codes
    lut: Tensor | None = None  #: float [16] of a codebook
    perm: Tensor | None = None  #: int64 [K]: column j of the packed weight multiplies column `perm[j]` of x
    scale_rows: int = 1  #: rows of W that share a scale: float8 has blocks


def affine(
    codes: Tensor, scale: Tensor, zero: Tensor, perm: Tensor | None, n: int, bits: int, group_size: int
) -> LaunchWeight:
    """The weight of `n` rows with affine codes of `bits`, a scale for each `group_size` inputs of a row."""
    group = 0 if scale.shape[1] == 1 else group_size
    return LaunchWeight(AFFINE[bits], n, group, codes, scale, zero, None, perm)


def codebook(codes: Tensor, scale: Tensor, lut: Tensor, n: int, block: int) -> LaunchWeight:
    """The codebook weight of `n` rows, a scale for each `block` of its values."""
    return LaunchWeight("codebook", n, block, codes, scale, None, lut)


def float8(codes: Tensor, scale: Tensor, block_n: int, block_k: int) -> LaunchWeight:
    """The float8 weight `codes [N, K]`, a scale for each `[block_n, block_k]`."""
    n, k = codes.shape
    group = block_k if block_k < k else 0
    return LaunchWeight("float8", n, group, codes, scale, None, None, None, block_n)


def of(packed: PackedWeight) -> LaunchWeight:
    """The same of a `PackedWeight`."""
    enc, codes, scale = packed.encoding, packed.codes, packed.scale
    if isinstance(enc, Affine):
        assert packed.zero is not None
        return affine(codes, scale, packed.zero, packed.perm, packed.shape[0], enc.bits, enc.group_size)
    if isinstance(enc, Codebook):
        assert packed.lut is not None
        return codebook(codes, scale, packed.lut, packed.shape[0], enc.block_size)
    return float8(codes, scale, *enc.block)
