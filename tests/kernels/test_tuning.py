"""Tile tables: what they hand out fits the encodings, for any shape."""

from __future__ import annotations

import pytest
import torch

from quantkit.kernels import sliced, tuning

SHAPES = [(1, 1), (63, 1000), (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (152064, 3584)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 16, 24, 32, 64, 128, 256])
def test_tiles_divide_groups(n: int, k: int, bits: int, group: int) -> None:
    parts = 4 if bits == 3 else 8 // bits
    for m in (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, tuning.FUSED_ROWS):
        asked = tuning.gemm_config(m, n, k, bits)
        config, row_scales = tuning.fit_inputs(asked, k, group, parts)
        assert config.inputs % (16 * parts) == 0, "a dot needs 16 bytes of codes"
        blocks = (2 * group, 4 * group) if config.slices > 1 and group >= 16 * parts else ()
        assert row_scales == (group == 0 or group % config.inputs == 0 or config.inputs in blocks)
        assert (config.slices > 1) == (asked.slices > 1), "the number of slices names the kernel"
        for size in (config.rows, config.columns, config.inputs, config.slices, config.warps):
            assert size & (size - 1) == 0, "Triton's tiles are powers of two"


def test_a_row_is_one_tile_where_groups_allow() -> None:
    config, row_scales = tuning.fit_inputs(tuning.GemmConfig(32, 8, 128, 4), 4096, 128, 2)
    assert (config.inputs, config.slices, row_scales) == (128, 4, True)
    config, row_scales = tuning.fit_inputs(tuning.GemmConfig(32, 8, 128, 4), 4096, 64, 2)
    assert (config.inputs, row_scales) == (128, True), "a tile may span two groups"
    config, row_scales = tuning.fit_inputs(tuning.GemmConfig(32, 8, 128, 1), 4096, 64, 2)
    assert (config.inputs, row_scales) == (64, True), "the kernel of one slice takes no groups apart"
    config, row_scales = tuning.fit_inputs(tuning.GemmConfig(32, 8, 128, 4), 4096, 24, 2)
    assert (config.inputs, row_scales) == (32, False)


@pytest.mark.parametrize("units", [0, 108, 132])
@pytest.mark.parametrize("count", [1, 100, 128, 1000, 4096, 28672])
@pytest.mark.parametrize("least", [1, 3])
def test_slices_cover_and_keep_to_the_limit(
    count: int, least: int, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sliced, "multiprocessors", lambda device: units)
    each, cpu = 8192 * 2, torch.device("cpu")
    for m in (1, 512, 4096):
        step = sliced.length(m, count, each, cpu, least)
        assert 1 <= step <= count
        assert step == count or step % 128 == 0
        assert step <= 128 or step * each <= tuning.SLICE_BYTES
        if count >= 128 * 2 * least:
            assert -(-count // step) >= least, "a third of the memory needs three slices"


def test_slices_fill_waves_of_the_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """dx of 4096 rows, 14336 columns: no other slices take fewer waves of 132, even thirds included."""
    monkeypatch.setattr(sliced, "multiprocessors", lambda device: 132)
    high, wide = tuning.BLAS_TILE

    def waves(step: int) -> int:
        tiles = [-(-4096 // high) * -(-min(step, 14336 - start) // wide) for start in range(0, 14336, step)]
        return sum(-(-t // 132) for t in tiles)

    step = sliced.length(4096, 14336, 4096 * 2, torch.device("cpu"), 3)
    even = -(-14336 // 3 // 128) * 128
    assert waves(step) == min(waves(s) for s in range(wide, 14336 // 3 + 1, wide))
    assert waves(step) <= waves(even)
