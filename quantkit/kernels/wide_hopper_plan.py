"""Which tiles `wide_hopper_kernel` multiplies, how programs share them, and where it is the faster route.

All times are from an H100 (docs/benchmarks/kernels-h100.md), for bfloat16 and cold weights.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from quantkit.kernels import tuning
from quantkit.kernels.launch import cdiv

#: Rows of W per tile, inputs per step.
BN, BK = 128, 64


class Tile(NamedTuple):
    """Of some rows of x."""

    stages: int  #: buffers of one step (of 4 or 8 bits they fit in 227 KB beside the result's)
    step: float  #: us per step of BK inputs, 4 bits in groups of 128
    dx_step: float  #: the same of the gradient's tile, whose columns of W are the inputs here


#: By rows of x per tile.
TILES = {
    16: Tile(12, 0.35, 0.37),
    32: Tile(12, 0.36, 0.38),
    64: Tile(12, 0.38, 0.42),
    128: Tile(8, 0.49, 0.55),
    256: Tile(4, 0.72, 0.92),
}
#: What it costs that programs share tiles: us for any; for each row of x of a part's sums that all multiprocessors
#: write, and that the last to come reads.
SHARING, WRITING, READING = 2.5, 0.0164, 0.0047
#: Most parts of equal size that tiles are cut into.
MOST_PARTS = 8

#: Up to so many rows the kernels without shared memory and `affine_gemm`, ... were faster.
LEAST_ROWS = 16
#: Weights of fewer values were not measured.
LEAST = 1 << 24
#: Up to so many rows the alternative is a fused kernel, behind it BLAS on the dequantized weight.
FUSED_ROWS = 128
#: Most rows that were measured forward. (Dequantizing costs the same for any number, and weighs less and less.)
MOST_ROWS = 4096
#: Time of dequantizing W over that of one wave of tiles of 256 rows is N over this number, whatever K is.
DEQUANTIZED_PER_WAVE = 12300
#: Bytes and operations that BLAS on the dequantized weight does in a us, and us that a small product takes besides.
BLAS_OPERATIONS, BLAS_BYTES, BLAS_LEAST = 7.2e8, 2.9e6, 4.0
#: Of gradients: us of dequantizing a value of 4 bits; us that slices of W cost, from how many rows on.
DEQUANTIZING, SLICING, SLICED_ROWS = 0.93e-6, 14.0, tuning.BACKWARD_SLICED_ROWS
#: Values of W, and of dy, from which on the L2 cache holds less and less of what several tiles read.
LARGE, LARGE_GRADIENT = 1 << 27, 1 << 25


class Costs(NamedTuple):
    """Of a gradient with some weight, over 4 bits in groups of 128 as `TILES` and DEQUANTIZING have them."""

    step: float  #: of tiles of 256 rows
    narrow: float  #: of tiles of fewer
    large: float  #: more for a weight of LARGE values, and for a gradient of more than LARGE_GRADIENT
    dequantizing: float


class Plan(NamedTuple):
    """A product's tiles, and how they are given out."""

    rows: int  #: of x per tile
    whole: int  #: tiles that programs take one by one
    sharers: int  #: programs that share the steps of the others evenly
    programs: int  #: at most one for each multiprocessor
    us: float  #: that all of it takes, with 4 bits in groups of 128


def share(
    m: int, n: int, k: int, units: int, rows: int, whole: int, sharers: int, gradient: bool = False
) -> Plan:
    """The plan with tiles of `rows` rows of x, of which `units` programs take `whole` one by one and `sharers` of them
    (no more than have a turn each) share the rest."""
    tiles, turns = cdiv(n, BN) * cdiv(m, rows), cdiv(k, 2 * BK)
    turn = 2 * (TILES[rows].dx_step if gradient else TILES[rows].step)
    left = tiles - whole
    programs = min(units, max(tiles, sharers))
    if left == 0:
        return Plan(rows, tiles, 1, programs, cdiv(tiles, programs) * turns * turn)
    sharers = min(sharers, left * turns)
    us = (cdiv(whole, programs) * turns + cdiv(left * turns, sharers)) * turn
    if left % sharers:
        unequal = sharers % left > 0
        most = cdiv(sharers, left) + unequal
        # Parts of unequal size: a program has the end of one tile and the beginning of another.
        us += SHARING + (1 + unequal) * rows * (WRITING + READING * most) * sharers / units
    return Plan(rows, whole, sharers, programs, us)


@lru_cache(maxsize=4096)
def plan(m: int, n: int, k: int, units: int, gradient: bool = False) -> Plan:
    """The tiles, and how programs share those of the last wave, that take the least time.

    A wave that is 40 % full takes as long as a full one; shared by all, its tiles take 40 % of that and the time to
    add up their sums: least where tiles are cut into parts of equal size. Tiles of half the rows fill waves better,
    and decode W twice as often.
    """
    most = next((rows for rows in TILES if rows >= m), max(TILES))
    plans = []
    for rows in TILES:
        if rows in (most // 2, most):
            tiles = cdiv(n, BN) * cdiv(m, rows)
            plans += [share(m, n, k, units, rows, *way, gradient) for way in ways(tiles, units)]
    return min(plans, key=lambda p: p.us)


def ways(tiles: int, units: int) -> list[tuple[int, int]]:
    """(whole tiles, sharers of the rest) to choose from: nobody, all, or equal parts of a tile."""
    whole = tiles // units * units
    left = tiles - whole
    if left == 0:
        return [(tiles, 1)]
    return [(tiles, 1), (whole, units)] + [
        (whole, left * parts) for parts in range(2, MOST_PARTS + 1) if left * parts <= units
    ]


def choose(m: int, n: int, k: int, cost: float, units: int) -> Plan | None:
    """The plan for `m` rows of x and `[n, k]` of W, or None where another route takes less time.

    `cost`: what a step costs over one of 4 bits in groups of 128. Beyond FUSED_ROWS the other route is BLAS, which
    takes the same time for a full tile, within 5 %. What is lost here is the rest of the last wave of tiles; what is
    lost there is the time of dequantizing W.
    """
    if not LEAST_ROWS < m <= MOST_ROWS or units == 0:
        return None
    chosen = plan(m, n, k, units)
    if m <= FUSED_ROWS:
        return chosen if n * k >= LEAST else None
    wave = cdiv(k, 2 * BK) * 2 * TILES[256].step
    blas = max(m * n / (256 * BN * units) * wave, 2 * n * k / BLAS_BYTES + BLAS_LEAST)
    return chosen if chosen.us * cost < blas + n / DEQUANTIZED_PER_WAVE * wave else None


def choose_gradient(m: int, n: int, k: int, costs: Costs, units: int) -> Plan | None:
    """The plan for `m` rows of dy and `[n, k]` of W, or None where W, or a slice of it at a time, by BLAS is faster."""
    if m <= LEAST_ROWS or units == 0 or (n * k < LEAST and m < SLICED_ROWS):
        return None
    chosen = plan(m, k, n, units, gradient=True)
    if m <= FUSED_ROWS:
        return chosen
    step = costs.step if chosen.rows == max(TILES) else costs.narrow
    step *= costs.large ** ((n * k >= LARGE) + (m * n > LARGE_GRADIENT))
    blas = max(2 * m * n * k / BLAS_OPERATIONS, 2 * n * k / BLAS_BYTES + BLAS_LEAST)
    other = blas + n * k * DEQUANTIZING * costs.dequantizing + (SLICING if m >= SLICED_ROWS else 0)
    return chosen if chosen.us * step < other else None
