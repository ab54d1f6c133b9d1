"""y = x @ W.T for hundreds of rows of x on NVIDIA Hopper, codes to tensor cores in one launch (Gluon).

A tile is BN = 128 rows of W by BM = 256 rows of x. `wgmma` takes its first operand from registers, which is
where codes become numbers, and its second, x, from shared memory:

    one warp        copies x [BM, BK] and codes [BN, BK / 8 words] by TMA into STAGES buffers
    2 x 4 warps     decode 64 rows of W each, multiply them by all of x's tile; neither waits for the other

Inside a warpgroup a product runs while the operand of the next step is decoded:

    issue product 0 | decode 1 | issue product 1 | wait for 0 | decode 2 | wait for 1 | ...

No product is in flight where the loop turns. `wgmma` reads its registers after the instruction was issued, and
ptxas (12.8) does not keep them from being written again when only a later turn of the loop waits: weights
were then wrong without a warning. `tests/kernels/test_wide_hopper.py` looks for that in the compiled code. For the same
reason the loop ends with a wait for a barrier that has already been passed: it ends the basic block, without
which ptxas moves the decoding behind the wait for the product.

Operand layout: a thread of a quad holds k = 2t, 2t + 1 (t = 0 .. 3) of every 8 inputs, that is byte t of each word of
8 codes. The quad loads the same words, each thread rotates its byte to bits 12 .. 19, and

    low nibble  & 0x0f000 | 0x45000000    2048 + q as float32
    high nibble & 0xf0000 | 0x43000000     128 + q

One fused multiply-add then gives `(q - zero) * scale`, exactly, for integer zeros and 16-bit scales: with
c = -(2048 + zero) * scale, of at most 23 bits. Other scales and zeros take a subtraction, another and a product,
rounded as `quantkit.encoding.dequantize` rounds.

A codebook's table lies in the lanes, two copies of 16 entries, and a shuffle reads the entry of each code.

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

_BYTE_TO_FLOATS = gl.constexpr(
    "{ .reg .b32 r; shf.l.wrap.b32 r, $2, $2, $3; "
    "lop3.b32 $0, r, 0x0F000, 0x45000000, 0xEA; lop3.b32 $1, r, 0xF0000, 0x43000000, 0xEA; }"
)

#: The same for a table that lanes 0 .. 15 hold, and 16 .. 31 once more, so that bit 4 of a lane's number is free.
#: Codebooks keep the earlier code in the high nibble.
_BYTE_TO_ENTRIES = gl.constexpr(
    "{ .reg .b32 r; shf.l.wrap.b32 r, $2, $2, $3; shfl.sync.idx.b32 $1, $4, r, 0x1f, 0xffffffff; "
    "shr.u32 r, r, 4; shfl.sync.idx.b32 $0, $4, r, 0x1f, 0xffffffff; }"
)


@gluon.constexpr_function
def bytes_layout(rows, words):
    """Layout of `[rows, words, 4]` over 4 warps: the bytes of codes that a thread needs for a wgmma operand."""
    registers = [[8, 0, 0]]
    registers += [[0, 1 << i, 0] for i in range(words.bit_length() - 1)]
    lanes = [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [rows, words, 4])


@gluon.constexpr_function
def one_addition(scale, zero):
    """Is `(q - zero) * scale` one exact fused multiply-add for these dtypes?"""
    return zero.is_int() and scale.primitive_bitwidth == 16


@gluon.jit
def _tile(t, M, N, BN: gl.constexpr, BM: gl.constexpr, TOGETHER: gl.constexpr):
    """First row of W and of x of tile `t`: TOGETHER tiles of W by all of x, then the next."""
    across = gl.cdiv(M, BM)
    first = t // (TOGETHER * across) * TOGETHER
    size = gl.minimum(gl.cdiv(N, BN) - first, TOGETHER)
    inside = t % (TOGETHER * across)
    return (first + inside % size) * BN, inside // size * BM


@gluon.jit
def _factors(scale, zero):
    """What `_decode` needs of a group, as `[rows, 1, 1]` each: scale, and what low and high nibbles take."""
    s = scale.to(gl.float32)
    low = zero.to(gl.float32)
    high = low
    if one_addition(scale.dtype, zero.dtype):
        low = -(low + 2048.0) * s
        high = -(high + 128.0) * s
    s = gl.expand_dims(gl.expand_dims(s, 1), 2)
    return (
        s,
        gl.expand_dims(gl.expand_dims(low, 1), 2),
        gl.expand_dims(gl.expand_dims(high, 1), 2),
    )


@gluon.jit
def _load_factors(
    scale_ptr, zero_ptr, at, step, groups, BK: gl.constexpr, GROUP: gl.constexpr, HAS_TABLE: gl.constexpr
):
    """Scales and zeros of a step's group, clamped to the row's last. (A codebook has no zeros: scales twice.)"""
    g = at + gl.minimum(step * BK // GROUP, groups - 1)
    scale = gl.load(scale_ptr + g)
    if HAS_TABLE:
        return scale, scale
    return scale, gl.load(zero_ptr + g)


@gluon.jit
def _decode(
    words,
    rotation,
    table,
    scale,
    low,
    high,
    HAS_TABLE: gl.constexpr,
    EXACT: gl.constexpr,
    DTYPE: gl.constexpr,
    OPERAND: gl.constexpr,
):
    """Words of 8 codes `[rows, words]` as the first operand `[rows, 8 * words]` of a product."""
    w = gl.expand_dims(words, 2)
    if HAS_TABLE:
        a, b = gl.inline_asm_elementwise(
            _BYTE_TO_ENTRIES,
            "=r,=r,r,r,r",
            [w, rotation, table],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        a, b = gl.inline_asm_elementwise(
            _BYTE_TO_FLOATS, "=r,=r,r,r", [w, rotation], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )
    a = a.to(gl.float32, bitcast=True)
    b = b.to(gl.float32, bitcast=True)
    if HAS_TABLE:
        a = a * scale
        b = b * scale
    elif EXACT:
        a = gl.fma(a, scale, low)
        b = gl.fma(b, scale, high)
    else:
        a = (a - 2048.0 - low) * scale
        b = (b - 128.0 - high) * scale
    both = gl.join(a, b).reshape(words.shape[0], words.shape[1] * 8).to(DTYPE)
    return gl.convert_layout(both, OPERAND, assert_trivial=True)


@gluon.jit
def _advance(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _copy(
    x_desc,
    w_desc,
    buffers,
    sizes,
    BN: gl.constexpr,
    BM: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
):
    """The warp that copies. K is walked in pairs of steps; TMA fills with zeros what lies outside."""
    x_s, w_s, _, full, empty = buffers
    M, N, K, _ = sizes
    steps = gl.cdiv(K, 2 * BK) * 2
    stage = 0
    phase = 1
    for t in range(gl.program_id(0), gl.cdiv(N, BN) * gl.cdiv(M, BM), gl.num_programs(0)):
        n0, m0 = _tile(t, M, N, BN, BM, TOGETHER)
        for i in range(steps):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(x_desc, [m0, i * BK], bar, x_s.index(stage))
            tma.async_copy_global_to_shared(w_desc, [n0, i * (BK // 8)], bar, w_s.index(stage))
            stage, phase = _advance(stage, phase, STAGES)


@gluon.jit
def _multiply(
    y_desc,
    packed,
    buffers,
    sizes,
    GROUP: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
    HAS_TABLE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PART: gl.constexpr,
):
    """Warpgroup PART: its half of the rows of every tile of W."""
    scale_ptr, zero_ptr, lut_ptr, bias_ptr = packed
    x_s, w_s, y_s, full, empty = buffers
    M, N, K, groups = sizes
    DTYPE: gl.constexpr = x_s.dtype
    ROWS: gl.constexpr = BN // 2
    EXACT: gl.constexpr = not HAS_TABLE and one_addition(
        scale_ptr.dtype.element_ty, zero_ptr.dtype.element_ty
    )
    #: Steps of BK inputs that one scale of a row serves: both of a turn, or one.
    EACH: gl.constexpr = 2 if GROUP % (2 * BK) == 0 else 1
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    BYTES: gl.constexpr = bytes_layout(ROWS, BK // 8)
    WORDS: gl.constexpr = gl.SliceLayout(2, BYTES)
    ROW: gl.constexpr = gl.SliceLayout(1, WORDS)
    # A thread's byte to bits 12 .. 19, or for a table to the lowest.
    byte = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, BYTES))), 0), 1)
    rotation = (byte * 24 + (0 if HAS_TABLE else 12)) & 31
    table = rotation
    if HAS_TABLE:
        row = gl.expand_dims(gl.expand_dims(gl.arange(0, ROWS, ROW), 1), 2)
        entry = (row & 3) * 4 + byte  # the lane's number, modulo 16
        table = gl.load(lut_ptr + entry).to(gl.int32, bitcast=True)
    steps = gl.cdiv(K, 2 * BK) * 2
    y = y_s.index(PART)
    stage = 0
    phase = 0
    for t in range(gl.program_id(0), gl.cdiv(N, BN) * gl.cdiv(M, BM), gl.num_programs(0)):
        n0, m0 = _tile(t, M, N, BN, BM, TOGETHER)
        n0 += PART * ROWS
        at = gl.minimum(n0 + gl.arange(0, ROWS, ROW), N - 1) * groups
        scale_0, zero_0 = _load_factors(scale_ptr, zero_ptr, at, 0, groups, BK, GROUP, HAS_TABLE)
        scale, low, high = _factors(scale_0, zero_0)
        # Scales and zeros: of the second step of this turn, of the next turn's first and second step.
        scale_1, zero_1 = _load_factors(scale_ptr, zero_ptr, at, 1, groups, BK, GROUP, HAS_TABLE)
        scale_2, zero_2 = _load_factors(scale_ptr, zero_ptr, at, 2, groups, BK, GROUP, HAS_TABLE)
        scale_3, zero_3 = _load_factors(scale_ptr, zero_ptr, at, 3, groups, BK, GROUP, HAS_TABLE)
        mbarrier.wait(full.index(stage), phase)
        words = w_s.index(stage).slice(PART * ROWS, ROWS).load(WORDS)
        a = _decode(words, rotation, table, scale, low, high, HAS_TABLE, EXACT, DTYPE, OPERAND)
        acc = gl.zeros((ROWS, BM), gl.float32, SUM)
        for i in range(0, steps, 2):
            acc = warpgroup_mma(a, x_s.index(stage).permute((1, 0)), acc, is_async=True)
            first = stage
            stage, phase = _advance(stage, phase, STAGES)
            if EACH == 1:
                scale, low, high = _factors(scale_1, zero_1)
                scale_1, zero_1 = scale_3, zero_3
                scale_3, zero_3 = _load_factors(scale_ptr, zero_ptr, at, i + 5, groups, BK, GROUP, HAS_TABLE)
            mbarrier.wait(full.index(stage), phase)
            words = w_s.index(stage).slice(PART * ROWS, ROWS).load(WORDS)
            a = _decode(words, rotation, table, scale, low, high, HAS_TABLE, EXACT, DTYPE, OPERAND)

            acc = warpgroup_mma(a, x_s.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index(first), count=1)
            second = stage
            second_phase = phase
            stage, phase = _advance(stage, phase, STAGES)
            scale, low, high = _factors(scale_2, zero_2)
            scale_2, zero_2 = _load_factors(scale_ptr, zero_ptr, at, i + 4, groups, BK, GROUP, HAS_TABLE)
            mbarrier.wait(full.index(stage), phase, pred=i + 2 < steps)
            words = w_s.index(stage).slice(PART * ROWS, ROWS).load(WORDS)
            a = _decode(words, rotation, table, scale, low, high, HAS_TABLE, EXACT, DTYPE, OPERAND)
            mbarrier.wait(full.index(second), second_phase)  # passed before: it ends the basic block
            acc, a = warpgroup_mma_wait(0, deps=(acc, a))
            mbarrier.arrive(empty.index(second), count=1)
        if HAS_BIAS:
            n = n0 + gl.arange(0, ROWS, gl.SliceLayout(1, SUM))
            bias = gl.load(bias_ptr + gl.minimum(n, N - 1)).to(gl.float32)
            acc += gl.expand_dims(bias, 1)
        tma.store_wait(0)
        y.permute((1, 0)).store(acc.to(DTYPE))
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [m0, n0], y)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "K", "groups"])
def wide_hopper_kernel(
    x_desc,
    w_desc,
    y_desc,
    scale_ptr,
    zero_ptr,
    lut_ptr,
    bias_ptr,
    M,
    N,
    K,
    groups,
    GROUP: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
    HAS_TABLE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """y `[M, N]` of x `[M, K]`, words of codes `[N, K / 8]` and scales, zeros `[N, groups]`.

    GROUP is a multiple of BK. Grid: (min(multiprocessors, ceil(N / BN) * ceil(M / BM)),); 4 warps.
    """
    x_s = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BM, BK], x_desc.layout)
    w_s = gl.allocate_shared_memory(gl.int32, [STAGES, BN, BK // 8], w_desc.layout)
    y_s = gl.allocate_shared_memory(x_desc.dtype, [2, BM, BN // 2], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    packed = (scale_ptr, zero_ptr, lut_ptr, bias_ptr)
    buffers = (x_s, w_s, y_s, full, empty)
    sizes = (M, N, K, groups)
    gl.warp_specialize(
        [
            (
                _multiply,
                (y_desc, packed, buffers, sizes, GROUP, BN, BM, BK, STAGES, TOGETHER, HAS_TABLE, HAS_BIAS, 0),
            ),
            (
                _multiply,
                (y_desc, packed, buffers, sizes, GROUP, BN, BM, BK, STAGES, TOGETHER, HAS_TABLE, HAS_BIAS, 1),
            ),
            (_copy, (x_desc, w_desc, buffers, sizes, BN, BM, BK, STAGES, TOGETHER)),
        ],
        [4, 1],
        [240, 24],
    )
