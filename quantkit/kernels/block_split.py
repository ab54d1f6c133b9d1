"""Tiles that span several blocks (groups) of scales, taken apart in registers (Triton).

Bytes of one block are a contiguous stretch of a row: 32 bytes for 64 codes of four bits. Loading a row's
codes in pieces so short costs a memory pipeline more requests and bank conflicts than the codes are worth. A tile
of several blocks is loaded whole; in the layout of a dot's first operand its stretches lie in different
registers of the same threads, so that these splits move nothing.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_last(c, PARTS: tl.constexpr):
    """`c [..., J]` -> PARTS (1, 2 or 4) tensors `[..., J / PARTS]`: consecutive stretches of the last dimension."""
    if PARTS == 1:
        return (c,)
    else:
        halves = c.reshape(c.shape[:-1] + [2, c.shape[-1] // 2])
        if len(c.shape) == 3:
            a, b = tl.split(tl.permute(halves, (0, 1, 3, 2)))
        else:
            a, b = tl.split(tl.permute(halves, (0, 2, 1)))
        if PARTS == 2:
            return (a, b)
        else:
            a0, a1 = split_last(a, 2)
            b0, b1 = split_last(b, 2)
            return (a0, a1, b0, b1)


@triton.jit
def split_each(s, PARTS: tl.constexpr):
    """`s [..., PARTS]` -> PARTS (1, 2 or 4) tensors `[...]`."""
    if PARTS == 1:
        return (s.reshape(s.shape[:-1]),)
    elif PARTS == 2:
        return tl.split(s)
    else:
        even, odd = tl.split(s.reshape(s.shape[:-1] + [2, 2]))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return (a, b, c, d)
