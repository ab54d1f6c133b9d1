"""Thresholds and tile shapes of the float8 kernels: data, measured (docs/benchmarks/kernels-h200.md)."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.kernels import tuned


@dataclass(frozen=True)
class Config:
    """Tile of a fused product: rows BN of W, columns BM of x.T, inputs BK per slice, KS slices per step."""

    rows: int
    columns: int
    inputs: int
    slices: int
    split: int = 1
    stages: int = 4
    warps: int = 4


#: Largest M for which the fused kernels beat dequantizing and calling BLAS.
FUSED_ROWS = 128
#: From this many rows on, rounded activations go through the chip's fp8 matrix unit.
NATIVE_ROWS = 64
#: From this many rows on, torch's scaled product takes over (`float8_scaled`), with scales per tensor or row of W.
#: The least M at which it was faster in all of four shapes (H100, scripts/check_scaled_gpu.py). None: never.
SCALED_ROWS: int | None = 128
#: The same with scales per 128 x 128 weights.
SCALED_BLOCK_ROWS: int | None = 128

#: From this N on, tiles of 64 rows give every multiprocessor of a large chip work without splitting K.
TALL = 8192

#: (largest M, tile for N < TALL, tile for N >= TALL)
CONFIGS: list[tuple[int, Config, Config]] = [
    (8, Config(16, 8, 128, 4), Config(16, 8, 128, 4)),
    (16, Config(32, 16, 128, 4, stages=3), Config(32, 16, 128, 4, stages=3)),
    (32, Config(64, 32, 128, 1, split=4), Config(64, 32, 64, 4, stages=3)),
    (64, Config(64, 64, 128, 1, split=4, stages=3), Config(64, 64, 128, 1)),
    (1 << 30, Config(64, 128, 128, 1, split=2, stages=3), Config(64, 128, 128, 1, stages=3)),
]

#: For chips whose blocks take less shared memory (sm_75, sm_86, sm_89, sm_120, AMD): sized, not timed.
SMALL: list[tuple[int, Config]] = [
    (16, Config(32, 16, 64, 2, stages=2)),
    (1 << 30, Config(64, 64, 64, 1, stages=2)),
]


def config(m: int, n: int, large: bool = True, k: int = 0) -> Config:
    """Tile for `x [m, K]` times `W [n, K]`; `large`: may a block take 130 KB of shared memory and more?"""
    found = tuned.find("float8", 8, m, n, k, Config)
    if found is not None:
        return found
    if not large:
        return next(config for most, config in SMALL if m <= most)
    _, low, tall = next(line for line in CONFIGS if m <= line[0])
    return low if n < TALL else tall
