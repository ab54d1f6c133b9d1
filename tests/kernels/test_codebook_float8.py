"""Codebook and float8 Triton kernels: in the interpreter against float64, and compiled without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_support import compiled, interpreted

pytest.importorskip("triton")


@pytest.mark.parametrize("family", ["codebook", "float8", "few-rows"])
def test_interpreted_kernels_match_float64(family: str) -> None:
    errors = interpreted("codebook_float8_cases.py", family)
    assert len(errors) > 40
    bad = {case: e for case, e in errors.items() if not e <= 1}
    assert not bad, bad


POINTERS = {
    "codes_ptr": "*u8", "scale_ptr": "*fp32", "x_scale_ptr": "*fp32", "lut_ptr": "*fp32",
}  # fmt: skip
#: chip -> bytes of shared memory that a block may take
LIMITS: dict[int | str, int] = {
    75: 65536, 80: 166912, 89: 101376, 90: 232448, 100: 232448, "gfx90a": 65536, "gfx942": 65536, "gfx1100": 65536,
}  # fmt: skip


def gemm(family: str, chip: int | str, m: int, config: Any, table: bool) -> Any:
    """One fused kernel compiled as `launch_gemm` would launch it."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    from quantkit.kernels import codebook_gemm, float8_gemm

    cuda = isinstance(chip, int)
    warp = 32 if cuda or str(chip).startswith("gfx11") else 64
    target = GPUTarget("cuda", chip, 32) if cuda else GPUTarget("hip", chip, warp)
    half, dot = ("*bf16", tl.bfloat16) if chip != 75 and chip != "gfx1100" else ("*fp16", tl.float16)
    stages = config.stages if family == "float8" or table else 2
    constants: dict[str, Any] = {
        "BN": config.rows, "BM": config.columns, "BK": config.inputs, "SPLIT": config.split, "STAGES": stages,
        "EVEN_K": True, "EVEN_N": True, "HAS_BIAS": False, "DOT": dot,
    }  # fmt: skip
    if family == "codebook":
        module, prefix = codebook_gemm, "codebook_gemm"
        constants |= {"BLOCK": 64, "ROW_SCALES": True, "ASM": table, "THREADS": 32 * config.warps}
    else:
        module, prefix = float8_gemm, "float8_gemm"
        constants |= {"BLOCK_K": 128, "X_GROUP": -1, "ASM": cuda and chip != 75}
    kernel = getattr(module, prefix + ("_kernel" if config.slices > 1 else "_wide_kernel"))
    if config.slices > 1:
        constants |= {"KS": config.slices, "ONE_ROW": m == 1}
    out = "*fp32" if config.split > 1 else half
    types = {**POINTERS, "x_ptr": half, "bias_ptr": half, "out_ptr": out}
    return compiled(kernel, types, constants, target, num_warps=config.warps, num_stages=stages)


#: Static shared memory of the table, and what Triton raises a block's limit for.
TABLE, THRESHOLD = 32768, 49152


def shipped(family: str) -> list[tuple[int, Any]]:
    from quantkit.kernels import codebook_tuning, float8_tuning

    if family == "codebook":
        return list(dict.fromkeys(line for _, lines in codebook_tuning.CONFIGS for line in lines))
    return list(dict.fromkeys((m, config) for m, *pair in float8_tuning.CONFIGS for config in pair))


def fits_beside_table(shared: int) -> bool:
    """Does a tile's own share leave the block within 48 KB, or pass what makes Triton raise the limit?"""
    return shared <= THRESHOLD - TABLE or THRESHOLD < shared <= LIMITS[90] - TABLE


def test_table_kernel_compiles_and_fits() -> None:
    """Two shipped tiles with PTX: the table's 32 KB come on top of what Triton counts."""
    for m, config in shipped("codebook")[:2]:
        binary = gemm("codebook", 90, m, config, table=True)
        assert fits_beside_table(binary.metadata.shared), (m, config, binary.metadata.shared)
        assert "quantkit_pairs[8192]" in binary.asm["ptx"]


@pytest.mark.parametrize(("family", "chip"), [("codebook", 89), ("float8", 89), ("float8", "gfx942")])
def test_small_tiles_compile_and_fit(family: str, chip: int | str) -> None:
    from quantkit.kernels import codebook_tuning, float8_tuning

    module = {"codebook": codebook_tuning, "float8": float8_tuning}[family]
    for m, config in module.SMALL:
        assert gemm(family, chip, m, config, table=False).metadata.shared <= LIMITS[chip]


@pytest.mark.slow
@pytest.mark.parametrize("chip", list(LIMITS))
@pytest.mark.parametrize("family", ["codebook", "float8"])
def test_every_tile_compiles_and_fits(family: str, chip: int | str) -> None:
    from quantkit.kernels import codebook_tuning, float8_tuning

    large = chip in (80, 90, 100)
    module = {"codebook": codebook_tuning, "float8": float8_tuning}[family]
    for m, config in shipped(family) if large else module.SMALL:
        table = large and family == "codebook"
        shared = gemm(family, chip, m, config, table).metadata.shared
        assert shared <= LIMITS[chip] - (TABLE if table else 0), (m, config, shared)
        assert not table or fits_beside_table(shared), (m, config, shared)
