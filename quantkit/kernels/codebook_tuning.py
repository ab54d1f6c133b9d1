"""Thresholds and tile shapes of the codebook kernels: data, measured (docs/benchmarks/kernels-h200.md)."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.kernels import tuned


@dataclass(frozen=True)
class Config:
    """Tile of a fused product: rows BN of W, columns BM of x.T, inputs BK per slice, KS slices per step.

    More than one slice runs `codebook_gemm_kernel`, one slice `codebook_gemm_wide_kernel`. `inputs` is cut to
    the block. With the table in shared memory a tile's own share must exceed 48 KB (see `codebook.launch_gemm`):
    `stages` sees to that, and a test holds every line to it.
    """

    rows: int
    columns: int
    inputs: int
    slices: int
    split: int = 1
    stages: int = 4
    warps: int = 4


#: Largest M for which the fused kernels beat dequantizing and calling BLAS.
FUSED_ROWS = 128
#: From this N on, tiles of 64 or 128 rows give every multiprocessor of a large chip work.
TALL = 8192

#: (largest M, tile for N < TALL, tile for N >= TALL)
CONFIGS: list[tuple[int, Config, Config]] = [
    (1, Config(32, 8, 64, 16, warps=8), Config(64, 8, 64, 8)),
    (8, Config(32, 8, 64, 8, warps=8), Config(32, 8, 64, 8)),
    (16, Config(32, 16, 64, 8, stages=3), Config(32, 16, 64, 8, stages=3)),
    (32, Config(64, 32, 64, 4, split=2, stages=3), Config(64, 32, 64, 4, stages=3)),
    (64, Config(64, 64, 64, 1, split=4, stages=6), Config(128, 64, 64, 1, stages=5)),
    (1 << 30, Config(64, 128, 64, 1, split=4), Config(128, 128, 64, 1, warps=8)),
]

#: For chips whose blocks take less shared memory (sm_75, sm_86, sm_89, sm_120, AMD): sized, not timed.
SMALL: list[tuple[int, Config]] = [
    (16, Config(32, 16, 64, 2, stages=2)),
    (1 << 30, Config(64, 64, 64, 1, stages=2)),
]


def config(m: int, n: int, large: bool = True, k: int = 0) -> Config:
    """Tile for `x [m, K]` times `W [n, K]`; `large`: may a block take 130 KB of shared memory and more?"""
    found = tuned.find("codebook", 4, m, n, k, Config)
    if found is not None:
        return found
    if not large:
        return next(config for most, config in SMALL if m <= most)
    _, low, tall = next(line for line in CONFIGS if m <= line[0])
    return low if n < TALL else tall
