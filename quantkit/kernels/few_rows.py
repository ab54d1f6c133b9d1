"""y = W @ x for one to eight rows of x (decoding), from four- and three-bit weights, past shared memory (Triton).

The compiler's own matrix products want operands in their layouts, which costs a trip through shared memory and a
barrier for every step of K; at few rows, waiting for those and not the memory set the pace (ADR 0028, 0039). Here
nothing changes hands until the end. A warp multiplies 16 rows by 8 columns with `mma.m16n8k16`, whose operands
are made where the loads leave them: a product may take its K in any order, as long as W and x take the same.

    thread (g, t) of a warp, g < 8, t < 4, in a block of S slices of 4 U inputs (U = 32; three bits: or 64):
        W      slice g % S of the rows g // S and g // S + 8 / S, in it the *unit* of U neighbouring codes t:
               one 16-byte load each (three bits: two loads)
        x      column g: the inputs of unit t in the column's slice
        mma    U / 4 times; each takes 4 codes of both rows and the 4 inputs that belong to them
        part   both rows, columns 2t and 2t + 1, float32

A column is a row of x in one slice, or, where groups are shorter than a slice, in one of the slice's groups, zeros
elsewhere: NC = 4 U / GROUP columns a slice, so that each part has one scale; S * NC columns a row of x. A product of
a row's slice with a column of another slice means nothing and is dropped at the end: for one row of x, the columns
would be idle otherwise, and a warp now reads few rows of W in long runs instead of 16 in short ones.

    one step of the program, K advances by KS * H blocks, KS warps side by side:
        next  = codes, scales and zero points of the next step, asked for before this one's are used
        acc  += part * scale                                                             codebook
        acc  += (part - sum of offset * x - zero * sum of x) * scale, over the column    affine

The sums are another mma, with offsets and ones for W. At the end acc is summed over KS and the slices, always in the
same order.

Values, two codes to a register:
    CODEBOOK  table of byte pairs in shared memory (`codebook_lookup`)
    affine    q or-ed into the mantissa of a power of two, the offset (`few_rows_asm`)

Loads are inline PTX (a `tl.load` would get a layout of its own, and its result be sent through shared memory). That
lane 4 g + t holds element (g, t) is Triton's default for a tensor `[KS, 8, 4]`; a test reads it in the compiled code.
Without PTX the mma is written out: for tests, not speed.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.codebook_lookup import eight_values, fill_table
from quantkit.kernels.few_rows_asm import (
    ADD_ACROSS,
    CODES_BUFFER,
    COMMIT,
    COPY,
    EXCHANGE,
    EXCHANGE_CON,
    FOUR_ASM,
    LOAD_8_PAIR,
    LOAD_16_PAIR,
    LOAD_F32_PAIR,
    LOAD_X_IF,
    OWN,
    STORE_IF,
    SUMS_BUFFER,
    TABLE_ASM,
    THREE_ASM,
    THREE_CON,
    WAIT,
    WORD_CON,
    slot,
)
from quantkit.kernels.gemv import AFFINE3, AFFINE4, CODEBOOK, number, two_inputs, words


@triton.jit
def _inputs(p, wanted, ALL: tl.constexpr, ASM: tl.constexpr):
    """16 words of inputs at the byte addresses `p`; zeros where `wanted` is 0, unless ALL are wanted."""
    out = ()
    four: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
    for i in tl.static_range(4):
        at = p + 16 * i
        if ALL:
            out = out + words(at, 4, True, ASM)
        elif not ASM:
            pointers = at.to(tl.pointer_type(tl.int32), bitcast=True)
            for j in tl.static_range(4):
                out = out + (tl.load(pointers + j, mask=wanted != 0, other=0),)
        else:
            out = out + tl.inline_asm_elementwise(
                LOAD_X_IF, "=r,=r,=r,=r,l,r", [at, wanted], four, is_pure=True, pack=1
            )
    return out


@triton.jit
def _numbers(p, PAIR: tl.constexpr, ASM: tl.constexpr):
    """The scales or zero points of both columns of a thread as float32: two neighbours at `p`, or one for both."""
    kind: tl.constexpr = p.dtype.element_ty
    if not PAIR:
        a = number(p, ASM)
        return (a, a)
    elif not ASM:
        return (tl.load(p).to(tl.float32), tl.load(p + 1).to(tl.float32))
    elif kind == tl.float32:
        floats: tl.constexpr = (tl.float32, tl.float32)
        return tl.inline_asm_elementwise(
            LOAD_F32_PAIR, "=r,=r,l", [p.to(tl.int64)], floats, is_pure=True, pack=1
        )
    else:
        shorts: tl.constexpr = (tl.int16, tl.int16)
        if kind == tl.uint8:
            a, b = tl.inline_asm_elementwise(
                LOAD_8_PAIR, "=h,=h,l", [p.to(tl.int64)], shorts, is_pure=True, pack=1
            )
            return (a.to(tl.float32), b.to(tl.float32))
        else:
            a, b = tl.inline_asm_elementwise(
                LOAD_16_PAIR, "=h,=h,l", [p.to(tl.int64)], shorts, is_pure=True, pack=1
            )
            return (a.to(kind, bitcast=True).to(tl.float32), b.to(kind, bitcast=True).to(tl.float32))


@triton.jit
def _values(w, j: tl.constexpr, lut_ptr, KIND: tl.constexpr):
    """Float32 values (affine: codes) of the j-th 8 codes of the unit `w`, in the inputs' order (portable)."""
    out = ()
    if KIND == CODEBOOK:
        out = eight_values(w[j], lut_ptr, False)
    elif KIND == AFFINE4:
        for i in tl.static_range(8):
            out = out + (((w[j] >> (4 * i)) & 15).to(tl.float32),)
    else:
        for i in tl.static_range(8):
            q = (w[j // 2] >> (2 * (8 * (j % 2) + i))) & 3
            out = out + ((q | (((w[2] >> (8 * j + i)) & 1) << 2)).to(tl.float32),)
    return out


@triton.jit
def _by_columns(a, x, KS: tl.constexpr):
    """sum over t of a[ks, g, t] * x[ks, column, t], as the parts of columns 2t and 2t + 1 `[KS, 8, 4]`."""
    both = tl.sum(a[:, :, None, :] * x[:, None, :, :], 3)
    return tl.split(both.reshape(KS, 8, 4, 2))


@triton.jit
def _products(
    upper,
    lower,
    x,
    lut_ptr,
    c,
    sums,
    SUMS: tl.constexpr,
    KS: tl.constexpr,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """`c`, parts of the upper row (two columns) and of the lower (two), plus the products of 32 codes of both with 16
    words of inputs; `sums` (offset * x in two columns, x in two) likewise, as they came where SUMS is off: another
    tile of rows has added them up. (Portable values have no offset.)
    """
    if ASM:
        which: tl.constexpr = (0 if tl.bfloat16 == DTYPE else 2) + (0 if SUMS else 1)
        con: tl.constexpr = THREE_CON[0 if SUMS else 1] if KIND == AFFINE3 else WORD_CON[0 if SUMS else 1]
        types: tl.constexpr = (tl.float32,) * (8 if SUMS else 4)
        if KIND == AFFINE3:
            asm: tl.constexpr = THREE_ASM[which]
        else:
            asm: tl.constexpr = TABLE_ASM[which] if KIND == CODEBOOK else FOUR_ASM[which]
        for j in tl.static_range(1 if KIND == AFFINE3 else 4):
            if KIND == AFFINE3:
                ins = upper + lower + x + c
            else:
                ins = (upper[j], lower[j], x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]) + c
            if SUMS:
                ins = ins + sums
            d = tl.inline_asm_elementwise(asm, con, ins, types, is_pure=True, pack=1)
            c = (d[0], d[1], d[2], d[3])
            if SUMS:
                sums = (d[4], d[5], d[6], d[7])
    else:
        one = tl.full((KS, 8, 4), 1.0, tl.float32)
        for j in tl.static_range(4):
            up = _values(upper, j, lut_ptr, KIND)
            down = _values(lower, j, lut_ptr, KIND)
            for i in tl.static_range(4):
                x0, x1 = two_inputs(x[4 * j + i], DTYPE)
                for e in tl.static_range(2):
                    xe = x1 if e == 1 else x0
                    a0, a1 = _by_columns(up[2 * i + e], xe, KS)
                    b0, b1 = _by_columns(down[2 * i + e], xe, KS)
                    c = (c[0] + a0, c[1] + a1, c[2] + b0, c[3] + b1)
                    if SUMS:
                        s0, s1 = _by_columns(one, xe, KS)
                        sums = (sums[0], sums[1], sums[2] + s0, sums[3] + s1)
    return c, sums


@triton.jit
def _codes(w, j: tl.constexpr, KIND: tl.constexpr, U: tl.constexpr):
    """The words of the j-th 32 codes of a unit: four; three bits: two of low bits and one of top bits."""
    if KIND == AFFINE3:
        return (w[2 * j], w[2 * j + 1], w[U // 16 + j])
    else:
        return w


@triton.jit
def _places(k, K, slice, t, S: tl.constexpr, H: tl.constexpr, U: tl.constexpr, EVEN_K: tl.constexpr):
    """First inputs of a thread's slices in H blocks, which begin at `k + slice`; 0 beyond K."""
    out = ()
    for h in tl.static_range(H):
        first = k + slice + 4 * U * S * h
        out = out + (first if EVEN_K else tl.where(first < K, first, 0),)
    return out


@triton.jit
def _beyond(first, K, t, U: tl.constexpr, EVEN_K: tl.constexpr):
    at = first + t * U
    return at if EVEN_K else tl.where(at < K, at, 0)


@triton.jit
def _units(
    row, firsts, K, t, row_bytes, high_offset, KIND: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
    U: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Of each block and the rows g // S + i * 8 / S, i < 2 R: the thread's unit."""
    ws = ()
    for h in tl.static_range(len(firsts)):
        at = _beyond(firsts[h], K, t, U, EVEN_K)
        for i in tl.static_range(2 * R):
            here = row + tl.full((), (8 // S) * i, tl.int64) * row_bytes
            if KIND == AFFINE3:
                low = words(here + at // 4, U // 16, False, ASM)
                ws = ws + (low + words(here + high_offset + at // 8, U // 32, False, ASM),)
            else:
                ws = ws + (words(here + at // 2, 4, False, ASM),)
    return ws


@triton.jit
def _ask(
    own, own_top, row, firsts, K, t, row_bytes, high_offset, KS: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
    U: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """The same units of three bits, to where `_taken` finds them: a thread reads what it has asked for itself."""
    LOW: tl.constexpr = COPY[U // 32]
    TOP: tl.constexpr = COPY[U // 32 - 1]
    for h in tl.static_range(len(firsts)):
        at = _beyond(firsts[h], K, t, U, EVEN_K)
        for i in tl.static_range(2 * R):
            here = row + tl.full((), (8 // S) * i, tl.int64) * row_bytes
            to = own + (h * 2 * R + i) * (KS * 768)
            tl.inline_asm_elementwise(LOW, "=r,r,l", [to, here + at // 4], tl.int32, is_pure=False, pack=1)
            to = own_top + (h * 2 * R + i) * (KS * 768)
            top = here + high_offset + at // 8
            tl.inline_asm_elementwise(TOP, "=r,r,l", [to, top], tl.int32, is_pure=False, pack=1)
    tl.inline_asm_elementwise(COMMIT, "=r,r", [own], tl.int32, is_pure=False, pack=1)


@triton.jit
def _taken(own, own_top, COUNT: tl.constexpr, KS: tl.constexpr, U: tl.constexpr, AHEAD: tl.constexpr):
    """Waits for the oldest step that was asked for, of AHEAD: its units."""
    wait: tl.constexpr = WAIT[AHEAD - 1]
    own = tl.inline_asm_elementwise(wait, "=r,r", [own], tl.int32, is_pure=False, pack=1)
    LOW: tl.constexpr = OWN[U // 32]
    TOP: tl.constexpr = OWN[U // 32 - 1]
    two: tl.constexpr = (tl.int32,) * 2
    four: tl.constexpr = (tl.int32,) * 4
    ws = ()
    for i in tl.static_range(COUNT):
        low_at = own + i * (KS * 768)
        top_at = own_top + i * (KS * 768)
        if U == 64:
            low = tl.inline_asm_elementwise(LOW, "=r,=r,=r,=r,r", [low_at], four, is_pure=False, pack=1)
            top = tl.inline_asm_elementwise(TOP, "=r,=r,r", [top_at], two, is_pure=False, pack=1)
            ws = ws + (low + top,)
        else:
            low = tl.inline_asm_elementwise(LOW, "=r,=r,r", [low_at], two, is_pure=False, pack=1)
            top = tl.inline_asm_elementwise(TOP, "=r,r", [top_at], tl.int32, is_pure=False, pack=1)
            ws = ws + (low + (top,),)
    return ws


@triton.jit
def _scales(
    scales, zeros, firsts, t, groups, KIND: tl.constexpr, S: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
    GROUP: tl.constexpr, NC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Scales and zero points (not for a codebook) that belong to `_units`, of both columns."""
    H: tl.constexpr = len(firsts)
    ss = ()
    zs = ()
    for h in tl.static_range(H):
        for i in tl.static_range(2 * R):
            if h == 0 or (GROUP > 0 and GROUP % (4 * U * S * H) != 0):
                far = tl.full((), (8 // S) * i, tl.int64) * groups
                group = firsts[h] * 0 if GROUP == 0 else firsts[h] // GROUP + (2 * t) % NC
                ss = ss + (_numbers(scales + (far + group), NC > 1, ASM),)
                if KIND != CODEBOOK:
                    zs = zs + (_numbers(zeros + (far + group), NC > 1, ASM),)
            else:
                ss = ss + (ss[i],)
                if KIND != CODEBOOK:
                    zs = zs + (zs[i],)
    return ss, zs


@triton.jit
def _advance(k, tile, K, tiles, STEP: tl.constexpr):
    """The step after `k` of `tile`: its next inputs or another tile's first; at the end that tile once more."""
    last = k + STEP >= K
    tile = tl.minimum(tl.where(last, tile + tl.num_programs(0), tile), tiles - 1)
    return tl.where(last, 0, k + STEP), tile


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
def _store(
    accs,
    tile,
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
    """The tile's sums over slices and warps, plus bias, into out `[M, N]`."""
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
            m = 2 * t + i % 2 + 0 * g
            n = 8 * (i // 2) + g
        else:
            m = 2 * t // SN + 0 * g
            n = ROWS * i + g // S
        keep = (m < M) & (ks == i % KS) & (g % S == 0) & (2 * t % SN < 2)
        n = tile * (2 * ROWS * R) + n
        y = ys[i]
        if HAS_BIAS:
            y += number(bias_ptr + (n + 0 * t + 0 * ks), ASM)
        at = out_ptr + (m.to(tl.int64) * N + n + 0 * ks)
        if ASM:
            tl.inline_asm_elementwise(
                STORE_IF, "=r,h,l,r", [y.to(out_ptr.dtype.element_ty), at.to(tl.int64), keep.to(tl.int32)], tl.int32,
                is_pure=False, pack=1,
            )  # fmt: skip
        else:
            tl.store(at, y.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["M", "tiles"])
def few_rows_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    lut_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    row_bytes,
    high_offset,
    groups,
    x_stride,
    tiles,
    KIND: tl.constexpr,
    KS: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    H: tl.constexpr,
    U: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
    THREADS: tl.constexpr,
    AHEAD: tl.constexpr = 1,
):
    """Grid: any number of programs up to `tiles` = N / (16 / S * R), which share them. M * S * NC is at most 8, NC at most 4; S is a power of two; U divides K; GROUP is 0
    (one group per row), a multiple of 4 U or its half or quarter. Addresses of x and of rows are multiples of 16, of
    rows of scales of NC of them. EVEN_K: KS * 4 U * S * H divides K."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    NC: tl.constexpr = 4 * U // GROUP if GROUP > 0 and GROUP < 4 * U else 1
    WARP: tl.constexpr = 4 * U * S * H
    STEP: tl.constexpr = KS * WARP
    ROWS: tl.constexpr = 8 // S
    ks = tl.arange(0, KS)[:, None, None]
    g = tl.arange(0, 8)[None, :, None]
    t = tl.arange(0, 4)[None, None, :]
    whole = tl.zeros((KS, 8, 4), tl.int32)
    slice = ks * WARP + g % S * (4 * U) + whole
    rows = g // S + whole
    row = codes_ptr.to(tl.int64) + rows.to(tl.int64) * row_bytes
    scales = scale_ptr + rows.to(tl.int64) * groups
    zeros = zero_ptr + rows.to(tl.int64) * groups
    # Column g: row g // (S * NC) of x (beyond M the last one once more), its slice g // NC % S, there the part g % NC.
    m = tl.minimum(g // (S * NC), M - 1)
    unit = ks * WARP + g // NC % S * (4 * U) + t * U
    x_row = x_ptr.to(tl.int64) + m.to(tl.int64) * x_stride * 2 + unit * 2
    mine = ((t // (4 // NC)) == g % NC).to(tl.int32) + whole
    if KIND == CODEBOOK:
        fill_table(lut_ptr, THREADS, DTYPE, ASM)
    if ASM and KS > 1:
        COUNT: tl.constexpr = 4 * R if S * NC == 1 else 2 * R
        buffer: tl.constexpr = SUMS_BUFFER[slot(KS, COUNT)]
        tl.inline_asm_elementwise(buffer, "=r,r", [whole], tl.int32, is_pure=False, pack=1)
    zero = tl.zeros((KS, 8, 4), tl.float32)

    # One loop over the steps of all the program's tiles: the next tile's codes are asked for before this one ends.
    STAGED: tl.constexpr = ASM and KIND == AFFINE3
    TILE: tl.constexpr = 2 * ROWS * R
    SLOT: tl.constexpr = 2 * R * H * KS * 768
    tile = tl.program_id(0)
    count = tl.cdiv(tiles - tile, tl.num_programs(0)) * tl.cdiv(K, STEP)
    k = 0
    half = 0
    next_k = 0
    next_tile = tile
    ws = ()
    own = whole
    own_top = whole
    slot = 0
    if STAGED:
        codes_buffer: tl.constexpr = CODES_BUFFER[((AHEAD + 1) * SLOT + 1023) // 1024]
        two: tl.constexpr = (tl.int32, tl.int32)
        own, own_top = tl.inline_asm_elementwise(codes_buffer, "=r,=r,r", [whole], two, is_pure=False, pack=1)
        own_top += KS * 512
        for a in tl.static_range(AHEAD):
            firsts = _places(next_k, K, slice, t, S, H, U, EVEN_K)
            far = next_tile.to(tl.int64) * TILE
            _ask(own + a * SLOT, own_top + a * SLOT, row + far * row_bytes, firsts, K, t, row_bytes, high_offset, KS, S, R, U, EVEN_K)
            next_k, next_tile = _advance(next_k, next_tile, K, tiles, STEP)
    far = tile.to(tl.int64) * TILE
    firsts = _places(k, K, slice, t, S, H, U, EVEN_K)
    if not STAGED:
        ws = _units(row + far * row_bytes, firsts, K, t, row_bytes, high_offset, KIND, S, R, U, EVEN_K, ASM)
    ss, zs = _scales(scales + far * groups, zeros + far * groups, firsts, t, groups, KIND, S, R, U, GROUP, NC, ASM)
    accs = ()
    for _ in tl.static_range(4 * R):
        accs = accs + (zero,)
    for _ in tl.range(0, count, num_stages=1):
        # In the last steps its own codes once more, which are not used.
        last = k + STEP >= K
        after_k, after_tile = _advance(k, tile, K, tiles, STEP)
        far = after_tile.to(tl.int64) * TILE
        firsts = _places(after_k, K, slice, t, S, H, U, EVEN_K)
        if STAGED:
            units = _taken(own + slot * SLOT, own_top + slot * SLOT, 2 * R * H, KS, U, AHEAD)
            slot = tl.where(slot == 0, AHEAD, slot - 1)  # read a step ago
            later = _places(next_k, K, slice, t, S, H, U, EVEN_K)
            there = row + next_tile.to(tl.int64) * TILE * row_bytes
            _ask(own + slot * SLOT, own_top + slot * SLOT, there, later, K, t, row_bytes, high_offset, KS, S, R, U, EVEN_K)
            slot = tl.where(slot >= AHEAD - 1, slot - AHEAD + 1, slot + 2)
            next_k, next_tile = _advance(next_k, next_tile, K, tiles, STEP)
        else:
            units = ws
            next_ws = _units(
                row + far * row_bytes, firsts, K, t, row_bytes, high_offset, KIND, S, R, U, EVEN_K, ASM
            )
        next_ss, next_zs = _scales(
            scales + far * groups, zeros + far * groups, firsts, t, groups, KIND, S, R, U, GROUP, NC, ASM
        )
        for h in tl.static_range(H):
            wanted = mine if EVEN_K else tl.where(k + unit + 4 * U * S * h < K, mine, 0)
            sums = (zero, zero, zero, zero)
            parts = ()
            for _ in tl.static_range(R):
                parts = parts + ((zero, zero, zero, zero),)
            for j in tl.static_range(U // 32):
                x = _inputs(x_row + 2 * (k + 4 * U * S * h + 32 * j), wanted, EVEN_K and NC == 1, ASM)
                new_parts = ()
                for r in tl.static_range(R):
                    c, sums = _products(
                        _codes(units[2 * (h * R + r)], j, KIND, U), _codes(units[2 * (h * R + r) + 1], j, KIND, U), x,
                        lut_ptr, parts[r], sums, KIND != CODEBOOK and r == 0, KS, KIND, DTYPE, ASM,
                    )  # fmt: skip
                    new_parts = new_parts + (c,)
                parts = new_parts
            new_accs = ()
            for r in tl.static_range(R):
                for i in tl.static_range(4):
                    part = parts[r][i]
                    if KIND != CODEBOOK:
                        part -= sums[i % 2]
                        part -= zs[2 * (h * R + r) + i // 2][i % 2] * sums[2 + i % 2]
                    new_accs = new_accs + (accs[4 * r + i] + part * ss[2 * (h * R + r) + i // 2][i % 2],)
            accs = new_accs
        if last:
            _store(accs, tile, half, out_ptr, bias_ptr, M, N, KS, S, R, NC, HAS_BIAS, ASM)
            zeroed = ()
            for _ in tl.static_range(4 * R):
                zeroed = zeroed + (zero,)
            accs = zeroed
            half = 1 - half
        k = after_k
        tile = after_tile
        if not STAGED:
            ws = next_ws
        ss = next_ss
        zs = next_zs
