"""float8 (e4m3) on CPUs: slices of W are decoded into the cache by way of float16, and multiplied there.

    code  s eeee mmm            float16  s 0eeee mmm0000000 = value / 256

so decoding is a shift, an addition that carries the sign, torch's conversion, which runs at the speed of the
cache, and one multiplication by 256 times the scale (256 is exact). torch's own conversion of e4m3 takes one code
at a time, ten times as long. The weight in float32 is that of the reference, bit for bit, and nothing of it is kept.

The two codes of NaN would come out as 480, and scales beyond 2**119 as infinity: the reference has those.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from quantkit.kernels import cpu_sessions

#: Weights per slice: 4 MB decoded. (A quarter of it costs a quarter more in calls, four times of it the cache.)
SLICE = 1 << 20


def covers(codes: Tensor, scale: Tensor) -> bool:
    """Can this weight be decoded here? (Looked up once while neither changes.)"""
    return bool(cpu_sessions.prepared("float8", (codes, scale), partial(_finite, codes, scale)))


def linear(x: Tensor, codes: Tensor, scale: Tensor, block_n: int, block_k: int) -> Tensor:
    """`x [M, K]` times W `[N, K]` in float32: a new `[M, N]`."""
    n = codes.shape[0]
    x = x.float()
    out = torch.empty((x.shape[0], n), dtype=torch.float32)
    for start, weight in _slices(codes, scale, block_n, block_k):
        torch.mm(x, weight.t(), out=out[:, start : start + len(weight)])
    return out


def dense(codes: Tensor, scale: Tensor, block_n: int, block_k: int, dtype: torch.dtype) -> Tensor:
    """W `[N, K]` in `dtype`, equal to the reference bit for bit."""
    out = torch.empty(codes.shape, dtype=dtype)
    for start, weight in _slices(codes, scale, block_n, block_k):
        out[start : start + len(weight)] = weight
    return out


def _slices(codes: Tensor, scale: Tensor, block_n: int, block_k: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, the slice's weights, float32 `[rows, K]`, until the next slice) over all of W."""
    n, k = codes.shape
    rows = min(max(1, SLICE // k), n)
    values = torch.empty((rows, k), dtype=torch.float32)
    halves, signs = (torch.empty((rows, k), dtype=torch.int16) for _ in range(2))
    block_k = min(block_k, k)
    whole = k // block_k
    wide = scale.float() * 256
    for start in range(0, n, rows):
        end = min(start + rows, n)
        bits, sign, weight = halves[: end - start], signs[: end - start], values[: end - start]
        bits.copy_(codes[start:end])
        bits.bitwise_left_shift_(7)
        torch.bitwise_and(bits, 0x4000, out=sign)
        bits.add_(sign)  # from bit 14 to bit 15
        weight.copy_(bits.view(torch.float16))
        factors = wide[torch.arange(start, end) // block_n]
        weight[:, : whole * block_k].unflatten(1, (whole, block_k)).mul_(factors[:, :whole, None])
        if whole < factors.shape[1]:
            weight[:, whole * block_k :].mul_(factors[:, whole:])
        yield start, weight


def _finite(codes: Tensor, scale: Tensor) -> bool:
    # Both NaNs and nothing else have seven ones.
    nan = any(bool(((part & 0x7F) == 0x7F).any()) for part in codes.detach().split(1024))
    return not nan and bool((scale.detach().float().abs() < 2.0**119).all())
