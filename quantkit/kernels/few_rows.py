"""y = W @ x for one to sixteen rows of x (decoding), from four- and three-bit weights, past shared memory (Triton).

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
would be idle otherwise, and a warp now reads few rows of W in long runs instead of 16 in short ones. For more rows of x
than a product has columns, a second product takes the same operand of W. (It is written as if decoded once more: ptxas
merges the two, as a test of the compiled code sees.)

    one step of the program, K advances by KS blocks, KS warps side by side:
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

from quantkit.kernels.codebook_lookup import fill_table
from quantkit.kernels.few_rows_asm import SUMS_BUFFER
from quantkit.kernels.few_rows_loads import AFFINE3, CODEBOOK, inputs, numbers, words
from quantkit.kernels.few_rows_products import products
from quantkit.kernels.few_rows_sums import slot, store_sums


@triton.jit
def _codes(w, j: tl.constexpr, KIND: tl.constexpr, U: tl.constexpr):
    """The words of the j-th 32 codes of a unit: four; three bits: two of low bits and one of top bits."""
    if KIND == AFFINE3:
        return (w[2 * j], w[2 * j + 1], w[U // 16 + j])
    else:
        return w


@triton.jit
def _step(
    row,
    scales,
    zeros,
    k,
    K,
    more,
    slice,
    t,
    row_bytes,
    high_offset,
    groups,
    KIND: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
    GROUP: tl.constexpr,
    NC: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """Of a thread's slice, which begins at `k + slice`, and the rows g // S + i * 8 / S, i < 2 R: units, scales and
    zero points; anything where `more` is 0."""
    ws = ()
    ss = ()
    zs = ()
    first = k + slice
    at = first + t * U
    if not EVEN_K:
        first = tl.where(first < K, first, 0)
        at = tl.where(at < K, at, 0)
    for i in tl.static_range(2 * R):
        far = tl.full((), (8 // S) * i, tl.int64)
        here = row + far * row_bytes
        if KIND == AFFINE3:
            ws = ws + (
                words(here + at // 4, more, U // 16, ASM)
                + words(here + high_offset + at // 8, more, U // 32, ASM),
            )
        else:
            ws = ws + (words(here + at // 2, more, 4, ASM),)
        group = first * 0 if GROUP == 0 else first // GROUP + (2 * t) % NC
        ss = ss + (numbers(scales + (far * groups + group), more, NC > 1, ASM),)
        if KIND != CODEBOOK:
            zs = zs + (numbers(zeros + (far * groups + group), more, NC > 1, ASM),)
    return ws, ss, zs


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
    U: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
    THREADS: tl.constexpr,
    B: tl.constexpr,
):
    """Grid: (tiles,). Fewer programs share them. A tile is 16 / S * R rows of W. M * S * NC is at most 8 B, NC at most
    4; S is a power of two; U divides K; GROUP is 0 (one group per row), a multiple of 4 U or its half or quarter.
    Addresses of x and of rows are multiples of 16, of rows of scales of NC of them. EVEN_K: KS * 4 U * S divides
    K."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    NC: tl.constexpr = 4 * U // GROUP if GROUP > 0 and GROUP < 4 * U else 1
    WARP: tl.constexpr = 4 * U * S
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
    # Column g: row g // (S * NC) of x (beyond M the last once more), its slice g // NC % S, there the part g % NC. The
    # second product's columns: the rows of x after those.
    unit = ks * WARP + g // NC % S * (4 * U) + t * U
    x_rows = ()
    for b in tl.static_range(B):
        m = tl.minimum(g // (S * NC) + 8 // (S * NC) * b, M - 1)
        x_rows = x_rows + (x_ptr.to(tl.int64) + m.to(tl.int64) * x_stride * 2 + unit * 2,)
    mine = ((t // (4 // NC)) == g % NC).to(tl.int32) + whole
    if ASM and KS > 1:
        COUNT: tl.constexpr = 4 * R if S * NC == 1 else 2 * R
        buffer: tl.constexpr = SUMS_BUFFER[slot(KS, COUNT)]
        tl.inline_asm_elementwise(buffer, "=r,r", [whole], tl.int32, is_pure=False, pack=1)
    zero = tl.zeros((KS, 8, 4), tl.float32)

    # One loop over the steps of all the program's tiles: the next tile's codes are asked for before this one ends.
    tile = tl.program_id(0)
    first = tile.to(tl.int64) * (2 * ROWS * R)
    count = tl.cdiv(tiles - tile, tl.num_programs(0)) * tl.cdiv(K, STEP)
    k = 0
    half = 0
    ws, ss, zs = _step(
        row + first * row_bytes, scales + first * groups, zeros + first * groups, k, K, whole + 1, slice, t, row_bytes,
        high_offset, groups, KIND, S, R, U, GROUP, NC, EVEN_K, ASM,
    )  # fmt: skip
    if KIND == CODEBOOK:  # while the first codes are on their way
        fill_table(lut_ptr, THREADS, DTYPE, ASM)
    accs = ()
    for _ in tl.static_range(4 * R * B):
        accs = accs + (zero,)
    for _ in tl.range(0, count, num_stages=1):
        last = k + STEP >= K
        next_k = tl.where(last, 0, k + STEP)
        next_tile = tl.where(last, tile + tl.num_programs(0), tile)
        more = (next_tile < tiles).to(tl.int32) + whole
        first = next_tile.to(tl.int64) * (2 * ROWS * R)
        next_ws, next_ss, next_zs = _step(
            row + first * row_bytes, scales + first * groups, zeros + first * groups, next_k, K, more, slice, t,
            row_bytes, high_offset, groups, KIND, S, R, U, GROUP, NC, EVEN_K, ASM,
        )  # fmt: skip
        wanted = mine if EVEN_K else tl.where(k + unit < K, mine, 0)
        sums = ()
        parts = ()
        for _ in tl.static_range(B):
            sums = sums + ((zero, zero, zero, zero),)
        for _ in tl.static_range(R * B):
            parts = parts + ((zero, zero, zero, zero),)
        for j in tl.static_range(U // 32):
            xs = ()
            for b in tl.static_range(B):
                xs = xs + (inputs(x_rows[b] + 2 * (k + 32 * j), wanted, EVEN_K and NC == 1, ASM),)
            new_parts = ()
            for r in tl.static_range(R):
                new_sums = ()
                for b in tl.static_range(B):
                    c, of_x = products(
                        _codes(ws[2 * r], j, KIND, U), _codes(ws[2 * r + 1], j, KIND, U), xs[b], lut_ptr,
                        parts[B * r + b], sums[b], KIND != CODEBOOK and r == 0, KS, KIND, DTYPE, ASM,
                    )  # fmt: skip
                    new_parts = new_parts + (c,)
                    new_sums = new_sums + (of_x,)
                sums = new_sums
            parts = new_parts
        new_accs = ()
        for b in tl.static_range(B):
            for r in tl.static_range(R):
                for i in tl.static_range(4):
                    part = parts[B * r + b][i]
                    if KIND != CODEBOOK:
                        part -= sums[b][i % 2]
                        part -= zs[2 * r + i // 2][i % 2] * sums[b][2 + i % 2]
                    new_accs = new_accs + (accs[4 * (R * b + r) + i] + part * ss[2 * r + i // 2][i % 2],)
        accs = new_accs
        if last:
            for b in tl.static_range(B):
                mine_of = ()
                for i in tl.static_range(4 * R):
                    mine_of = mine_of + (accs[4 * R * b + i],)
                store_sums(
                    mine_of, tile, 8 // (S * NC) * b, half, out_ptr, bias_ptr, M, N, KS, S, R, NC, HAS_BIAS, ASM
                )  # fmt: skip
                half = 1 - half
            zeroed = ()
            for _ in tl.static_range(4 * R * B):
                zeroed = zeroed + (zero,)
            accs = zeroed
        k = next_k
        tile = next_tile
        ws = next_ws
        ss = next_ss
        zs = next_zs
