"""Tiles of `few_rows_kernel`, by measurement."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.kernels.launch_weight import Kind


@dataclass(frozen=True)
class FewRowsConfig:
    """Tile of `few_rows_kernel`: `steps` warps side by side along K, each with `slices` times four units of `unit`
    inputs at a time; `tiles` times 16 / `slices` rows of W at a time. 64 inputs in a unit are for three bits. `blocks`
    (1 or 2) times eight columns. `shared`: `resident` programs a multiprocessor share the tiles, else each has one."""

    steps: int
    tiles: int
    unit: int = 32
    slices: int = 1
    blocks: int = 1
    shared: bool = True

    def resident(self, kind: Kind, tables: int) -> int:
        """Programs for each multiprocessor: as many as its registers take, and `tables` of values its memory. (Of 64
        rows of W with 64 inputs in a unit fewer fit; that others follow them was faster.)"""
        fit = (12 if self.registers == LARGE else 16) // self.steps
        return min(fit, tables) if kind == "codebook" else fit

    @property
    def registers(self) -> int | None:
        """Most registers of a thread; None: the compiler's choice."""
        sums = self.tiles * self.blocks
        return SMALL if sums <= 2 else LARGE if self.blocks == 2 else None

    def columns(self, group: int) -> int | None:
        """Columns of a slice, one for each of its groups (0: one group per row); None where they do not fit."""
        inputs = 4 * self.unit
        columns = inputs // group if 0 < group < inputs else 1
        fits = columns * group == inputs or group % inputs == 0
        return columns if fits and columns <= 4 else None


def _t(steps: int, tiles: int, slices: int = 1, blocks: int = 1, unit: int = 32) -> FewRowsConfig:
    return FewRowsConfig(steps, tiles, unit, slices, blocks)


def _apart(steps: int, slices: int) -> FewRowsConfig:
    return FewRowsConfig(steps, 2, slices=slices, shared=False)


_ANY = 1 << 31
_SMALL = [_t(8, 1, 2), _t(8, 1), _t(8, 1, blocks=2)]
#: (kind, are groups shorter than 128) -> (largest N, largest K, tiles), of which the first that fits x and the groups
#: is taken: for one row of x, for two, for three and four, for five to eight, for more; where there is none, the
#: kernels of more rows are as fast. By measurement (docs/benchmarks/kernels-h100.md).
CONFIGS: dict[tuple[Kind, bool], list[tuple[int, int, list[FewRowsConfig]]]] = {
    ("codebook", True): [
        (2048, _ANY, _SMALL),
        (4096, 4096, [_t(4, 1, 2), _t(8, 1), _t(8, 1, blocks=2)]),
        (4096, _ANY, [_t(4, 2, 4), _t(8, 2, 2), _t(8, 1), _t(8, 1, blocks=2)]),
        (6144, _ANY, [_t(2, 2, 4), _t(4, 2, 2), _t(4, 1), _t(4, 1, blocks=2)]),
        (8192, _ANY, [_t(4, 2, 2), _t(8, 2)]),
        (14336, _ANY, [_t(4, 2, 4), _t(4, 2, 2), _t(4, 2), _t(4, 2, blocks=2)]),
        (16384, _ANY, [_t(4, 2, 2), _t(4, 2), _t(4, 2, blocks=2)]),
        (_ANY, _ANY, [_t(4, 2, 4), _t(4, 2, 2), _t(4, 2), _t(4, 2, blocks=2)]),
    ],
    ("affine4", True): [
        (2048, _ANY, _SMALL),
        (4096, 4096, [_t(4, 2, 4), _t(4, 1, 2), _t(8, 1), _t(8, 1, blocks=2)]),
        (4096, _ANY, [_t(4, 2, 4), _t(8, 2, 2), _t(8, 1), _t(8, 1, blocks=2)]),
        (8192, _ANY, [_t(2, 2, 4), _t(4, 2, 2), _t(8, 2)]),
        (12288, _ANY, [_t(4, 2, 4), _t(2, 2, 2), _t(4, 2), _t(4, 2, blocks=2)]),
        (16384, _ANY, [_t(2, 2, 2), _t(4, 2), _t(2, 2, blocks=2)]),
        (_ANY, _ANY, [_t(4, 2, 4), _t(8, 2, 2), _t(4, 2)]),
    ],
    ("affine4", False): [
        (2048, _ANY, [_t(2, 2, 8), _t(4, 2, 4), _t(8, 1, 2), _t(8, 1, 2, blocks=2), _t(8, 1, blocks=2)]),
        (4096, _ANY, [_t(2, 2, 8), _t(4, 2, 4), _t(8, 2, 2)]),
        (6144, _ANY, [_t(2, 2, 4), _t(4, 2, 2)]),
        (8192, _ANY, [_t(2, 2, 4), _t(4, 2, 2), _t(8, 2)]),
        (12288, _ANY, [_t(2, 2, 8), _t(4, 2, 4), _t(2, 2, 2), _t(4, 2)]),
        (16384, _ANY, [_t(2, 2, 4), _t(2, 2, 2), _t(4, 2)]),
        (_ANY, _ANY, [_t(2, 2, 8), _t(4, 2, 4), _t(4, 2, 2), _t(4, 2)]),
    ],
    ("affine3", False): [
        (2048, _ANY, [_t(2, 2, 8), _t(4, 2, 4), _t(8, 1, 2), _t(8, 1, 2, blocks=2), _t(8, 1, blocks=2)]),
        (4096, _ANY, [_t(2, 2, 8), _t(4, 2, 4), _t(8, 2, 2), _t(8, 1), _t(8, 1, blocks=2)]),
        (6144, _ANY, [_t(2, 2, 4), _t(4, 2, 2), _t(4, 1), _t(4, 1, blocks=2)]),
        (8192, 4096, [_t(2, 2, 4), _t(4, 2, 2), _t(4, 2), _t(4, 2, blocks=2)]),
        (8192, 8192, [_t(2, 2, 4), _t(4, 2, 2), _t(8, 2), _t(4, 2, blocks=2)]),
        (8192, _ANY, [_t(2, 2, 4, unit=64), _t(2, 2, 4), _t(4, 2, 2), _t(8, 2), _t(4, 2, blocks=2)]),
        (12288, _ANY, [_t(2, 2, 8), _t(2, 2, 4), _t(2, 2, 2), _t(4, 2), _t(4, 2, blocks=2)]),
        (13824, _ANY, [_t(2, 2, 4), _t(2, 2, 2), _t(4, 2), _t(2, 2, blocks=2)]),
        (14336, _ANY, [_t(2, 2, 8), _apart(2, 4), _apart(4, 2), _t(4, 2), _t(2, 2, blocks=2)]),
        (16384, _ANY, [_t(2, 2, 4), _t(2, 2, 2), _t(4, 2), _t(2, 2, blocks=2)]),
        (_ANY, 4096, [_t(2, 2, 8), _t(2, 2, 4), _t(4, 2, 2), _t(4, 2), _t(4, 2, blocks=2)]),
        (_ANY, _ANY, [_t(2, 4, 4, unit=64), _apart(2, 4), _apart(2, 2), _t(4, 2), _t(4, 2, blocks=2)]),
    ],
}
CONFIGS["codebook", False] = CONFIGS["codebook", True]
CONFIGS["affine3", True] = CONFIGS["affine3", False]
#: Registers of a thread where two tiles' sums or less have room: four warps a scheduler; else three. Said to the
#: compiler it also orders instructions for so many, which is faster by itself.
SMALL, LARGE = 128, 168
#: Tables of values (32 KB, and sums) that a multiprocessor's memory holds, by compute capability; of others: two.
TABLES = {80: 4, 87: 4, 90: 6, 100: 6, 103: 6}
#: Columns of an mma: rows of x times slices times the groups of a slice. Of a tile: twice as many at most.
COLUMNS = 8


def tiles(kind: Kind, n: int, k: int, group: int) -> list[FewRowsConfig]:
    """Tiles for a weight `[n, k]` with groups of `group` (0: one a row), the fastest first."""
    return next(found for rows, inputs, found in CONFIGS[kind, 0 < group < 128] if n <= rows and k <= inputs)
