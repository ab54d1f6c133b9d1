"""One to sixteen rows of x (`few_rows_kernel`): who is covered, and compiled code. Numbers: test_codebook_float8."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gluon_values import run_ptx
from kernel_support import compiled, longest_loop
from sass_support import disassembled

pytest.importorskip("triton")

from quantkit.kernels import few_rows_asm, few_rows_launch, launch
from quantkit.kernels.few_rows_launch import KINDS
from quantkit.kernels.few_rows_tuning import CONFIGS, FewRowsConfig
from quantkit.kernels.launch_weight import Kind, LaunchWeight


@pytest.fixture
def ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "target", lambda: ("cuda", 90))


def weight(kind: Kind, n: int, k: int, group: int, row: int) -> LaunchWeight:
    codes = torch.empty((n * k // 2,) if kind == "codebook" else (n, row), dtype=torch.uint8, device="meta")
    return LaunchWeight(kind, n, group, codes, torch.empty(0, device="meta"))


def covers(kind: Kind, m: int, n: int, k: int, group: int, **more: Any) -> bool:
    x = torch.empty(m, k + more.get("beside", 0), dtype=more.get("dtype", torch.bfloat16), device="meta")
    return few_rows_launch.tile_for(x[:, :k], weight(kind, n, k, group, k // 2)) is not None


@pytest.mark.usefixtures("ptx")
def test_what_is_covered() -> None:
    for m in (1, 2, 3, 4):
        assert covers("codebook", m, 4096, 11008, 64)
        assert covers("affine4", m, 14336, 4096, 64)
        assert covers("affine4", m, 4096, 14336, 128) and covers("affine4", m, 8192, 4096, 0)
    assert covers("affine3", 8, 4096, 14336, 128) and covers("affine3", 8, 4096, 4096, 0)
    assert covers("affine4", 2, 8192, 4096, 32) and covers("affine4", 1, 4096, 4096, 64)
    assert covers("affine4", 8, 14336, 4096, 128) and not covers("affine4", 5, 28672, 4096, 64)
    assert covers("codebook", 8, 14336, 4096, 64) and covers("affine4", 8, 4096, 4096, 64), "two products"
    assert covers("affine3", 16, 4096, 14336, 128) and not covers("affine3", 17, 4096, 4096, 128)
    assert not covers("codebook", 9, 4096, 4096, 64) and not covers("affine3", 9, 4096, 4096, 64)
    assert covers("affine4", 5, 8192, 4096, 128) and covers("affine4", 16, 2048, 4096, 128)
    assert not covers("affine4", 5, 6144, 4096, 128), "as fast through affine_gemm"
    assert not covers("affine4", 3, 8192, 4096, 32), "four groups in a slice leave columns for two rows"
    assert not covers("codebook", 5, 8192, 4096, 64)
    assert not covers("codebook", 2, 4104, 4096, 64) and not covers("codebook", 1, 4095, 4096, 64), (
        "rows left over"
    )
    assert not covers("affine3", 2, 4096, 4224, 96), "slices would cross groups"
    assert not covers("codebook", 1, 4096, 4112, 16), "units of 32 codes would cross a block"
    assert not covers("affine4", 1, 8192, 4100, 0)
    assert not covers("affine8", 2, 8192, 4096, 64) and not covers("float8", 1, 8192, 8192, 0), "no decoding"
    assert not covers("codebook", 2, 4096, 4160, 64), (
        "the last slice has one group of two: scales beyond the row"
    )
    assert not covers("codebook", 2, 4096, 4096, 64, dtype=torch.float32)
    assert not covers("codebook", 2, 4096, 4096, 64, beside=4), (
        "rows of x at addresses that 16 does not divide"
    )
    assert covers("codebook", 2, 4096, 4096, 64, beside=8)


@pytest.mark.usefixtures("ptx")
@pytest.mark.parametrize("m", range(1, 17))
@pytest.mark.parametrize("kind", list(KINDS))
def test_tiles_keep_to_what_the_kernel_takes(kind: Kind, m: int) -> None:
    """As many columns as the tile's slices allow, and never more than an mma has."""
    for n, k, group in (
        (4096, 4096, 64),
        (6144, 4096, 128),
        (14336, 4096, 32),
        (28672, 8192, 256),
        (10240, 8192, 0),
    ):
        x = torch.empty(m, k, dtype=torch.bfloat16, device="meta")
        tile = few_rows_launch.tile_for(x, weight(kind, n, k, group, k // 2))
        if tile is None:
            continue
        columns = max(1, 4 * tile.unit // group) if group else 1
        assert m * tile.slices * columns <= 8 * tile.blocks and n * tile.slices % (16 * tile.tiles) == 0
        assert tile.unit == 32 or kind == "affine3"


@pytest.mark.usefixtures("ptx")
def test_rows_of_codes_begin_at_aligned_addresses() -> None:
    x = torch.empty(1, 4096, dtype=torch.float16, device="meta")
    wide = torch.empty(8192, 2056, dtype=torch.uint8, device="meta")
    narrow = LaunchWeight("affine4", 8192, 64, wide[:, :2048].contiguous(), torch.empty(0, device="meta"))
    assert few_rows_launch.tile_for(x, narrow)
    assert few_rows_launch.tile_for(x, narrow._replace(codes=wide[:, :2048])) is None


def test_programs_that_share_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows_launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(launch, "target", lambda: ("cuda", 90))
    device = torch.device("cuda", 7)
    for tile, kind, each in (
        (FewRowsConfig(4, 2, slices=4), "affine4", 4),
        (FewRowsConfig(8, 1, slices=2), "codebook", 2),
        (FewRowsConfig(2, 2, slices=4), "affine4", 8),
        (FewRowsConfig(2, 2, slices=4), "codebook", 6),  # tables
        (FewRowsConfig(4, 2, blocks=2), "affine3", 3),  # registers
    ):
        assert few_rows_launch.programs(tile, kind, 3584, device) == 132 * each
        assert few_rows_launch.programs(tile, kind, 100, device) == 100
    assert few_rows_launch.programs(FewRowsConfig(4, 2, shared=False), "affine4", 3584, device) == 3584
    monkeypatch.setattr(launch, "target", lambda: ("cuda", 89))
    assert few_rows_launch.programs(FewRowsConfig(4, 2), "codebook", 3584, device) == 132 * 2
    monkeypatch.setattr(few_rows_launch, "multiprocessors", lambda device: 0)
    assert few_rows_launch.programs(FewRowsConfig(4, 2), "affine4", 3584, device) == 3584, "unknown"


def test_two_warps_on_a_table_only_where_six_tables_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 4096, dtype=torch.bfloat16, device="meta")
    for arch, steps in ((90, 2), (100, 2), (80, 4), (89, 4), (120, 4)):
        monkeypatch.setattr(launch, "target", lambda arch=arch: ("cuda", arch))
        tile = few_rows_launch.tile_for(x, weight("codebook", 6144, 4096, 64, 2048))
        assert tile is not None and tile.steps == steps, arch


def test_only_with_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    for target in (("hip", 0), ("cuda", 75), ("interpreter", 0)):
        monkeypatch.setattr(launch, "target", lambda target=target: target)
        assert not covers("codebook", 2, 4096, 4096, 64)


def shipped() -> list[tuple[Kind, bool, FewRowsConfig]]:
    """Every tile of the table, for groups of 64 and of 128, once."""
    found = {
        (kind, short, replace(tile, shared=True))
        for (kind, short), rows in CONFIGS.items()
        for *_, several in rows
        for tile in several
        if not (kind == "codebook" and not short)
    }
    return sorted(found, key=str)


FIRST = [
    ("affine3", False, FewRowsConfig(2, 4, 64, 4)),
    ("affine3", False, FewRowsConfig(2, 2, slices=8)),
    ("affine4", False, FewRowsConfig(4, 2, slices=4)),
    ("affine4", True, FewRowsConfig(8, 2, slices=2)),
    ("codebook", True, FewRowsConfig(4, 2, slices=4)),
    ("codebook", True, FewRowsConfig(8, 1, blocks=2)),
    ("affine3", False, FewRowsConfig(4, 2, blocks=2)),
]


def test_the_table_has_these_tiles() -> None:
    assert set(FIRST) <= set(shipped())


def build(kind: Kind, short: bool, tile: FewRowsConfig, chip: int) -> Any:
    """The kernel's binary, for groups of 64 if `short`, else of 128."""
    from triton.backends.compiler import GPUTarget

    from quantkit.kernels.few_rows import few_rows_kernel

    constants = {
        "KIND": KINDS[kind], "KS": tile.steps, "S": tile.slices, "R": tile.tiles, "U": tile.unit,
        "GROUP": 64 if short else 128, "EVEN_K": True, "HAS_BIAS": False, "ASM": True, "THREADS": 32 * tile.steps,
        "B": tile.blocks,
    }  # fmt: skip
    types = dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), "*bf16")
    types |= {"codes_ptr": "*u8", "scale_ptr": "*fp32", "zero_ptr": "*u8", "lut_ptr": "*fp32"}
    return compiled(
        few_rows_kernel, types, constants, GPUTarget("cuda", chip, 32), num_warps=tile.steps, num_stages=1,
        maxnreg=tile.registers,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "short", "tile", "chip"),
    [(*case, chip) for case in FIRST for chip in (80, 90)]
    + [pytest.param(*case, 90, marks=pytest.mark.slow) for case in shipped() if case not in FIRST]
    + [pytest.param(*case, 100, marks=pytest.mark.slow) for case in FIRST],
)
def test_compiled_loop(kind: Kind, short: bool, tile: FewRowsConfig, chip: int) -> None:
    """One product for each 8 codes of a thread, lanes where the products want them, one barrier, where a tile ends."""
    from quantkit.kernels.aot import declared_shared

    binary = build(kind, short, tile, chip)
    ptx = binary.asm["ptx"]
    body = longest_loop(ptx)
    each = tile.unit // 4
    sums = 0 if kind == "codebook" else each
    assert body.count("mma.sync.aligned.m16n8k16") == tile.blocks * (each * tile.tiles + sums)
    before, _, end = body.partition("quantkit_sums")
    assert "bar.sync" not in before and "barrier" not in before, "nothing changes hands until a tile ends"
    assert end.count("bar.sync") == tile.blocks and "mma.sync" not in end
    assert binary.metadata.shared == 0, "no exchange of the compiler's own"
    assert declared_shared(ptx) <= 49152
    lanes = f"threadsPerWarp = [1, 8, 4], warpsPerCTA = [{tile.steps}, 1, 1], order = [2, 1, 0]"
    layouts = [line for line in binary.asm["ttgir"].splitlines() if line.startswith("#blocked = ")]
    assert len(layouts) == 1 and "sizePerThread = [1, 1, 1]" in layouts[0] and lanes in layouts[0]
    products = [line for line in binary.asm["ttgir"].splitlines() if "mma.sync" in line]
    assert products and all("#blocked>" in line for line in products)


@pytest.mark.parametrize(
    ("kind", "short", "instruction"),
    [("codebook", True, "LDS"), ("affine4", False, "LOP3"), ("affine3", False, "LOP3")],
)
def test_two_products_decode_once(kind: Kind, short: bool, instruction: str) -> None:
    """Look-ups, or what masks codes out, as often as for one product; sums of warps are read for each."""
    one, two = (
        [
            f" {line}"
            for line in disassembled(build(kind, short, FewRowsConfig(4, 2, blocks=blocks), 90).asm["cubin"])
        ]
        for blocks in (1, 2)
    )
    matrix, decoding = (
        [sum(name in line for line in lines) for lines in (one, two)] for name in (" HMMA", instruction)
    )
    assert matrix[1] == 2 * matrix[0]
    sums = 16 if instruction == "LDS" else 0  # four numbers of four warps
    assert decoding[1] - sums <= 1.1 * decoding[0]


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_codes_in_registers(dtype: str) -> None:
    """The PTX that makes operands of codes: each half is its code plus the offset that the sums' operand has."""
    codes = torch.randint(0, 8, (50, 32))
    low = (codes & 3) << 2 * (torch.arange(32) % 16)
    words = [low[:, :16].sum(1), low[:, 16:].sum(1), ((codes >> 2) << torch.arange(32)).sum(1)]
    text = " ".join(few_rows_asm._three_bits("$16", "$17", "$18", "$", dtype))
    three = run_ptx(text, [w.numpy().astype(np.uint32) for w in words], 16)
    pairs = [(j, j + 16, few_rows_asm._THREE_AT[dtype][j // 4]) for j in range(16)]
    check_halves(three, codes, pairs, dtype)
    codes = torch.randint(0, 16, (50, 8))
    word = (codes << 4 * torch.arange(8)).sum(1).numpy().astype(np.uint32)
    four = run_ptx(" ".join(few_rows_asm._four_bits("$4", "$", dtype)), [word], 4)
    check_halves(four, codes, [(i, i + 4, few_rows_asm._FOUR_AT[dtype]) for i in range(4)], dtype)


def check_halves(
    registers: list[np.ndarray], codes: torch.Tensor, pairs: list[tuple[int, int, int]], dtype: str
) -> None:
    kind = torch.bfloat16 if dtype == "bf16" else torch.float16
    for register, (i, j, at) in zip(registers, pairs, strict=True):
        halves = torch.from_numpy(register.view(np.int16).reshape(-1, 2)).view(kind).double()
        offset = np.array([few_rows_asm._offset(at, dtype)], np.uint32).view(np.int16)
        want = codes[:, [i, j]].double() + torch.from_numpy(offset).view(kind).double()
        assert torch.equal(halves, want)
