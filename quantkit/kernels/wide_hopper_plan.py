"""Which tiles `wide_hopper_kernel` multiplies, in how many parts of K, and where it is the faster route.

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
    16: Tile(12, 0.32, 0.37),
    32: Tile(12, 0.34, 0.38),
    64: Tile(12, 0.39, 0.42),
    128: Tile(8, 0.49, 0.55),
    256: Tile(4, 0.72, 0.92),
}
#: Most parts of K that a tile of the last wave is cut into, and what that costs: us for the second pass, for each
#: part that a multiprocessor begins, and for a row of a part's sums.
MOST_PARTS = 8
SECOND_PASS, PER_ROUND, PER_ROW = 3.0, 1.5, 0.0002

#: Up to so many rows the kernels without shared memory and `affine_gemm`, ... were faster.
LEAST_ROWS = 16
#: Up to ROWS the others were faster for weights of fewer values than FEW (4096 x 4096 against 6144 x 4096); of fewer
#: than LEAST none was measured.
ROWS, FEW, LEAST = 32, 3 << 23, 1 << 24
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


class Plan(NamedTuple):
    """A product's tiles, and how they are given out."""

    rows: int  #: of x per tile
    whole: int  #: tiles that run through all of K; those behind them are cut
    parts: int  #: into so many parts
    each: int  #: of so many steps of BK inputs
    units: int  #: multiprocessors
    us: float  #: that all of it takes, with 4 bits in groups of 128


def cut(m: int, n: int, k: int, units: int, rows: int, parts: int, gradient: bool = False) -> Plan:
    """The plan with tiles of `rows` rows of x, those of the last wave in (at most) `parts` parts of K."""
    tiles = cdiv(n, BN) * cdiv(m, rows)
    left, turns = tiles % units, cdiv(k, 2 * BK)
    whole, each = tiles - left, cdiv(turns, parts)
    parts = cdiv(turns, each)
    step = TILES[rows].dx_step if gradient else TILES[rows].step
    if not left or parts == 1:
        return Plan(rows, tiles, 1, 2 * turns, units, cdiv(tiles, units) * 2 * turns * step)
    rounds = cdiv(left * parts, units)
    cutting = SECOND_PASS + PER_ROUND * rounds + PER_ROW * rows * left * parts
    us = (whole // units * turns + rounds * each) * 2 * step + cutting
    return Plan(rows, whole, parts, 2 * each, units, us)


@lru_cache(maxsize=4096)
def plan(m: int, n: int, k: int, units: int, gradient: bool = False) -> Plan:
    """The tiles, and the parts that those of the last wave are cut into, that take the least time.

    A wave that is 40 % full takes as long as a full one; cut into two parts of K each, its tiles take half of that and
    a second pass over their sums. Tiles of half the rows fill waves better, and decode W twice as often.
    """
    most = next((rows for rows in TILES if rows >= m), max(TILES))
    candidates = (
        cut(m, n, k, units, rows, parts, gradient)
        for rows in TILES
        if rows in (most // 2, most)
        for parts in range(1, MOST_PARTS + 1)
    )
    return min(candidates, key=lambda p: p.us)


def choose(m: int, n: int, k: int, cost: float, units: int, slow: bool = False) -> Plan | None:
    """The plan for `m` rows of x and `[n, k]` of W, or None where another route takes less time.

    `cost`: what a step costs over one of 4 bits in groups of 128. `slow`: do the other fused kernels take twice as long
    as for 4 bits? Beyond FUSED_ROWS the other route is BLAS, which takes the same time for a full tile, within 5 %.
    What is lost here is the rest of the last wave of tiles; what is lost there is the time of dequantizing W.
    """
    if not LEAST_ROWS < m <= MOST_ROWS or units == 0:
        return None
    chosen = plan(m, n, k, units)
    if m <= FUSED_ROWS:
        return chosen if n * k >= (FEW if m <= ROWS and not slow else LEAST) else None
    wave = cdiv(k, 2 * BK) * 2 * TILES[256].step
    blas = max(m * n / (256 * BN * units) * wave, 2 * n * k / BLAS_BYTES + BLAS_LEAST)
    return chosen if chosen.us * cost < blas + n / DEQUANTIZED_PER_WAVE * wave else None


def choose_gradient(m: int, n: int, k: int, cost: float, dequantizing: float, units: int) -> Plan | None:
    """The plan for `m` rows of dy and `[n, k]` of W, or None where W, or a slice of it at a time, by BLAS is faster.

    `cost`: what a step costs over one of 4 bits in groups of 128; `dequantizing`: the same of dequantizing W.
    """
    if m <= LEAST_ROWS or units == 0 or (n * k < LEAST and m < SLICED_ROWS):
        return None
    chosen = plan(m, k, n, units, gradient=True)
    if m <= FUSED_ROWS:
        return chosen
    blas = max(2 * m * n * k / BLAS_OPERATIONS, 2 * n * k / BLAS_BYTES + BLAS_LEAST)
    other = blas + n * k * DEQUANTIZING * dequantizing + (SLICING if m >= SLICED_ROWS else 0)
    return chosen if chosen.us * cost < other else None
