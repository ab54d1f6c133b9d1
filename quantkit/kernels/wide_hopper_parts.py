"""Where sums go: tiles into y; of tiles that programs share, the last part to come adds all up (Gluon; `wide_hopper`).

A second launch for that took 3 to 4 us of a product of 12 (H100). Nobody waits for another: a part leaves its sums and
counts itself; who counts last reads the others' sums, out of the L2 cache mostly, and adds them in the order of K.
"""

# mypy: ignore-errors
# Gluon's language is not Python's type system: jit functions are compiled, not called.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

#: Of the threads of a warpgroup. Triton 3.7 calls it otherwise.
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def store_sums(
    sums,
    y,
    y_desc,
    m0,
    n0,
    N,
    pointers,
    complete,
    places,
    PART: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """A warpgroup's sums `[BN / 2, BM]`, plus bias, through shared memory `y [BM, BN / 2]` to rows from `m0`, columns
    from `n0` on. If they are not a `complete` tile's, they are left as a part; the last part's warpgroup adds all up.

    pointers: bias, parts (float32 `[places, BM, BN]`), arrived (int32 `[tiles, 2]`); `places`: `wide_hopper.parts_of`.
    """
    bias_ptr, parts_ptr, arrived_ptr = pointers
    ROWS: gl.constexpr = BN // 2
    if complete:
        if HAS_BIAS:
            n = n0 + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
            bias = gl.load(bias_ptr + gl.minimum(n, N - 1)).to(gl.float32)
            sums = sums + gl.expand_dims(bias, 1)
        tma.store_wait(0)
        y.permute((1, 0)).store(sums.to(y.dtype))
    else:
        complete = _leave_part(sums, parts_ptr, arrived_ptr, places, PART, BN, BM, ROWS, LAYOUT)
        if complete:
            tma.store_wait(0)
            _add_parts(y, parts_ptr, bias_ptr, n0, N, places, PART, BN, BM, ROWS, HAS_BIAS)
    if complete:
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [m0, n0], y)


@gluon.jit
def _leave_part(
    acc,
    parts_ptr,
    arrived_ptr,
    places,
    PART: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    ROWS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Leaves a warpgroup's sums `[ROWS, BM]` of a part of a tile, and says whether it was the last to come.

    parts: float32 `[places, BM, BN]`; arrived: int32 `[tiles, 2]`, which the last one leaves zeros, as the next
    launch wants them; `places`: `wide_hopper.parts_of`.
    """
    mine, tile, count, _, _ = places
    of_x = gl.expand_dims(gl.arange(0, BM, gl.SliceLayout(0, LAYOUT)), 0)
    of_w = gl.expand_dims(PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)), 1)
    gl.store(parts_ptr + mine * (BM * BN) + of_x * BN + of_w, acc)
    thread_barrier()
    counter = arrived_ptr + 2 * tile + PART
    # One thread's: it releases what all have stored, and acquires what the others have.
    last = gl.atomic_add(counter, 1, sem="acq_rel") == count - 1
    if last:
        gl.store(counter, 0)
    return last


@gluon.jit
def _part(here, p, places, SIZE: gl.constexpr):
    """Part `p`; zeros beyond the last."""
    _, _, count, first, second = places
    place = gl.where(p == 0, first, second + 2 * (p - 1))
    return gl.load(here + place * SIZE, mask=p < count, other=0.0, cache_modifier=".cg")


@gluon.jit
def _add_parts(
    y,
    parts_ptr,
    bias_ptr,
    n0,
    N,
    places,
    PART: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    ROWS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """The parts of a cut tile, added in order, plus bias, into shared memory `y [BM, ROWS]`: columns from `n0` on."""
    # Rows of x and parts that are read at once: as much as there are registers for; nothing else hides the time.
    HIGH: gl.constexpr = 64 if BM > 64 else BM
    PARTS: gl.constexpr = 2 if BM > 64 else 4
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    of_x = gl.expand_dims(gl.arange(0, HIGH, gl.SliceLayout(1, LAYOUT)), 1)
    of_w = gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
    at = of_x * BN + gl.expand_dims(PART * ROWS + of_w, 0)
    for part_of_x in gl.static_range(BM // HIGH):
        here = parts_ptr + part_of_x * HIGH * BN + at
        total = gl.zeros((HIGH, ROWS), gl.float32, LAYOUT)
        for p in range(0, places[2], PARTS):
            a = _part(here, p, places, BM * BN)
            b = _part(here, p + 1, places, BM * BN)
            if PARTS == 4:
                c = _part(here, p + 2, places, BM * BN)
                d = _part(here, p + 3, places, BM * BN)
                total = (((total + a) + b) + c) + d
            else:
                total = (total + a) + b
        if HAS_BIAS:
            bias = gl.load(bias_ptr + gl.minimum(n0 + of_w, N - 1)).to(gl.float32)
            total = total + gl.expand_dims(bias, 0)
        y.slice(part_of_x * HIGH, HIGH).store(total.to(y.dtype))
