"""One row of x (`gemv_kernel`): who is covered, and compiled code without a GPU. Numbers: test_codebook_float8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_support import compiled, longest_loop

pytest.importorskip("triton")

from quantkit.kernels import gemv_launch, launch
from quantkit.kernels.gemv_launch import KINDS
from quantkit.kernels.launch_weight import Kind, LaunchWeight


@pytest.fixture
def ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "target", lambda: ("cuda", 90))


def covers(kind: Kind, n: int, k: int, group: int, **more: Any) -> bool:
    x = torch.empty(more.get("m", 1), k, dtype=more.get("dtype", torch.bfloat16), device="meta")
    shape = (n * k // 2,) if kind == "codebook" else (n, k // 2)
    codes = torch.empty(shape, dtype=torch.uint8, device="meta")
    weight = LaunchWeight(kind, n, group, codes, torch.empty(0, device="meta"))
    return gemv_launch.tile_for(x, weight) is not None


@pytest.mark.usefixtures("ptx")
def test_what_is_covered() -> None:
    assert covers("codebook", 4096, 11008, 64)
    assert covers("affine4", 14336, 4096, 128)
    assert covers("affine4", 4096, 14336, 64)
    assert covers("affine3", 4096, 14336, 128)
    assert not covers("affine4", 4096, 14336, 128), "faster through affine_gemm"
    assert not covers("codebook", 4096, 4096, 64, m=2)
    assert not covers("codebook", 4096, 4096, 64, dtype=torch.float32)
    assert not covers("codebook", 4095, 4096, 64), "rows left over"
    assert not covers("codebook", 4096, 4112, 16), "units of 32 codes would cross a block"
    assert not covers("affine4", 8192, 4100, 0)
    assert not covers("affine8", 8192, 4096, 64) and not covers("float8", 8192, 4096, 0), "no decoding"
    assert not covers("affine3", 8192, 4128, 32), (
        "eight bytes of low codes at an address that is no multiple of 8"
    )


@pytest.mark.usefixtures("ptx")
def test_rows_of_codes_begin_at_aligned_addresses() -> None:
    x = torch.empty(1, 4096, dtype=torch.float16, device="meta")
    wide = torch.empty(8192, 2056, dtype=torch.uint8, device="meta")
    weight = LaunchWeight("affine4", 8192, 64, wide[:, :2048].contiguous(), torch.empty(0, device="meta"))
    assert gemv_launch.tile_for(x, weight)
    assert gemv_launch.tile_for(x, weight._replace(codes=wide[:, :2048])) is None


def test_only_with_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    for target in (("hip", 0), ("cuda", 75), ("interpreter", 0)):
        monkeypatch.setattr(launch, "target", lambda target=target: target)
        assert not covers("codebook", 4096, 4096, 64)


@pytest.mark.parametrize("chip", [80, pytest.param(90), pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_loop_has_no_barrier(kind: str, chip: int) -> None:
    """Nothing is exchanged between threads until the sums at the end: no barrier inside the loop."""
    from triton.backends.compiler import GPUTarget

    from quantkit.kernels.gemv import gemv_kernel

    tile = gemv_launch.config(kind, 8192)
    constants = {
        "KIND": KINDS[kind], "BN": tile.rows, "KS": tile.steps, "R": tile.per_thread, "GROUP": 64, "EVEN_K": True,
        "HAS_BIAS": False, "ASM": True, "THREADS": 32 * tile.warps,
    }  # fmt: skip
    types = dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), "*bf16")
    types |= {"codes_ptr": "*u8", "scale_ptr": "*fp32", "zero_ptr": "*u8", "lut_ptr": "*fp32"}
    binary = compiled(
        gemv_kernel, types, constants, GPUTarget("cuda", chip, 32), num_warps=tile.warps, num_stages=1
    )
    text = binary.asm["ptx"]
    assert binary.metadata.shared + (32768 if kind == "codebook" else 0) <= 49152
    body = longest_loop(text)
    products = body.count("fma.rn.f32") + body.count("fma.rn.f32x2")  # sm_100 takes two at a time
    assert products >= 32 * tile.per_thread, "that is the loop"
    assert "bar.sync" not in body and "barrier" not in body
    assert body.count("ld.global.nc.v4") + body.count(".v4.b32") >= 4
