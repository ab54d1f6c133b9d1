"""Two to eight rows of x (`few_rows_kernel`): who is covered, and compiled code. Numbers: test_codebook_float8."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gluon_values import run_ptx
from kernel_support import compiled, longest_loop

pytest.importorskip("triton")

from quantkit.kernels import few_rows_asm, few_rows_launch, launch
from quantkit.kernels.gemv_launch import KINDS
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
    for m in (2, 3, 4):
        assert covers("codebook", m, 4096, 11008, 64)
        assert covers("affine4", m, 14336, 4096, 64)
    assert covers("affine3", 8, 4096, 14336, 128) and covers("affine3", 8, 4096, 4096, 0)
    assert covers("affine4", 2, 8192, 4096, 32)
    assert not covers("affine4", 2, 6144, 4096, 64), "as fast through affine_gemm"
    assert not covers("affine4", 3, 8192, 4096, 32), "four groups in a block leave columns for two rows"
    assert not covers("codebook", 5, 4096, 4096, 64)
    assert not covers("affine3", 9, 4096, 4096, 128)
    assert not covers("codebook", 1, 4096, 4096, 64) and not covers("affine3", 1, 4096, 4096, 128), (
        "gemv_kernel's"
    )
    assert covers("affine3", 1, 8192, 28672, 128)
    assert not covers("affine4", 4, 8192, 4096, 128), "as fast through affine_gemm"
    assert not covers("codebook", 2, 4104, 4096, 64), "rows left over"
    assert not covers("affine3", 2, 4096, 4224, 96), "blocks would cross groups"
    assert not covers("affine8", 2, 8192, 4096, 64) and not covers("float8", 1, 8192, 8192, 0), "no decoding"
    for m, unit in ((2, 64), (4, 64), (5, 32), (8, 32)):
        tile = few_rows_launch.tile_for(
            torch.empty(m, 4096, dtype=torch.float16, device="meta"),
            weight("affine3", 8192, 4096, 128, 1536),
        )
        assert tile is not None and tile.unit == unit, "wide units make two columns a row"
    assert not covers("codebook", 2, 4096, 4160, 64), (
        "the last block has one group of two: scales beyond the row"
    )
    assert not covers("codebook", 2, 4096, 4096, 64, dtype=torch.float32)
    assert not covers("codebook", 2, 4096, 4096, 64, beside=4), (
        "rows of x at addresses that 16 does not divide"
    )
    assert covers("codebook", 2, 4096, 4096, 64, beside=8)


def test_only_with_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    for target in (("hip", 0), ("cuda", 75), ("interpreter", 0)):
        monkeypatch.setattr(launch, "target", lambda target=target: target)
        assert not covers("codebook", 2, 4096, 4096, 64)


@pytest.mark.parametrize("chip", [80, 90, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [*KINDS, "affine3 of all rows"])
def test_compiled_loop(kind: str, chip: int) -> None:
    """No barrier inside the loop, one product for each 8 codes of a thread, and lanes where the products want them."""
    from triton.backends.compiler import GPUTarget

    from quantkit.kernels.few_rows import few_rows_kernel

    kind, _, all_rows = kind.partition(" of ")  # the tile that takes eight rows in groups of 128
    tile = few_rows_launch.tiles(kind, 8192)[-1 if all_rows else 0]
    constants = {
        "KIND": KINDS[kind], "KS": tile.steps, "R": tile.tiles, "H": tile.blocks, "U": tile.unit,
        "GROUP": 64, "EVEN_K": True, "HAS_BIAS": False, "ASM": True, "THREADS": 32 * tile.steps,
    }  # fmt: skip
    types = dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), "*bf16")
    types |= {"codes_ptr": "*u8", "scale_ptr": "*fp32", "zero_ptr": "*u8", "lut_ptr": "*fp32"}
    binary = compiled(
        few_rows_kernel, types, constants, GPUTarget("cuda", chip, 32), num_warps=tile.steps, num_stages=1
    )
    body = longest_loop(binary.asm["ptx"])
    each = tile.unit // 4 * tile.blocks
    sums = 0 if kind == "codebook" else each
    assert body.count("mma.sync.aligned.m16n8k16") == each * tile.tiles + sums
    assert "bar.sync" not in body and "barrier" not in body
    lanes = f"threadsPerWarp = [1, 8, 4], warpsPerCTA = [{tile.steps}, 1, 1], order = [2, 1, 0]"
    layouts = [line for line in binary.asm["ttgir"].splitlines() if line.startswith("#blocked = ")]
    assert len(layouts) == 1 and "sizePerThread = [1, 1, 1]" in layouts[0] and lanes in layouts[0]
    products = [line for line in binary.asm["ttgir"].splitlines() if "mma.sync" in line]
    assert products and all("#blocked>" in line for line in products)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_codes_in_registers(dtype: str) -> None:
    """The PTX that makes operands of codes: each half is its code plus the offset that the sums' operand has."""
    codes = torch.randint(0, 8, (50, 32))
    low = (codes & 3) << 2 * (torch.arange(32) % 16)
    words = [low[:, :16].sum(1), low[:, 16:].sum(1), ((codes >> 2) << torch.arange(32)).sum(1)]
    text = " ".join(few_rows_asm._three_bits("$16", "$17", "$18", "$", dtype))
    three = run_ptx(text, [w.numpy().astype(np.uint32) for w in words], 16)
    pairs = [(j, j + 16, few_rows_asm._THREE_AT[j // 4]) for j in range(16)]
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
