"""The tensors of one HQQ layer (safetensors, hqq's "encoded" state dict): layout, writing, checked reading.

A weight `[N, K]` is cut into groups of `g` consecutive weights of the **flattened** matrix, so the
codes form `[R, g]` with `R = N*K/g`, and groups straddle rows of the weight where g does not divide K.

    W_q     codes, split by rows: with c codes per word the matrix is cut into c slabs of R/c rows
            and word row r holds rows r, r + R/c, r + 2R/c, ...; the first slab in the highest bits
              8 bits   uint8 [R, g]
              4 bits   uint8 [R/2, g]          shifts 4, 0
              3 bits   int32 [ceil(R/10), g]   shifts 27, 24, .. 0; rows padded to a multiple of 10
              2 bits   uint8 [R/4, g]          shifts 6, 4, 2, 0
              1 bit    uint8 [R/8, g]          shifts 7 .. 0
    scale   [R, 1] in the compute dtype        w = (q - zero) * scale
    zero    [R, 1] in the compute dtype        a float, integral or not
    shape   int64 [2]; nbits, group_size, axis int32 []; flags uint8 []; packing, compute_dtype and
            unpack_view_dtype as the uint8 bytes of a string. hqq calls eval() on the dtypes; here
            they are looked up in a table.

With `view_as_float` the bytes of W_q are labelled as the compute dtype, `[R/c, g * 1 byte / itemsize]`.
Older hqq with offloaded metadata stacks zero and scale in `zero_scale` `[2, R, 1]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit import bitpack
from quantkit.encoding import PackedWeight, pack_affine
from quantkit.errors import CheckpointError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
WORD = {8: torch.uint8, 4: torch.uint8, 3: torch.int32, 2: torch.uint8, 1: torch.uint8}
PACKING = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
#: nbits that hqq writes -> (bits of the packing, largest code). 6, 5 and 1.58 bits are stored wider.
NBITS = {
    8.0: (8, 255),
    6.0: (8, 63),
    5.0: (8, 31),
    4.0: (4, 15),
    3.0: (3, 7),
    2.0: (2, 3),
    1.58: (2, 2),
    1.0: (1, 1),
}
FLAGS = (
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)
_CHUNK = 1 << 20  # codes packed at once


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[R, g]` -> hqq's words `[ceil(R/c), g]` (R must be a multiple of c, except for 3 bits)."""
    if bits == 8:
        return codes.to(torch.uint8)
    per = PER_WORD[bits]
    pad = -codes.shape[0] % per
    if pad and bits != 3:
        raise ValueError(f"{codes.shape[0]} groups of {bits} bits are not a multiple of {per}")
    slabs = torch.nn.functional.pad(codes, (0, 0, 0, pad)).unflatten(0, (per, -1))
    words = torch.empty(slabs.shape[1:], dtype=WORD[bits], device=codes.device)
    step = max(1, _CHUNK // max(1, codes.shape[1] * per))
    for at in range(0, len(words), step):
        low_first = slabs[:, at : at + step].flip(0).permute(1, 2, 0)
        words[at : at + step] = bitpack.pack_low(low_first, bits, 32 if bits == 3 else 8)[..., 0]
    return words


def unpack_rows(words: Tensor, bits: int, rows: int) -> Tensor:
    """Inverse of `pack_rows`: uint8 codes `[rows, g]`."""
    if bits == 8:
        return words[:rows]
    per = PER_WORD[bits]
    slabs = torch.empty((per, *words.shape), dtype=torch.uint8, device=words.device)
    step = max(1, _CHUNK // max(1, words.shape[1] * per))
    for at in range(0, len(words), step):
        low_first = bitpack.unpack_low(words[at : at + step, :, None], bits, per)
        slabs[:, at : at + step] = low_first.permute(2, 0, 1).flip(0)
    return slabs.flatten(0, 1)[:rows]


def packs(shape: tuple[int, int], bits: int, group: int) -> bool:
    """Can hqq pack this weight in groups of `group`? (Only 3-bit rows are padded.)"""
    weights = shape[0] * shape[1]
    return weights % group == 0 and (bits == 3 or weights // group % PER_WORD[bits] == 0)


def metadata(
    shape: tuple[int, int], bits: int, group: int, dtype: torch.dtype, optimize: bool, round_zero: bool
) -> dict[str, Tensor]:
    """Everything beside W_q, scale and zero, encoded as `HQQLinear.state_dict` encodes it."""
    flags = dict.fromkeys(FLAGS, False)
    flags |= {"encoded_state_dict": True, "stores_quant_config": True, "channel_wise": True}
    flags |= {"optimize": optimize, "round_zero": round_zero}
    tensors = {name: torch.tensor(int(value), dtype=torch.uint8) for name, value in flags.items()}
    for name, value in (("nbits", bits), ("group_size", group), ("axis", 1)):
        tensors[name] = torch.tensor(value, dtype=torch.int32)
    tensors["shape"] = torch.tensor(shape, dtype=torch.int64)
    tensors["packing"] = _text(PACKING[bits])
    tensors["unpack_view_dtype"] = _text(str(WORD[bits]))
    tensors["compute_dtype"] = _text(str(dtype))
    return tensors


def canonical(
    codes: Tensor, scale: Tensor, zero: Tensor, shape: tuple[int, int], bits: int, group: int
) -> PackedWeight:
    """PackedWeight from codes `[R, g]` and R scales and zeros.

    Where `group` does not divide K, groups straddle rows: the weight is expressed with groups of
    gcd(group, K), whose scales and zeros repeat.
    """
    n, k = shape
    shared = math.gcd(group, k)
    scale, zero = (
        t.reshape(-1).repeat_interleave(group // shared).view(n, k // shared) for t in (scale, zero)
    )
    return pack_affine(codes.reshape(n, k), scale, zero, bits, shared)


def number(tensors: Mapping[str, Tensor], name: str) -> float | None:
    """The one number in metadata tensor `name`, None when absent; CheckpointError for anything else."""
    tensor = tensors.get(name)
    if tensor is None:
        return None
    kinds: tuple[torch.dtype, ...] = (
        (torch.uint8, torch.bool) if name in FLAGS else (torch.int32, torch.int64)
    )
    if name == "nbits":
        kinds = (*kinds, torch.float32)
    if tensor.numel() != 1 or tensor.dtype not in kinds:
        raise CheckpointError(f"{name}: expected one number, found {tensor.dtype} {list(tensor.shape)}")
    value = float(tensor.item())
    if name in FLAGS and value not in (0.0, 1.0):
        raise CheckpointError(f"{name}: expected 0 or 1, found {value:g}")
    return value


def text(tensors: Mapping[str, Tensor], name: str, known: tuple[str, ...]) -> str | None:
    """The string in metadata tensor `name`, which must be one of `known`; None when absent."""
    tensor = tensors.get(name)
    if tensor is None:
        return None
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not 0 < len(tensor) <= 64:
        raise CheckpointError(
            f"{name}: expected a short string as bytes, found {tensor.dtype} {list(tensor.shape)}"
        )
    value = bytes(tensor.tolist()).decode("latin-1")
    if value not in known:
        raise CheckpointError(f"{name}: {value!r} is not one of {', '.join(known)}")
    return value


def read_bits(tensors: Mapping[str, Tensor], nbits: float | None, default: int) -> tuple[int, int]:
    """(bits of the packing, largest code) from `nbits` and `packing`, which must agree."""
    key = float(default) if nbits is None else round(nbits, 2)
    if key not in NBITS:
        raise CheckpointError(f"nbits: {key:g} is not one of {', '.join(f'{n:g}' for n in NBITS)}")
    bits, top = NBITS[key]
    packing = text(tensors, "packing", tuple(PACKING.values()))
    if packing not in (None, PACKING[bits]):
        raise CheckpointError(f"packing: {packing} does not hold {key:g} bits")
    view = text(tensors, "unpack_view_dtype", ("torch.uint8", "torch.int32"))
    if view not in (None, str(WORD[bits])):
        raise CheckpointError(f"unpack_view_dtype: {view} does not fit {PACKING[bits]}")
    text(tensors, "compute_dtype", tuple(str(dtype) for dtype in DTYPES.values()))
    return bits, top


def read_codes(
    tensors: Mapping[str, Tensor], bits: int, top: int, group: int, rows: int, as_float: bool
) -> Tensor:
    """Codes uint8 `[R, g]` from W_q, all of them at most `top`."""
    words = _required(tensors, "W_q")
    if as_float:
        if words.dtype not in DTYPES.values() or words.dim() != 2:
            raise CheckpointError(f"W_q: view_as_float is set, but it is {words.dtype} {list(words.shape)}")
        if words.shape[1] * words.element_size() % WORD[bits].itemsize:
            raise CheckpointError(f"W_q: {list(words.shape)} {words.dtype} holds no whole {WORD[bits]} words")
        words = words.contiguous().view(WORD[bits])
    want = (math.ceil(rows / PER_WORD[bits]), group)
    if words.dtype != WORD[bits] or tuple(words.shape) != want:
        raise CheckpointError(
            f"W_q: expected {WORD[bits]} {list(want)} at {bits} bits, found {words.dtype} {list(words.shape)}"
        )
    if bits == 3 and not bool(((words >= 0) & (words < 1 << 30)).all()):
        raise CheckpointError("W_q: a word holds more than ten 3-bit codes")
    codes = unpack_rows(words, bits, rows)
    if top < 2**bits - 1 and int(codes.max()) > top:
        raise CheckpointError(f"W_q: code {int(codes.max())} is beyond {top}, the largest of its nbits")
    return codes


def read_scales(tensors: Mapping[str, Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """scale and zero, `[R]` each, in the dtype of the file; finite."""
    found: list[Tensor] = []
    stacked = tensors.get("zero_scale")
    for index, name in ((1, "scale"), (0, "zero")):
        if stacked is not None and name not in tensors:
            if tuple(stacked.shape) != (2, rows, 1):
                raise CheckpointError(f"zero_scale: expected [2, {rows}, 1], found {list(stacked.shape)}")
            tensor = stacked[index]
        else:
            tensor = _required(tensors, name)
        if tensor.dtype not in DTYPES.values() or tuple(tensor.shape) != (rows, 1):
            raise CheckpointError(
                f"{name}: expected 16 or 32 bit floats [{rows}, 1], found {tensor.dtype} {list(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name}: contains NaN or Inf")
        found.append(tensor.reshape(-1))
    return found[0], found[1]


def _required(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{name}: missing from the layer")
    return tensors[name]


def _text(value: str) -> Tensor:
    return torch.tensor(list(value.encode("ascii")), dtype=torch.uint8)
