"""Packing small integer codes into words, and back: the only file outside kernels/ that shifts bits.

Two bit orders cover every format:

* **low first** (`pack_low`): code 0 sits in the lowest bits of the word. With 8-bit words this is
  quantkit's canonical order (and ONNX Runtime's); with 32-bit words it is GPTQ's and
  compressed-tensors'. Codes whose width does not divide the word (3 bits) form one continuous
  bit stream that crosses word boundaries, as GPTQ's 3-bit files have it.
* **planes** (`pack_planes3`): quantkit's canonical 3-bit layout, a 2-bit plane followed by a 1-bit
  plane, so that no code crosses a byte.

All functions work along the last dimension of a tensor of codes, pad with zeros to whole words, and
run on any device in integer arithmetic only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def packed_length(count: int, bits: int, word_bits: int = 8) -> int:
    """Words needed for `count` codes of `bits` bits as one continuous stream."""
    return math.ceil(count * bits / word_bits)


def _stream_geometry(bits: int, word_bits: int) -> tuple[int, int]:
    """(codes, words) of the shortest run in which a whole number of codes fills whole words."""
    cycle = math.lcm(bits, word_bits)
    return cycle // bits, cycle // word_bits


def pack_low(codes: Tensor, bits: int, word_bits: int = 8) -> Tensor:
    """Pack `codes` (integers `0 <= c < 2**bits`, shape `[..., K]`) low bits first.

    Returns uint8 (`word_bits=8`) or int32 (`word_bits=32`) of shape
    `[..., ceil(K * bits / word_bits)]`. Bits beyond the last code are zero.
    """
    if bits > word_bits:
        raise ValueError(f"{bits}-bit codes do not fit {word_bits}-bit words")
    count = codes.shape[-1]
    run_codes, run_words = _stream_geometry(bits, word_bits)
    pad = -count % run_codes
    if pad:
        codes = torch.nn.functional.pad(codes, (0, pad))
    runs = codes.unflatten(-1, (-1, run_codes)).to(torch.int64)
    words = runs.new_zeros(*runs.shape[:-1], run_words)
    for i in range(run_codes):
        word, shift = divmod(i * bits, word_bits)
        value = runs[..., i]
        words[..., word] |= value << shift
        if shift + bits > word_bits:  # the code crosses into the next word
            words[..., word + 1] |= value >> (word_bits - shift)
    words &= (1 << word_bits) - 1
    words = words.flatten(-2)[..., : packed_length(count, bits, word_bits)]
    if word_bits == 8:
        return words.to(torch.uint8).contiguous()
    # int64 -> int32 keeps the low 32 bits on every backend only for in-range values: fold the sign.
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return words.to(torch.int32).contiguous()


def unpack_low(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_low`: uint8 codes of shape `[..., count]` from uint8 or int32 words."""
    word_bits = {torch.uint8: 8, torch.int8: 8, torch.int32: 32, torch.uint32: 32}[words.dtype]
    if packed_length(count, bits, word_bits) > words.shape[-1]:
        raise ValueError(f"{count} codes of {bits} bits do not fit in {words.shape[-1]} words")
    run_codes, run_words = _stream_geometry(bits, word_bits)
    wide = words.to(torch.int64) & ((1 << word_bits) - 1)
    pad = -wide.shape[-1] % run_words
    if pad:
        wide = torch.nn.functional.pad(wide, (0, pad))
    runs = wide.unflatten(-1, (-1, run_words))
    mask = (1 << bits) - 1
    codes = torch.empty(*runs.shape[:-1], run_codes, dtype=torch.uint8, device=words.device)
    for i in range(run_codes):
        word, shift = divmod(i * bits, word_bits)
        value = runs[..., word] >> shift
        if shift + bits > word_bits:
            value = value | (runs[..., word + 1] << (word_bits - shift))
        codes[..., i] = (value & mask).to(torch.uint8)
    return codes.flatten(-2)[..., :count].contiguous()


def pack_planes3(codes: Tensor) -> Tensor:
    """3-bit codes `[..., K]` -> uint8 `[..., ceil(K/4) + ceil(K/8)]`: low 2 bits, then the top bit."""
    return torch.cat([pack_low(codes & 3, 2), pack_low(codes >> 2, 1)], dim=-1)


def unpack_planes3(packed: Tensor, count: int) -> Tensor:
    """Inverse of `pack_planes3`."""
    low_words = packed_length(count, 2)
    low = unpack_low(packed[..., :low_words], 2, count)
    high = unpack_low(packed[..., low_words:], 1, count)
    return low | (high << 2)


def pack_canonical(codes: Tensor, bits: int) -> Tensor:
    """quantkit's in-memory layout for affine codes (see `quantkit.encoding`)."""
    return pack_planes3(codes) if bits == 3 else pack_low(codes, bits)


def unpack_canonical(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_canonical`."""
    return unpack_planes3(packed, count) if bits == 3 else unpack_low(packed, bits, count)


def pack_nibbles_high_first(codes: Tensor) -> Tensor:
    """4-bit codes `[..., 2n]` -> uint8 `[..., n]`, the first of each pair in the high nibble."""
    pairs = codes.unflatten(-1, (-1, 2))
    return ((pairs[..., 0] << 4) | pairs[..., 1]).to(torch.uint8).contiguous()


def unpack_nibbles_high_first(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles_high_first`."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten(-2)
