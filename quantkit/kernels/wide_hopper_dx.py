"""dx = dy @ W for tens to thousands of rows on NVIDIA Hopper, without W in memory (Gluon).

The gradient of `wide_hopper`, whose way of giving out tiles, buffers and order of instructions it has. The first
operand is W transposed: a tile is BN = 128 columns of W (rows of dx.T) by BM rows of dy, and a step is BS = 64 rows of W.

    one warp        copies dy [BM, BS] and codes [BS, BN columns] by TMA into STAGES buffers
    two warps       read scales and zeros of the step's rows of W, and make them ready beside them
    2 x 4 warps     decode 64 columns of W each, multiply them by all of dy's tile

A register of the first operand holds two numbers of one column, from rows n and n + 1. Codes of a row lie side by
side in 16 bits (4 of 4 bits, 2 of 8), and `ldmatrix.trans` gives a thread such units of both rows in one register.
So a thread has its two columns (r and r + 8 of a warp's 16) in neighbouring codes: the rows of the product are
columns of W in another order, which only its sums' addresses know:

    4 bits    column 32 a + 4 r + 2 b + h of warp 2 a + b's row 8 h + r
    8 bits    column 16 w + 2 r + h of warp w's row 8 h + r
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

from quantkit.kernels.wide_hopper import _advance, _unit, _units
from quantkit.kernels.wide_hopper_decode import (
    FLOAT8,
    TABLE_4,
    bits_of,
    is_affine,
    offsets,
    one_addition,
)

#: Codes 0, 1 (or 2, 3) of the units of rows n and n + 1: to bits 12 .. 15 and 16 .. 19.
_NIBBLES = gl.constexpr(
    "{ .reg .b32 l, h; shl.b32 l, $4, $5; shr.b32 h, $4, $7; "
    "lop3.b32 $0, l, 0x0F000, 0x45000000, 0xEA; lop3.b32 $1, h, 0x0F000, 0x45000000, 0xEA; "
    "lop3.b32 $2, l, 0xF0000, 0x43000000, 0xEA; lop3.b32 $3, h, 0xF0000, 0x43000000, 0xEA; }"
)
#: The table's entries of them. Lanes 0 .. 15 hold it, and 16 .. 31 once more. The earlier code is the high nibble.
_ENTRIES = gl.constexpr(
    "{ .reg .b32 r; shr.b32 r, $4, $7; shfl.sync.idx.b32 $2, $9, r, 0x1f, 0xffffffff; "
    "shr.b32 r, r, 4; shfl.sync.idx.b32 $0, $9, r, 0x1f, 0xffffffff; "
    "shr.b32 r, r, 12; shfl.sync.idx.b32 $3, $9, r, 0x1f, 0xffffffff; "
    "shr.b32 r, r, 4; shfl.sync.idx.b32 $1, $9, r, 0x1f, 0xffffffff; }"
)
_BYTES = gl.constexpr(
    "prmt.b32 $0, $4, 0x47000000, 0x7404; prmt.b32 $1, $4, 0x47000000, 0x7424; "
    "prmt.b32 $2, $4, 0x47000000, 0x7414; prmt.b32 $3, $4, 0x47000000, 0x7434;"
)
_FLOAT8 = gl.constexpr(
    "{ .reg .b32 r; .reg .b16 a, b; prmt.b32 r, $4, 0, 0x4420; cvt.u16.u32 a, r; cvt.rn.f16x2.e4m3x2 r, a; "
    "mov.b32 {a, b}, r; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; prmt.b32 r, $4, 0, 0x4431; cvt.u16.u32 a, r; "
    "cvt.rn.f16x2.e4m3x2 r, a; mov.b32 {a, b}, r; cvt.f32.f16 $2, a; cvt.f32.f16 $3, b; }"
)
_LANE = gl.constexpr("mov.u32 $0, %laneid;")


@gluon.constexpr_function
def units_layout(kind, columns, inputs):
    """Layout `[units of all columns, 2 or 1, inputs]` of units of codes over 4 warps, as the operand wants them."""
    registers = [[0, 0, 1]] + [[0, 0, 8 << i] for i in range((inputs // 8).bit_length() - 1)]
    lanes = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    if bits_of(kind) == 4:
        return gl.DistributedLinearLayout(
            registers, lanes, [[0, 1, 0], [8, 0, 0]], [], [columns // 4, 2, inputs]
        )
    return gl.DistributedLinearLayout(
        registers, lanes, [[8, 0, 0], [16, 0, 0]], [], [columns // 2, 1, inputs]
    )


@gluon.constexpr_function
def sets_of(group, bn):
    """How many groups a tile's BN columns may lie in: its halves have one each, or share one."""
    return 1 if group % bn == 0 else 2


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
    dy_s, w_s, _, _, _, full, empty = buffers
    M, N, K, _, _ = sizes
    UNIT: gl.constexpr = BN // w_desc.block_type.shape[1]
    stage = 0
    phase = 1
    for u in range(gl.program_id(0), _units(plan, M, K, BN, BM), gl.num_programs(0)):
        k0, m0, begin, end = _unit(u, plan, M, K, N, BN, BM, BS, TOGETHER)
        for i in range(begin, end):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, dy_desc.block_type.nbytes + w_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(dy_desc, [m0, i * BS], bar, dy_s.index(stage))
            tma.async_copy_global_to_shared(w_desc, [i * BS, k0 // UNIT], bar, w_s.index(stage))
            stage, phase = _advance(stage, phase, STAGES)


@gluon.jit
def _load_groups(
    packed, sizes, k0, step, BN: gl.constexpr, BS: gl.constexpr, GROUP: gl.constexpr, KIND: gl.constexpr
):
    """Scales and zeros of a step's rows of W, for the groups of both halves of the tile."""
    scale_ptr, zero_ptr, _, _ = packed
    _, N, K, groups, scale_rows = sizes
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
def _store_group(s_s, z_s, at, scale, zero, KIND: gl.constexpr):
    """What `_decode` needs of a group: scale, and what the first code of a pair takes."""
    s_s.index(at).store(scale)
    if is_affine(KIND):
        first = zero.to(gl.float32)
        if zero.dtype.is_int():
            first = first + offsets(KIND)[0]
        if one_addition(KIND, scale.dtype, zero.dtype):
            first = -first * scale.to(gl.float32)
        z_s.index(at).store(first)


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
    _, _, s_s, z_s, _, full, empty = buffers
    scale, zero, other_scale, other_zero = given
    mbarrier.wait(empty.index(stage), phase)
    _store_group(s_s, z_s, stage * SETS, scale, zero, KIND)
    if SETS == 2:
        _store_group(s_s, z_s, stage * SETS + 1, other_scale, other_zero, KIND)
    mbarrier.arrive(full.index(stage), count=1)
    return _advance(stage, phase, STAGES)


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
    for u in range(gl.program_id(0), _units(plan, M, K, BN, BM), gl.num_programs(0)):
        k0, m0, begin, end = _unit(u, plan, M, K, N, BN, BM, BS, TOGETHER)
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
def _factor(lines, at, LAYOUT: gl.constexpr):
    line = lines.index(at).load(gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    return gl.expand_dims(gl.expand_dims(line, 0), 1)


@gluon.jit
def _decode(
    buffers,
    stage,
    table,
    ZERO: gl.constexpr,
    SCALE: gl.constexpr,
    SETS: gl.constexpr,
    KIND: gl.constexpr,
    DTYPE: gl.constexpr,
    LAYOUT: gl.constexpr,
    OPERAND: gl.constexpr,
    PART: gl.constexpr,
):
    """Half PART of a step's columns of W as the first operand `[64 columns, BS]`."""
    _, w_s, s_s, z_s, _, _, _ = buffers
    HALF: gl.constexpr = w_s.shape[2] // 2
    words = w_s.index(stage).slice(PART * HALF, HALF, 1).permute((1, 0)).load(gl.SliceLayout(1, LAYOUT))
    words = gl.expand_dims(words, 1)
    b = gl.expand_dims(
        gl.expand_dims(gl.arange(0, LAYOUT.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))), 0), 2
    )
    DTYPES: gl.constexpr = (gl.float32, gl.float32) if KIND == FLOAT8 else (gl.int32, gl.int32)
    OUT: gl.constexpr = "=f,=f,=f,=f," if KIND == FLOAT8 else "=r,=r,=r,=r,"
    if bits_of(KIND) == 8:
        first, second = gl.inline_asm_elementwise(
            _FLOAT8 if KIND == FLOAT8 else _BYTES, OUT + "r", [words], dtype=DTYPES, is_pure=True, pack=2
        )
    elif KIND == TABLE_4:
        first, second = gl.inline_asm_elementwise(
            _ENTRIES, OUT + "r,r,r,r,r,r,r", [words, b, b * 8, table], dtype=DTYPES, is_pure=True, pack=2
        )
    else:
        first, second = gl.inline_asm_elementwise(
            _NIBBLES, OUT + "r,r,r,r,r", [words, 12 - b * 8, b * 8 + 4], dtype=DTYPES, is_pure=True, pack=2
        )
    if KIND != FLOAT8:
        first = first.to(gl.float32, bitcast=True)
        second = second.to(gl.float32, bitcast=True)
    at = stage * SETS + (PART if SETS == 2 else 0)
    scale = _factor(s_s, at, LAYOUT).to(gl.float32)
    if is_affine(KIND):
        OFFSETS: gl.constexpr = offsets(KIND)
        STEP: gl.constexpr = OFFSETS[0] - OFFSETS[1]
        zero = _factor(z_s, at, LAYOUT)
        if one_addition(KIND, SCALE, ZERO):
            first = gl.fma(first, scale, zero)
            # Exact: both are a product of few bits (see `wide_hopper_decode`).
            second = gl.fma(second, scale, zero if STEP == 0 else gl.fma(scale, STEP, zero))
        elif ZERO.is_int():
            first = (first - zero) * scale
            second = (second - (zero - STEP)) * scale
        else:
            first = (first - OFFSETS[0] - zero) * scale
            second = (second - OFFSETS[1] - zero) * scale
    else:
        first = first * scale
        second = second * scale
    # [units, b, inputs, h] -> [a or more of a, r, b, inputs, h] -> rows a, b, h, r.
    both = gl.join(first.to(DTYPE), second.to(DTYPE))
    INPUTS: gl.constexpr = LAYOUT.shape[2]
    WIDE: gl.constexpr = LAYOUT.shape[1]
    both = both.reshape(LAYOUT.shape[0] // 8, 8, WIDE, INPUTS, 2).permute(0, 2, 4, 1, 3)
    return gl.convert_layout(both.reshape(64, INPUTS), OPERAND, assert_trivial=True)


@gluon.jit
def _in_order(acc, WIDE: gl.constexpr):
    """Sums `[64, BM]` with their rows in the order of W's columns."""
    ordered = acc.reshape(4 // WIDE, WIDE, 2, 8, acc.shape[1]).permute(0, 3, 1, 2, 4)
    return ordered.reshape(64, acc.shape[1])


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
    scale_ptr, zero_ptr, lut_ptr, parts_ptr = packed
    dy_s, _, _, _, y_s, full, empty = buffers
    M, N, K, _, _ = sizes
    DTYPE: gl.constexpr = dy_s.dtype
    ROWS: gl.constexpr = BN // 2
    ZERO: gl.constexpr = zero_ptr.dtype.element_ty
    SCALE: gl.constexpr = scale_ptr.dtype.element_ty
    SETS: gl.constexpr = sets_of(GROUP, BN)
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    LAYOUT: gl.constexpr = units_layout(KIND, ROWS, BS)
    WIDE: gl.constexpr = LAYOUT.shape[1]
    table = 0
    if KIND == TABLE_4:
        lane = gl.inline_asm_elementwise(_LANE, "=r,r", [M], dtype=gl.int32, is_pure=True, pack=1)
        table = gl.load(lut_ptr + (lane & 15)).to(gl.int32, bitcast=True)
    y = y_s.index(PART)
    stage = 0
    phase = 0
    for u in range(gl.program_id(0), _units(plan, M, K, BN, BM), gl.num_programs(0)):
        k0, m0, begin, end = _unit(u, plan, M, K, N, BN, BM, BS, TOGETHER)
        mbarrier.wait(full.index(stage), phase)
        a = _decode(buffers, stage, table, ZERO, SCALE, SETS, KIND, DTYPE, LAYOUT, OPERAND, PART)
        acc = gl.zeros((ROWS, BM), gl.float32, SUM)
        for i in range(begin, end, 2):
            acc = warpgroup_mma(a, dy_s.index(stage).permute((1, 0)), acc, is_async=True)
            one = stage
            stage, phase = _advance(stage, phase, STAGES)
            mbarrier.wait(full.index(stage), phase)
            a = _decode(buffers, stage, table, ZERO, SCALE, SETS, KIND, DTYPE, LAYOUT, OPERAND, PART)

            acc = warpgroup_mma(a, dy_s.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index(one), count=1)
            other = stage
            other_phase = phase
            stage, phase = _advance(stage, phase, STAGES)
            mbarrier.wait(full.index(stage), phase, pred=i + 2 < end)
            a = _decode(buffers, stage, table, ZERO, SCALE, SETS, KIND, DTYPE, LAYOUT, OPERAND, PART)
            mbarrier.wait(full.index(other), other_phase)  # passed before: it ends the basic block
            acc, a = warpgroup_mma_wait(0, deps=(acc, a))
            mbarrier.arrive(empty.index(other), count=1)
        ordered = _in_order(acc, WIDE)
        cut = u - plan[0]
        if cut < 0:
            tma.store_wait(0)
            y.permute((1, 0)).store(ordered.to(DTYPE))
            fence_async_shared()
            tma.async_copy_shared_to_global(dx_desc, [m0, k0 + PART * ROWS], y)
        else:
            WHERE: gl.constexpr = ordered.type.layout
            of_dy = gl.expand_dims(gl.arange(0, BM, gl.SliceLayout(0, WHERE)), 0)
            of_w = gl.expand_dims(PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, WHERE)), 1)
            gl.store(parts_ptr + cut * (BM * BN) + of_dy * BN + of_w, ordered)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "K", "groups", "scale_rows", "whole", "parts", "each"])
def wide_hopper_dx_kernel(
    dy_desc,
    w_desc,
    dx_desc,
    scale_ptr,
    zero_ptr,
    lut_ptr,
    parts_ptr,
    M,
    N,
    K,
    groups,
    scale_rows,
    whole,
    parts,
    each,
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

    GROUP is a multiple of 64, or 0: one group per row. Tiles from `whole` on are cut into `parts` of `each` steps of
    N (an even number), whose sums go to `parts_ptr`, float32 `[tiles - whole, parts, BM, BN]`.
    Grid: (min(multiprocessors, units of work),); 4 warps.
    """
    UNITS: gl.constexpr = w_desc.block_type.shape[1]
    LINES: gl.constexpr = STAGES * sets_of(GROUP, BN)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dy_s = gl.allocate_shared_memory(dy_desc.dtype, [STAGES, BM, BS], dy_desc.layout)
    w_s = gl.allocate_shared_memory(gl.int16, [STAGES, BS, UNITS], w_desc.layout)
    s_s = gl.allocate_shared_memory(scale_ptr.dtype.element_ty, [LINES, BS], FLAT)
    z_s = gl.allocate_shared_memory(gl.float32, [LINES if is_affine(KIND) else 1, BS], FLAT)
    y_s = gl.allocate_shared_memory(dy_desc.dtype, [2, BM, BN // 2], dx_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    packed = (scale_ptr, zero_ptr, lut_ptr, parts_ptr)
    buffers = (dy_s, w_s, s_s, z_s, y_s, full, empty)
    sizes = (M, N, K, groups, scale_rows)
    plan = (whole, parts, each)
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
