"""Four-bit codebooks over blocks of the flattened weight: NF4 and FP4, and double quantization.

A block of `block_size` consecutive weights (row-major, across rows) shares one scale, its absmax:

    w.flat[i] ~ lut[q[i]] * absmax[i // block_size],        lut in [-1, 1]

NF4's table holds quantiles of a normal distribution (QLoRA, arXiv:2305.14314). FP4's is a 1-2-1
float (sign, exponent, mantissa). *Double quantization* stores the absmax values themselves in eight
bits: blocks of 256, minus their common mean, in a "dynamic" 8-bit float (arXiv:1511.04561).

The arithmetic below follows bitsandbytes on a CPU operation by operation (float32, one rounding per
step, the same tie rules), because the files are compared bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

#: Quantiles of N(0, 1) scaled to [-1, 1], with an exact zero: 8 steps below it, 7 above.
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

#: FP4 magnitudes in twelfths by the low three bits (not in value order); bit 3 is the sign.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

NESTED_BLOCK = 256
_CHUNK = 1 << 24  # weights handled at a time: bounds temporaries to a few hundred MB
_TINY = 1e-38


@cache
def _table(quant_type: str) -> Tensor:
    if quant_type == "nf4":
        return torch.tensor(NF4_TABLE)
    values = torch.tensor([*_FP4_TWELFTHS, *(-v for v in _FP4_TWELFTHS)])
    return values / values.abs().max() + 0.0  # + 0.0: the second zero is +0 too


def table(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """The 16 values (float32) that the codes of "nf4" or "fp4" stand for."""
    return _table(quant_type).to(device, copy=True)


@cache
def _dynamic_map() -> Tensor:
    values = [0.0, 1.0]
    for exponent in range(7):  # 2**exponent magnitudes in each decade 10**(exponent - 6) * [0.1, 1]
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        magnitudes = 10 ** (exponent - 6) * middles
        values += magnitudes.tolist() + (-magnitudes).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The 256 sorted values (float32) of the signed 8-bit dynamic type: -0.993 .. 1, denser near 0."""
    return _dynamic_map().to(device, copy=True)


@cache
def _dynamic_lookup() -> Tensor:
    """uint8 [65536]: code of the dynamic type nearest to each of 65536 points spread over [-1, 1].

    bitsandbytes' CPU kernel rounds a value to one of these points first, so must we.
    """
    codes = _dynamic_map()
    points = -1.0 + 2.0 * torch.arange(65536, dtype=torch.float32) / 65535
    return torch.searchsorted(0.5 * (codes[:-1] + codes[1:]), points).to(torch.uint8)


def _block_view(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(`[blocks, block_size]` whole blocks, `[rest]`), both views."""
    whole = flat.numel() // block_size * block_size
    return flat[:whole].view(-1, block_size), flat[whole:]


def block_absmax(flat: Tensor, block_size: int) -> Tensor:
    """float32 `[ceil(numel / block_size)]`: the largest magnitude of each block of a flat weight."""
    blocks, rest = _block_view(flat, block_size)
    result = blocks.abs().amax(dim=1) if len(blocks) else flat.new_empty(0)
    if rest.numel():
        # The owner keeps the last, short block's absmax above zero; whole blocks may hold 0.
        result = torch.cat([result, rest.abs().max().clamp(min=_TINY).view(1)])
    return result


def nearest(scaled: Tensor, lut: Tensor) -> Tensor:
    """uint8 codes of the table entries nearest to `scaled`; a tie goes to the smaller value."""
    order = torch.argsort(lut, stable=True)
    middles = (lut[order[:-1]] + lut[order[1:]]) / 2
    return order.to(torch.uint8)[torch.bucketize(scaled, middles, out_int32=True)]


def encode(flat: Tensor, absmax: Tensor, lut: Tensor, block_size: int) -> Tensor:
    """uint8 codes `[numel]` for a flat float32 weight, given its blocks' absmax.

    Whole blocks are multiplied by the reciprocal and the short one is divided, as the owner does.
    """
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    blocks, rest = _block_view(flat, block_size)
    step = max(1, _CHUNK // block_size)
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step]
        inverse = 1.0 / absmax[start : start + len(part)].clamp(min=_TINY).view(-1, 1)
        scaled = (part * inverse).clamp_(-1, 1).view(-1)
        codes[start * block_size : start * block_size + scaled.numel()] = nearest(scaled, lut)
    if rest.numel():
        codes[-rest.numel() :] = nearest((rest / absmax[-1]).clamp_(-1, 1), lut)
    return codes


def encode_for_scales(flat: Tensor, scale: Tensor, lut: Tensor, block_size: int) -> Tensor:
    """Codes nearest to the weight for any finite scales (a decoded scale may be 0 or negative)."""
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    step = max(1, _CHUNK // block_size) * block_size
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        per_block = scale[start // block_size : math.ceil((start + part.numel()) / block_size)]
        per_weight = per_block.repeat_interleave(block_size)[: part.numel()]
        scaled = torch.where(per_weight == 0, torch.zeros_like(part), part / per_weight)
        codes[start : start + step] = nearest(scaled.clamp_(-2, 2), lut)
    return codes


def search_absmax(flat: Tensor, absmax: Tensor, lut: Tensor, block_size: int) -> Tensor:
    """Per block, the scale with the smallest squared error found; never worse than `absmax`.

    Tries factors 0.70 .. 1.10 of the absmax, then twice the least-squares scale
    `sum(w * v) / sum(v * v)` for the codes' values `v` at hand (Lloyd's alternation).
    """
    best = absmax.clone()
    step = max(1, _CHUNK // 4 // block_size)
    for first in range(0, len(absmax), step):
        own = absmax[first : first + step]
        part = flat[first * block_size : (first + len(own)) * block_size]
        padded = torch.nn.functional.pad(part, (0, len(own) * block_size - part.numel())).view(-1, block_size)
        # Work relative to the absmax, so that 1e30 and 1e-30 neither overflow nor underflow.
        unit = padded * (1.0 / own.clamp(min=_TINY)).view(-1, 1)
        factor = torch.ones_like(own)

        def values(trial: Tensor, unit: Tensor = unit) -> Tensor:
            return lut[nearest((unit / trial.view(-1, 1)).view(-1), lut).int()].view_as(unit)

        def keep_better(trial: Tensor, error: Tensor, factor: Tensor, unit: Tensor = unit) -> Tensor:
            found = (values(trial) * trial.view(-1, 1) - unit).square().sum(1)
            better = found < error
            error.copy_(torch.where(better, found, error))
            return torch.where(better, trial, factor)

        error = (values(factor) - unit).square().sum(1)
        for percent in (*range(70, 100, 3), 102, 105, 110):
            factor = keep_better(torch.full_like(own, percent / 100), error, factor)
        for _ in range(2):
            value = values(factor)
            norm = value.square().sum(1)
            trial = torch.where(norm > 0, (value * unit).sum(1) / norm.clamp(min=_TINY), factor)
            factor = keep_better(torch.where(trial > 0.1, trial, factor), error, factor)
        chosen = own * factor
        best[first : first + step] = torch.where(torch.isfinite(chosen) & (own > _TINY), chosen, own)
    return best


@dataclass(frozen=True)
class NestedScale:
    """Scales stored in eight bits: `lut[codes] * absmax[i // block_size] + offset`.

    codes uint8 `[blocks]`, absmax float32 `[ceil(blocks / block_size)]`, lut float32 `[256]`.
    """

    codes: Tensor
    absmax: Tensor
    offset: float
    lut: Tensor
    block_size: int = NESTED_BLOCK

    def decode(self) -> Tensor:
        """float32 `[blocks]`, with the owner's two roundings (product, then sum)."""
        scale = self.absmax.repeat_interleave(self.block_size)[: self.codes.numel()]
        return self.lut[self.codes.int()] * scale + self.offset


def nest(absmax: Tensor) -> NestedScale:
    """Double quantization of the blocks' absmax (float32 `[blocks]`)."""
    mean = absmax.mean()
    if not bool(torch.isfinite(mean)):  # the float32 sum overflowed: magnitudes near 1e38
        mean = absmax.double().mean().float()
    offset = float(mean)
    centred = absmax - mean
    blocks = math.ceil(centred.numel() / NESTED_BLOCK)
    padded = torch.nn.functional.pad(centred, (0, blocks * NESTED_BLOCK - centred.numel())).view(blocks, -1)
    extreme = padded.abs().amax(dim=1)
    # A zero block gets code 0 (with absmax 0), not the code of 0.0: the owner's rule.
    usable = extreme > torch.finfo(torch.float32).tiny
    inverse = torch.where(usable, 1.0 / extreme.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    normed = (padded * inverse.view(-1, 1)).clamp(-1, 1)
    half = (normed + 1.0) * 0.5
    # Fused multiply-add in the owner's build: exact in float64, rounded to float32 once.
    index = (half.double() * 65535 + 0.5).float().long()
    codes = _dynamic_lookup().to(absmax.device)[index]
    codes = torch.where(usable.view(-1, 1), codes, torch.zeros_like(codes))
    kept = torch.where(usable, extreme, torch.zeros_like(extreme))
    codes = codes.view(-1)[: absmax.numel()].contiguous()
    return NestedScale(codes, kept, offset, dynamic_map(absmax.device))
