"""The end of `few_rows_kernel`'s tiles: sums over lanes by shuffles, over warps by one exchange, and out (Triton)."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.few_rows_asm import ADD_ACROSS, EXCHANGE, EXCHANGE_CON, STORE_IF
from quantkit.kernels.few_rows_loads import number


@triton.constexpr_function
def slot(warps: int, count: int) -> int:
    """Where the texts of `few_rows_asm` have what is for so many warps and numbers."""
    return 4 * (warps.bit_length() - 1) + count.bit_length() - 2  # the logarithms


@triton.jit
def _across(y, BIT: tl.constexpr):
    """`y [KS, 8, 4]` plus what the lane has whose number differs in this bit: summed over both."""
    which: tl.constexpr = ADD_ACROSS[BIT]
    return tl.inline_asm_elementwise(which, "=f,f", [y], tl.float32, is_pure=True, pack=1)


@triton.jit
def _over_slices(a, b, KS: tl.constexpr, S: tl.constexpr, NC: tl.constexpr, ASM: tl.constexpr):
    """Columns 2t and 2t + 1 of a row's slice `[KS, 8, 4]`, summed over what belongs to the same row of x and of W, at
    g of whole S and t of whole S * NC / 2. S * NC is at least 2."""
    g = tl.arange(0, 8)[None, :, None]
    column = 2 * tl.arange(0, 4)[None, None, :]
    PAIRS: tl.constexpr = S * NC // 2
    y = tl.where(column // NC % S == g % S, a, 0.0) + tl.where((column + 1) // NC % S == g % S, b, 0.0)
    if ASM:
        if PAIRS >= 2:
            y = _across(y, 0)
        if PAIRS >= 4:
            y = _across(y, 1)
        if S >= 2:
            y = _across(y, 2)
        if S >= 4:
            y = _across(y, 3)
        if S >= 8:
            y = _across(y, 4)
    else:
        both = tl.sum(tl.sum(y.reshape(KS, 8 // S, S, 4 // PAIRS, PAIRS), 4), 2)
        y = both[:, :, None, :, None] + tl.zeros((KS, 8 // S, S, 4 // PAIRS, PAIRS), tl.float32)
        y = y.reshape(KS, 8, 4)
    return y


@triton.jit
def _over_warps(ys, half, KS: tl.constexpr, ASM: tl.constexpr):
    """Each of `ys [KS, 8, 4]` summed over the warps, in all of them."""
    if KS == 1:
        return ys
    elif ASM:
        COUNT: tl.constexpr = len(ys)
        asm: tl.constexpr = EXCHANGE[slot(KS, COUNT)]
        con: tl.constexpr = EXCHANGE_CON[slot(1, COUNT)]
        ins = ys + (half + tl.zeros((KS, 8, 4), tl.int32),)
        return tl.inline_asm_elementwise(asm, con, ins, (tl.float32,) * COUNT, is_pure=False, pack=1)
    else:
        out = ()
        for i in tl.static_range(len(ys)):
            out = out + (tl.sum(ys[i], 0)[None, :, :] + tl.zeros((KS, 8, 4), tl.float32),)
        return out


@triton.jit
def store_sums(
    accs,
    tile,
    first,
    half,
    out_ptr,
    bias_ptr,
    M,
    N,
    KS: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    NC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
):
    """The tile's sums over slices and warps, plus bias, into out `[M, N]`, for the rows of x from `first` on."""
    ROWS: tl.constexpr = 8 // S
    SN: tl.constexpr = S * NC
    if SN == 1:
        ys = accs
    else:
        ys = ()
        for i in tl.static_range(2 * R):
            ys = ys + (_over_slices(accs[2 * i], accs[2 * i + 1], KS, S, NC, ASM),)
    ys = _over_warps(ys, half, KS, ASM)
    ks = tl.arange(0, KS)[:, None, None]
    g = tl.arange(0, 8)[None, :, None]
    t = tl.arange(0, 4)[None, None, :]
    for i in tl.static_range(len(ys)):
        if SN == 1:
            m = first + 2 * t + i % 2 + 0 * g
            n = 8 * (i // 2) + g
        else:
            m = first + 2 * t // SN + 0 * g
            n = ROWS * i + g // S
        keep = (m < M) & (ks == i % KS) & (g % S == 0) & (2 * t % SN < 2)
        n = tile * (2 * ROWS * R) + n
        y = ys[i]
        if HAS_BIAS:
            y += number(bias_ptr + (n + 0 * t + 0 * ks), keep.to(tl.int32), ASM)
        at = out_ptr + (m.to(tl.int64) * N + n + 0 * ks)
        if ASM:
            tl.inline_asm_elementwise(
                STORE_IF, "=r,h,l,r", [y.to(out_ptr.dtype.element_ty), at.to(tl.int64), keep.to(tl.int32)], tl.int32,
                is_pure=False, pack=1,
            )  # fmt: skip
        else:
            tl.store(at, y.to(out_ptr.dtype.element_ty), mask=keep)
