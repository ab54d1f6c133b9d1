"""dx = dy @ W for tens to thousands of rows on NVIDIA Hopper, without W in memory (Gluon).

The gradient of `wide_hopper`, whose way of giving out tiles, buffers and order of instructions it has. The first
operand is W transposed (`wide_hopper_dx_decode`): a tile is BN = 128 columns of W by BM rows of dy, a step BS = 64 rows
of W.

    one warp        copies dy [BM, BS] and codes [BS, BN columns] by TMA into STAGES buffers
    two warps       read scales and zeros of the step's rows of W, and make them ready beside them
    2 x 4 warps     decode 64 columns of W each, multiply them by all of dy's tile
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

from quantkit.kernels.wide_hopper import advance, parts_of, unit_of_work, units_of_work
from quantkit.kernels.wide_hopper_affine import SPLIT, arithmetic, divisor
from quantkit.kernels.wide_hopper_dx_decode import (
    column_factors,
    decode_columns,
    factor_dtypes,
    in_order,
    lane_table,
    sets_of,
    units_layout,
)
from quantkit.kernels.wide_hopper_kinds import is_affine
from quantkit.kernels.wide_hopper_parts import store_sums


@gluon.jit
def _copy(
    dy_desc,
    w_desc,
    buffers,
    sizes,
    plan,
    BN: gl.constexpr,
    BM: gl.constexpr,
    BS: gl.constexpr,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
):
    """The warp that copies. N is walked in pairs of steps; TMA fills with zeros what lies outside."""
    dy_s, w_s, _, _, full, empty = buffers
    M, N, K, _, _ = sizes
    UNIT: gl.constexpr = BN // w_desc.block_type.shape[1]
    stage = 0
    phase = 1
    for u in range(units_of_work(plan, M, K, N, BN, BM, BS)):
        _, k0, m0, begin, end = unit_of_work(u, plan, M, K, N, BN, BM, BS, TOGETHER)
        for i in range(begin, end):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, dy_desc.block_type.nbytes + w_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(dy_desc, [m0, i * BS], bar, dy_s.index(stage))
            tma.async_copy_global_to_shared(w_desc, [i * BS, k0 // UNIT], bar, w_s.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _load_groups(
    packed, sizes, k0, step, BN: gl.constexpr, BS: gl.constexpr, GROUP: gl.constexpr, KIND: gl.constexpr
):
    """Scales and zeros of a step's rows of W, for the groups of both halves of the tile."""
    scale_ptr, zero_ptr, _, _, _ = packed
    _, N, _, groups, scale_rows = sizes
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [BS // 32], [0])
    at = gl.minimum(step * BS + gl.arange(0, BS, LINE), N - 1) // scale_rows * groups
    g = at
    if GROUP > 0:
        g = at + k0 // GROUP
    scale = gl.load(scale_ptr + g)
    zero = scale
    if is_affine(KIND):
        zero = gl.load(zero_ptr + g)
    other_scale = scale
    other_zero = zero
    if sets_of(GROUP, BN) == 2:
        g = at + gl.minimum((k0 + BN // 2) // GROUP, groups - 1)
        other_scale = gl.load(scale_ptr + g)
        other_zero = other_scale
        if is_affine(KIND):
            other_zero = gl.load(zero_ptr + g)
    return scale, zero, other_scale, other_zero


@gluon.jit
def _store_group(factors, at, scale, zero, KIND: gl.constexpr, DTYPE: gl.constexpr):
    """What `decode_columns` needs of a group."""
    HOW: gl.constexpr = arithmetic(KIND, DTYPE, scale.dtype, zero.dtype)
    times, plus, rest = column_factors(scale, zero, KIND, HOW, DTYPE)
    factors[0].index(at).store(times)
    if is_affine(KIND):
        factors[1].index(at).store(plus)
    if HOW == SPLIT:
        factors[2].index(at).store(rest)


@gluon.jit
def _give(
    given,
    buffers,
    stage,
    phase,
    SETS: gl.constexpr,
    STAGES: gl.constexpr,
    KIND: gl.constexpr,
):
    """The next free buffer gets a step's scales and zeros."""
    dy_s, _, factors, _, full, empty = buffers
    scale, zero, other_scale, other_zero = given
    mbarrier.wait(empty.index(stage), phase)
    _store_group(factors, stage * SETS, scale, zero, KIND, dy_s.dtype)
    if SETS == 2:
        _store_group(factors, stage * SETS + 1, other_scale, other_zero, KIND, dy_s.dtype)
    mbarrier.arrive(full.index(stage), count=1)
    return advance(stage, phase, STAGES)


@gluon.jit
def _prepare(
    packed,
    buffers,
    sizes,
    plan,
    GROUP: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    BS: gl.constexpr,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
    KIND: gl.constexpr,
):
    """The warps that read scales and zeros, four steps ahead: a step of few rows takes half of memory's latency."""
    M, N, K, _, _ = sizes
    SETS: gl.constexpr = sets_of(GROUP, BN)
    stage = 0
    phase = 1
    for u in range(units_of_work(plan, M, K, N, BN, BM, BS)):
        _, k0, _, begin, end = unit_of_work(u, plan, M, K, N, BN, BM, BS, TOGETHER)
        g0 = _load_groups(packed, sizes, k0, begin, BN, BS, GROUP, KIND)
        g1 = _load_groups(packed, sizes, k0, begin + 1, BN, BS, GROUP, KIND)
        g2 = _load_groups(packed, sizes, k0, begin + 2, BN, BS, GROUP, KIND)
        g3 = _load_groups(packed, sizes, k0, begin + 3, BN, BS, GROUP, KIND)
        for i in range(begin, end, 4):
            stage, phase = _give(g0, buffers, stage, phase, SETS, STAGES, KIND)
            g0 = _load_groups(packed, sizes, k0, i + 4, BN, BS, GROUP, KIND)
            stage, phase = _give(g1, buffers, stage, phase, SETS, STAGES, KIND)
            g1 = _load_groups(packed, sizes, k0, i + 5, BN, BS, GROUP, KIND)
            if i + 2 < end:
                stage, phase = _give(g2, buffers, stage, phase, SETS, STAGES, KIND)
                g2 = _load_groups(packed, sizes, k0, i + 6, BN, BS, GROUP, KIND)
                stage, phase = _give(g3, buffers, stage, phase, SETS, STAGES, KIND)
                g3 = _load_groups(packed, sizes, k0, i + 7, BN, BS, GROUP, KIND)


@gluon.jit
def _multiply(
    dx_desc,
    packed,
    buffers,
    sizes,
    plan,
    GROUP: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    BS: gl.constexpr,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
    KIND: gl.constexpr,
    PART: gl.constexpr,
):
    """Warpgroup PART: its half of the columns of every tile of W."""
    scale_ptr, zero_ptr, lut_ptr, parts_ptr, arrived_ptr = packed
    dy_s, _, _, y_s, full, empty = buffers
    M, N, K, _, _ = sizes
    DTYPE: gl.constexpr = dy_s.dtype
    ROWS: gl.constexpr = BN // 2
    ZERO: gl.constexpr = zero_ptr.dtype.element_ty
    SCALE: gl.constexpr = scale_ptr.dtype.element_ty
    SETS: gl.constexpr = sets_of(GROUP, BN)
    HOW: gl.constexpr = arithmetic(KIND, DTYPE, SCALE, ZERO)
    DIVISOR: gl.constexpr = divisor(KIND, DTYPE, SCALE, ZERO)
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    LAYOUT: gl.constexpr = units_layout(KIND, ROWS, BS)
    WIDE: gl.constexpr = LAYOUT.shape[1]
    table = lane_table(lut_ptr, M, KIND)
    y = y_s.index(PART)
    stage = 0
    phase = 0
    for u in range(units_of_work(plan, M, K, N, BN, BM, BS)):
        t, k0, m0, begin, end = unit_of_work(u, plan, M, K, N, BN, BM, BS, TOGETHER)
        mbarrier.wait(full.index(stage), phase)
        a = decode_columns(buffers, stage, table, ZERO, SCALE, SETS, KIND, HOW, DTYPE, LAYOUT, OPERAND, PART)
        acc = gl.zeros((ROWS, BM), gl.float32, SUM)
        for i in range(begin, end, 2):
            acc = warpgroup_mma(a, dy_s.index(stage).permute((1, 0)), acc, is_async=True)
            one = stage
            stage, phase = advance(stage, phase, STAGES)
            mbarrier.wait(full.index(stage), phase)
            a = decode_columns(
                buffers, stage, table, ZERO, SCALE, SETS, KIND, HOW, DTYPE, LAYOUT, OPERAND, PART
            )
            acc = warpgroup_mma(a, dy_s.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index(one), count=1)
            other = stage
            other_phase = phase
            stage, phase = advance(stage, phase, STAGES)
            mbarrier.wait(full.index(stage), phase, pred=i + 2 < end)
            a = decode_columns(
                buffers, stage, table, ZERO, SCALE, SETS, KIND, HOW, DTYPE, LAYOUT, OPERAND, PART
            )
            mbarrier.wait(full.index(other), other_phase)  # passed before: it ends the basic block
            acc, a = warpgroup_mma_wait(0, deps=(acc, a))
            mbarrier.arrive(empty.index(other), count=1)
        if DIVISOR != 1:
            acc = acc * DIVISOR
        ordered = in_order(acc, WIDE)
        complete, places = parts_of(t, plan, begin, end, M, K, N, BN, BM, BS)
        WHERE: gl.constexpr = ordered.type.layout
        store_sums(
            ordered, y, dx_desc, m0, k0 + PART * ROWS, K, (parts_ptr, parts_ptr, arrived_ptr), complete, places, PART,
            BN, BM, False, WHERE,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "K", "groups", "scale_rows", "whole", "sharers"])
def wide_hopper_dx_kernel(
    dy_desc,
    w_desc,
    dx_desc,
    scale_ptr,
    zero_ptr,
    lut_ptr,
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
    BS: gl.constexpr,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
    KIND: gl.constexpr,
    REGISTERS: gl.constexpr,
    OTHERS: gl.constexpr,
):
    """dx `[M, K]` of dy `[M, N]`, units of codes int16 `[N, units of K]` and scales, zeros `[N / scale_rows, groups]`.

    GROUP is a multiple of 64, or 0: one group per row. `whole`, `sharers`, `parts_ptr`, `arrived_ptr` and the grid as
    for `wide_hopper_kernel`; 4 warps.
    """
    UNITS: gl.constexpr = w_desc.block_type.shape[1]
    LINES: gl.constexpr = STAGES * sets_of(GROUP, BN)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dy_s = gl.allocate_shared_memory(dy_desc.dtype, [STAGES, BM, BS], dy_desc.layout)
    w_s = gl.allocate_shared_memory(gl.int16, [STAGES, BS, UNITS], w_desc.layout)
    HOW: gl.constexpr = arithmetic(KIND, dy_desc.dtype, scale_ptr.dtype.element_ty, zero_ptr.dtype.element_ty)
    KEPT: gl.constexpr = factor_dtypes(KIND, HOW, dy_desc.dtype, scale_ptr.dtype.element_ty)
    times_s = gl.allocate_shared_memory(KEPT[0], [LINES, BS], FLAT)
    plus_s = gl.allocate_shared_memory(KEPT[1], [LINES if is_affine(KIND) else 1, BS], FLAT)
    rest_s = gl.allocate_shared_memory(KEPT[0], [LINES if HOW == SPLIT else 1, BS], FLAT)
    y_s = gl.allocate_shared_memory(dy_desc.dtype, [2, BM, BN // 2], dx_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    packed = (scale_ptr, zero_ptr, lut_ptr, parts_ptr, arrived_ptr)
    buffers = (dy_s, w_s, (times_s, plus_s, rest_s), y_s, full, empty)
    sizes = (M, N, K, groups, scale_rows)
    plan = (whole, sharers)
    gl.warp_specialize(
        [
            (
                _multiply,
                (dx_desc, packed, buffers, sizes, plan, GROUP, BN, BM, BS, STAGES, TOGETHER, KIND, 0),
            ),
            (
                _multiply,
                (dx_desc, packed, buffers, sizes, plan, GROUP, BN, BM, BS, STAGES, TOGETHER, KIND, 1),
            ),
            (_copy, (dy_desc, w_desc, buffers, sizes, plan, BN, BM, BS, STAGES, TOGETHER)),
            (_prepare, (packed, buffers, sizes, plan, GROUP, BN, BM, BS, STAGES, TOGETHER, KIND)),
        ],
        [4, 1, 2],
        [REGISTERS, OTHERS, OTHERS],
    )
