"""Thresholds and tile shapes of the codebook kernels: data, measured (docs/benchmarks/kernels-h200.md)."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.kernels import tuned


@dataclass(frozen=True)
class Config:
    """Tile of a fused product: rows BN of W, columns BM of x.T, inputs BK per slice, KS slices per step.

    More than one slice runs `codebook_gemm_kernel`, one slice `codebook_gemm_wide_kernel`. `inputs` is at most
    four blocks. With the table in shared memory a tile's own share must be at most 16 KB or more than 48 KB
    (see `codebook.launch_gemm`): `stages` sees to that, and a test holds every line to it.
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

#: (largest N, lines of (largest M, tile)): the taller W, the fewer programs need to share a row of it.
CONFIGS: list[tuple[int, list[tuple[int, Config]]]] = [
    (
        8191,
        [
            (1, Config(16, 8, 64, 8, stages=3)),
            (8, Config(32, 8, 128, 4, stages=7)),
            (16, Config(32, 16, 128, 4)),
            (32, Config(32, 32, 128, 4, stages=3)),
            (64, Config(64, 64, 128, 1, split=4)),
            (1 << 30, Config(64, 128, 128, 1, split=2, stages=3)),
        ],
    ),
    (
        12288,
        [
            (1, Config(16, 8, 64, 8, stages=3)),
            (8, Config(64, 8, 64, 8)),
            (16, Config(32, 16, 64, 8, stages=3)),
            (32, Config(64, 32, 64, 4, stages=3)),
            (64, Config(64, 64, 128, 1, split=2)),
            (1 << 30, Config(64, 128, 64, 1)),
        ],
    ),
    (
        1 << 30,
        [
            (1, Config(32, 8, 64, 4, stages=3)),
            (8, Config(64, 8, 64, 8)),
            (16, Config(64, 16, 128, 4, stages=3)),
            (32, Config(64, 32, 64, 4, stages=3)),
            (64, Config(128, 64, 128, 1, warps=8)),
            (1 << 30, Config(64, 128, 64, 1)),
        ],
    ),
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
    lines = next(lines for most, lines in CONFIGS if n <= most)
    return next(config for most, config in lines if m <= most)
