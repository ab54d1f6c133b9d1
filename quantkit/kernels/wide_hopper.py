"""y = x @ W.T for hundreds of rows of x on NVIDIA Hopper, codes to tensor cores in one launch (Gluon).

A tile is BN = 128 rows of W by BM = 256 rows of x. `wgmma` takes its first operand from registers, which is
where codes become numbers, and its second, x, from shared memory:

    one warp        copies x [BM, BK] and codes [BN, BK / 8 words] by TMA into STAGES buffers (2 and 3 bits: two steps'
                    codes at once, into half as many)
    2 x 4 warps     decode 64 rows of W each, multiply them by all of x's tile; neither waits for the other

Inside a warpgroup a product runs while the operand of the next step is decoded:

    issue product 0 | decode 1 | issue product 1 | wait for 0 | decode 2 | wait for 1 | ...

No product is in flight where the loop turns. `wgmma` reads its registers after the instruction was issued, and
ptxas (12.8) does not keep them from being written again when only a later turn of the loop waits: weights
were then wrong without a warning. `tests/kernels/test_wide_hopper.py` looks for that in the compiled code. For the same
reason the loop ends with a wait for a barrier that has already been passed: it ends the basic block, without
which ptxas moves the decoding behind the wait for the product.

Where tiles leave the last wave of multiprocessors half empty, programs share the steps of its tiles evenly, after
whole tiles (stream-K: Osama et al., arXiv:2301.03598). A part of a tile leaves its sums in float32; whoever comes last
adds them in the order of K (`wide_hopper_parts`), so every run gives the same bits.

A buffer of codes is given back to TMA without a fence between the proxies: every code was decoded, so read, before
the product that the release waits for. (The fence waits for loads of scales in flight as well: 2 to 5 %.)
"""

# mypy: ignore-errors
# Gluon's language is not Python's type system: jit functions are compiled, not called.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from quantkit.kernels.wide_hopper_affine import arithmetic, divisor
from quantkit.kernels.wide_hopper_decode import (
    decode,
    factors,
    lane_constants,
    load_both,
    load_factors,
    one_of,
    operand,
    pairs_layout,
    rows_layout,
    step_layout,
    words_layout,
)
from quantkit.kernels.wide_hopper_kinds import FLOAT8, bits_of, by_planes
from quantkit.kernels.wide_hopper_parts import store_sums
from quantkit.kernels.wide_hopper_planes import words_of_step


@gluon.jit
def tile(t, M, N, BN: gl.constexpr, BM: gl.constexpr, TOGETHER: gl.constexpr):
    """First row of W and of x of tile `t`: TOGETHER tiles of W by all of x, then the next."""
    across = gl.cdiv(M, BM)
    first = t // (TOGETHER * across) * TOGETHER
    size = gl.minimum(gl.cdiv(N, BN) - first, TOGETHER)
    inside = t % (TOGETHER * across)
    return (first + inside % size) * BN, inside // size * BM


@gluon.jit
def _shared_turns(plan, tiles, turns):
    """Of the turns of the shared tiles, one after another: this program's first, and the first behind its own."""
    whole, sharers = plan
    every = (tiles - whole) * turns
    program = gl.minimum(gl.program_id(0), sharers)
    return program * every // sharers, gl.minimum(program + 1, sharers) * every // sharers


@gluon.jit
def _own(plan):
    """How many whole tiles this program takes: its number is the first's, all programs' from one to the next."""
    return gl.cdiv(plan[0] - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def units_of_work(plan, M, N, K, BN: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr):
    """How many units of work this program has: whole tiles, and tiles of which it has some turns or all."""
    turns = gl.cdiv(K, 2 * BK)
    begin, end = _shared_turns(plan, gl.cdiv(N, BN) * gl.cdiv(M, BM), turns)
    return _own(plan) + gl.cdiv(end, turns) - begin // turns


@gluon.jit
def unit_of_work(
    u, plan, M, N, K, BN: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr, TOGETHER: gl.constexpr
):
    """Unit `u` of work: its tile; first row of W, of x, first step of K, the step behind the last."""
    turns = gl.cdiv(K, 2 * BK)
    begin, end = _shared_turns(plan, gl.cdiv(N, BN) * gl.cdiv(M, BM), turns)
    shared = u - _own(plan)
    t = gl.program_id(0) + u * gl.num_programs(0)
    first = 0
    behind = turns
    if shared >= 0:
        t = begin // turns + shared
        first = gl.maximum(begin - t * turns, 0)
        behind = gl.minimum(end - t * turns, turns)
        t += plan[0]
    n0, m0 = tile(t, M, N, BN, BM, TOGETHER)
    return t, n0, m0, 2 * first, 2 * behind


@gluon.jit
def parts_of(t, plan, begin, end, M, N, K, BN: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr):
    """Are the steps `begin` to `end` all of tile `t`? If not: where their sums go, the tile among those that are
    shared, how many parts it has, where the first one's sums are, and the second's (the others' behind it, two from
    one to the next)."""
    whole, sharers = plan
    turns = gl.cdiv(K, 2 * BK)
    alone = (begin == 0) & (end == 2 * turns)
    # A program has two places: for the end of a tile that another began, and for one that it leaves to another.
    mine = 2 * gl.program_id(0) + gl.where(begin == 0, 1, 0)
    # Program p begins at p * every // sharers.
    every = gl.maximum((gl.cdiv(N, BN) * gl.cdiv(M, BM) - whole) * turns, 1)
    low = (((t - whole) * turns + 1) * sharers - 1) // every
    high = (((t - whole) * turns + turns) * sharers - 1) // every
    return alone, (mine, t - whole, high - low + 1, 2 * low + 1, 2 * low + 2)


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next buffer, and the phase of its barrier."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _words(
    buffers,
    stage,
    STEP: gl.constexpr,
    PART: gl.constexpr,
    ROWS: gl.constexpr,
    BK: gl.constexpr,
    KIND: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """The words of step STEP of a turn, for `decode`; `stage`: of that step, in planes of the turn's first."""
    _, codes_s, _, _, _ = buffers
    if by_planes(KIND):
        low = codes_s[0].index(stage >> 1).slice(PART * ROWS, ROWS).load(words_layout(ROWS, BK // 8))
        high = low
        if bits_of(KIND) == 3:
            high = codes_s[1].index(stage >> 1).slice(PART * ROWS, ROWS).load(words_layout(ROWS, BK // 16))
        words = words_of_step(low, high, STEP, bits_of(KIND), LAYOUT)
    else:
        WORDS: gl.constexpr = step_layout(KIND, ROWS, BK)
        words = codes_s[0].index(stage).slice(PART * ROWS, ROWS).load(WORDS)
    return words


@gluon.jit
def _copy(
    x_desc,
    codes_desc,
    buffers,
    sizes,
    plan,
    BN: gl.constexpr,
    BM: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
    KIND: gl.constexpr,
):
    """The warp that copies. K is walked in pairs of steps; TMA fills with zeros what lies outside.

    Codes in planes come for a pair at once, with the first step's barrier: a step's are less than the 16 bytes that
    TMA takes. The first step's release gives their buffer back, for by then the second step's are read as well.
    """
    x_s, codes_s, _, full, empty = buffers
    M, N, K, _, _ = sizes
    TURN: gl.constexpr = 1 if by_planes(KIND) else 0
    PLANES: gl.constexpr = 2 if bits_of(KIND) == 3 else 1
    HIGH: gl.constexpr = codes_desc[PLANES - 1].block_type.nbytes * (PLANES - 1)
    CODES: gl.constexpr = codes_desc[0].block_type.nbytes + HIGH
    stage = 0
    phase = 1
    for u in range(units_of_work(plan, M, N, K, BN, BM, BK)):
        _, n0, m0, begin, end = unit_of_work(u, plan, M, N, K, BN, BM, BK, TOGETHER)
        for i in range(begin, end):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            if by_planes(KIND):
                first = (i & 1) == 0
                mbarrier.expect(bar, x_desc.block_type.nbytes + CODES, pred=first)
                mbarrier.expect(bar, x_desc.block_type.nbytes, pred=(i & 1) == 1)
            else:
                first = True
                mbarrier.expect(bar, x_desc.block_type.nbytes + CODES)
            tma.async_copy_global_to_shared(x_desc, [m0, i * BK], bar, x_s.index(stage))
            for p in gl.static_range(PLANES):
                tma.async_copy_global_to_shared(
                    codes_desc[p],
                    [n0, (i >> TURN) * codes_desc[p].block_type.shape[1]],
                    bar,
                    codes_s[p].index(stage >> TURN),
                    pred=first,
                )
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _multiply(
    y_desc,
    packed,
    buffers,
    sizes,
    plan,
    GROUP: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
    KIND: gl.constexpr,
    TWO: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PART: gl.constexpr,
):
    """Warpgroup PART: its half of the rows of every tile of W."""
    scale_ptr, zero_ptr, lut_ptr, bias_ptr, parts_ptr, arrived_ptr = packed
    x_s, _, y_s, full, empty = buffers
    M, N, K, groups, scale_rows = sizes
    DTYPE: gl.constexpr = x_s.dtype
    ROWS: gl.constexpr = BN // 2
    ZERO: gl.constexpr = zero_ptr.dtype.element_ty
    SCALE: gl.constexpr = scale_ptr.dtype.element_ty
    #: Scales that the sums take, since they hold for all of K. (Affine weights round their product with the scale.)
    ROW_SCALES: gl.constexpr = KIND == FLOAT8 and GROUP == 0
    #: Steps of BK inputs that one scale of a row serves: both of a turn, or one.
    EACH: gl.constexpr = 2 if GROUP % (2 * BK) == 0 else 1
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    PAIRS: gl.constexpr = pairs_layout(KIND, ROWS, BK)
    ROW: gl.constexpr = rows_layout(PAIRS)
    HOW: gl.constexpr = arithmetic(KIND, DTYPE, SCALE, ZERO)
    DIVISOR: gl.constexpr = divisor(KIND, DTYPE, SCALE, ZERO)
    constants = lane_constants(lut_ptr, KIND, HOW, ROWS, PAIRS)
    y = y_s.index(PART)
    stage = 0
    phase = 0
    for u in range(units_of_work(plan, M, N, K, BN, BM, BK)):
        t, n0, m0, begin, end = unit_of_work(u, plan, M, N, K, BN, BM, BK, TOGETHER)
        n0 += PART * ROWS
        at = gl.minimum(n0 + gl.arange(0, ROWS, ROW), N - 1) // scale_rows * groups
        # Scales and zeros of this turn (or its second step), of the next (or its first), and of that one's second step.
        if TWO:
            this = load_both(scale_ptr, zero_ptr, at, begin, groups, BK, KIND)
            later = load_both(scale_ptr, zero_ptr, at, begin + 2, groups, BK, KIND)
            now = one_of(this, 0, SCALE, ZERO)
        else:
            now = load_factors(scale_ptr, zero_ptr, at, begin, groups, BK, GROUP, KIND)
            this = load_factors(scale_ptr, zero_ptr, at, begin + 1, groups, BK, GROUP, KIND)
            later = load_factors(scale_ptr, zero_ptr, at, begin + 2, groups, BK, GROUP, KIND)
            latest = load_factors(scale_ptr, zero_ptr, at, begin + 3, groups, BK, GROUP, KIND)
        numbers = factors(now[0], now[1], KIND, HOW, DTYPE)
        mbarrier.wait(full.index(stage), phase)
        words = _words(buffers, stage, 0, PART, ROWS, BK, KIND, PAIRS)
        a = decode(words, constants, numbers, ZERO, SCALE, ROW_SCALES, KIND, HOW, DTYPE, PAIRS, OPERAND)
        acc = gl.zeros((ROWS, BM), gl.float32, SUM)
        for i in range(begin, end, 2):
            first = operand(a, KIND, HOW, DTYPE, PAIRS, OPERAND)
            acc = warpgroup_mma(first, x_s.index(stage).permute((1, 0)), acc, is_async=True)
            one = stage
            stage, phase = advance(stage, phase, STAGES)
            if TWO:
                now = one_of(this, 1, SCALE, ZERO)
                numbers = factors(now[0], now[1], KIND, HOW, DTYPE)
            elif EACH == 1:
                numbers = factors(this[0], this[1], KIND, HOW, DTYPE)
                this = latest
                latest = load_factors(scale_ptr, zero_ptr, at, i + 5, groups, BK, GROUP, KIND)
            mbarrier.wait(full.index(stage), phase)
            words = _words(buffers, one if by_planes(KIND) else stage, 1, PART, ROWS, BK, KIND, PAIRS)
            a = decode(words, constants, numbers, ZERO, SCALE, ROW_SCALES, KIND, HOW, DTYPE, PAIRS, OPERAND)
            second = operand(a, KIND, HOW, DTYPE, PAIRS, OPERAND)
            acc = warpgroup_mma(second, x_s.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index(one), count=1)
            other = stage
            other_phase = phase
            stage, phase = advance(stage, phase, STAGES)
            now = later
            if TWO:
                now = one_of(later, 0, SCALE, ZERO)
            if GROUP > 0 or not by_planes(KIND):  # else a row has one table
                numbers = factors(now[0], now[1], KIND, HOW, DTYPE)
            if TWO:
                this = later
                later = load_both(scale_ptr, zero_ptr, at, i + 4, groups, BK, KIND)
            else:
                later = load_factors(scale_ptr, zero_ptr, at, i + 4, groups, BK, GROUP, KIND)
            mbarrier.wait(full.index(stage), phase, pred=i + 2 < end)
            words = _words(buffers, stage, 0, PART, ROWS, BK, KIND, PAIRS)
            a = decode(words, constants, numbers, ZERO, SCALE, ROW_SCALES, KIND, HOW, DTYPE, PAIRS, OPERAND)
            mbarrier.wait(full.index(other), other_phase)  # passed before: it ends the basic block
            if by_planes(KIND):
                acc, a0, a1, a2, a3 = warpgroup_mma_wait(0, deps=(acc, a[0], a[1], a[2], a[3]))
                a = (a0, a1, a2, a3)
            else:
                acc, a = warpgroup_mma_wait(0, deps=(acc, a))
            mbarrier.arrive(empty.index(other), count=1)
        if ROW_SCALES:
            row_of_w = gl.minimum(n0 + gl.arange(0, ROWS, gl.SliceLayout(1, SUM)), N - 1)
            acc = acc * gl.expand_dims(gl.load(scale_ptr + row_of_w // scale_rows).to(gl.float32), 1)
        if DIVISOR != 1:
            acc = acc * DIVISOR
        complete, places = parts_of(t, plan, begin, end, M, N, K, BN, BM, BK)
        store_sums(
            acc, y, y_desc, m0, n0, N, (bias_ptr, parts_ptr, arrived_ptr), complete, places, PART, BN, BM, HAS_BIAS, SUM
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "K", "groups", "scale_rows", "whole", "sharers"])
def wide_hopper_kernel(
    x_desc,
    w_desc,
    high_desc,
    y_desc,
    scale_ptr,
    zero_ptr,
    lut_ptr,
    bias_ptr,
    parts_ptr,
    arrived_ptr,
    M,
    N,
    K,
    groups,
    scale_rows,
    whole,
    sharers,
    GROUP: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
    KIND: gl.constexpr,
    TWO: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """y `[M, N]` of x `[M, K]`, words of codes `[N, words of K]` and scales, zeros `[N / scale_rows, groups]`.

    2 and 3 bits: `w_desc` is for low planes, two steps a block; 3 bits have `high_desc` for high planes (else None).
    GROUP is a multiple of BK, or 0: one group per row. TWO: GROUP is BK, `groups` even, scales and zeros of two groups
    may be read at once. `whole` tiles are given out one by one; the first `sharers` programs share the others' steps
    evenly, a turn for each or more. Sums of parts go to `parts_ptr`, float32 `[2 * sharers, BM, BN]`; `arrived_ptr`:
    int32 `[tiles - whole, 2]`, zeros before and after.
    Grid: (programs,), `sharers` at least; 4 warps.
    """
    x_s = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BM, BK], x_desc.layout)
    gl.static_assert(STAGES % 2 == 0)
    SLOTS: gl.constexpr = STAGES // 2 if by_planes(KIND) else STAGES
    w_s = gl.allocate_shared_memory(gl.int32, [SLOTS, BN, w_desc.block_type.shape[1]], w_desc.layout)
    codes_desc = (w_desc,)
    codes_s = (w_s,)
    if bits_of(KIND) == 3:
        high_s = gl.allocate_shared_memory(gl.int32, [SLOTS, BN, BK // 16], high_desc.layout)
        codes_desc = (w_desc, high_desc)
        codes_s = (w_s, high_s)
    y_s = gl.allocate_shared_memory(x_desc.dtype, [2, BM, BN // 2], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    packed = (scale_ptr, zero_ptr, lut_ptr, bias_ptr, parts_ptr, arrived_ptr)
    buffers = (x_s, codes_s, y_s, full, empty)
    sizes = (M, N, K, groups, scale_rows)
    plan = (whole, sharers)
    gl.warp_specialize(
        [
            (_multiply, (y_desc, packed, buffers, sizes, plan,
                         GROUP, BN, BM, BK, STAGES, TOGETHER, KIND, TWO, HAS_BIAS, 0)),
            (_multiply, (y_desc, packed, buffers, sizes, plan,
                         GROUP, BN, BM, BK, STAGES, TOGETHER, KIND, TWO, HAS_BIAS, 1)),
            (_copy, (x_desc, codes_desc, buffers, sizes, plan, BN, BM, BK, STAGES, TOGETHER, KIND)),
        ],
        [4, 1],
        [REGISTERS, 40],
    )  # fmt: skip
