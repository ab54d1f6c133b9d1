"""The gradient of many rows on Hopper: which weights it covers, who asks it, and its compiled code.

What it computes only a device shows: `scripts/check_wide_gpu.py`.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from kernel_support import compiled
from sass_support import beside_products, disassembled, overwritten_operands, product_loops

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from triton.backends.compiler import GPUTarget

from quantkit.encoding import Codebook, Float8, PackedWeight
from quantkit.kernels import (
    affine,
    codebook,
    float8,
    launch,
    launch_weight,
    sliced,
    wide_hopper_dx_launch,
    wide_hopper_launch,
)
from quantkit.kernels.bench_cases import random_weight
from quantkit.kernels.launch_weight import Kind, LaunchWeight
from quantkit.kernels.wide_hopper_dx import wide_hopper_dx_kernel
from quantkit.kernels.wide_hopper_plan import BN, LEAST_ROWS, TILES

SM_90 = mock.patch.object(launch, "target", lambda: ("cuda", 90))
BS, SHARED = wide_hopper_dx_launch.BS, wide_hopper_dx_launch.SHARED


def weight(form: str = "affine-4g128", n: int = 256, k: int = 512) -> LaunchWeight:
    return launch_weight.of(random_weight(form, n, k, torch.device("cpu")))


def gradients(m: int = 300, n: int = 256, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(m, n, dtype=dtype)


def test_what_is_covered() -> None:
    covers = wide_hopper_dx_launch.covers
    with SM_90:
        for form in ("affine-4g128", "affine-8g64", "hqq-4g64", "nf4", "fp8-block", "fp8-channel"):
            assert covers(gradients(), weight(form), 512), form
        assert covers(gradients(dtype=torch.float16), weight("affine-4g512"), 512)  # one group per row
        assert not covers(gradients(dtype=torch.float32), weight(), 512)
        assert not covers(gradients(), weight("affine-4g32"), 512)
        assert not covers(gradients(), weight("affine-3g128"), 512), "no decoding"
        assert not covers(gradients(), weight("ternary"), 512), "no decoding"
        assert not covers(gradients(n=260), weight(n=260), 512), "rows of 520 bytes"
        assert not covers(gradients(), weight("nf4", k=544), 544), "blocks run on from row to row"
        assert not covers(gradients().to("meta"), weight(), 512)
        shifted = torch.zeros(256 * 256 + 8, dtype=torch.uint8)[8:].view(256, 256)
        assert not covers(gradients(), weight()._replace(codes=shifted), 512)
    for other in (("cuda", 80), ("cuda", 100), ("hip", 0)):
        with mock.patch.object(launch, "target", lambda other=other: other):
            assert not covers(gradients(), weight(), 512)


@pytest.mark.parametrize(
    "form", ["affine-4g128", "affine-8g64", "hqq-4g64", "nf4", "fp8-block", "fp8-channel"]
)
def test_many_rows_of_a_covered_weight_take_this_route(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        wide_hopper_dx_launch,
        "launch_dx",
        lambda grad, weight, k, plan: (
            calls.append((grad.shape, plan.rows)) or grad.new_zeros(grad.shape[0], k)
        ),
    )
    monkeypatch.setattr(sliced, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(wide_hopper_launch, "_refused", False)
    packed = random_weight(form, 8192, 4096, torch.device("cpu"))
    with SM_90:
        for rows, tile in ((LEAST_ROWS + 1, 32), (64, 64), (100, 128), (512, 256)):
            assert through_op(gradients(rows, 8192).view(1, rows, 8192), packed).shape == (1, rows, 4096)
            assert calls.pop() == ((rows, 8192), tile)


def through_op(grad: torch.Tensor, w: PackedWeight) -> torch.Tensor:
    enc, k = w.encoding, w.shape[1]
    if isinstance(enc, Float8):
        return float8.float8_linear_backward(grad, w.codes, w.scale, *enc.block)
    if isinstance(enc, Codebook):
        assert w.lut is not None
        return codebook.codebook_linear_backward(grad, w.codes, w.scale, w.lut, k, enc.block_size)
    assert w.zero is not None
    return affine.affine_linear_backward(grad, w.codes, w.scale, w.zero, None, enc.bits, enc.group_size, k)


def test_where_triton_refuses_slices_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("QUANTKIT_KERNELS", raising=False)
    monkeypatch.setattr(wide_hopper_dx_launch, "launch_dx", mock.Mock(side_effect=ImportError("no Gluon")))
    monkeypatch.setattr(wide_hopper_launch, "_refused", False)
    monkeypatch.setattr(sliced, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(
        affine, "_sliced_backward", lambda grad, weight, k: grad.new_full((grad.shape[0], k), 7)
    )
    with SM_90:
        dx = through_op(gradients(512, 8192), random_weight("affine-4g128", 8192, 4096, torch.device("cpu")))
    assert bool((dx == 7).all()) and "no Gluon" in caplog.text


@pytest.mark.parametrize(
    ("rows", "kind", "dtype", "group", "scale", "zero"),
    [
        (256, "affine4", "bf16", 128, "fp16", "u8"),
        (256, "affine4", "fp16", 64, "fp16", "fp16"),
        (256, "affine4", "bf16", 0, "fp16", "u8"),
        (256, "affine4", "bf16", 64, "bf16", "u8"),
        (256, "affine4", "fp16", 64, "bf16", "u8"),
        (256, "affine4", "fp16", 128, "fp16", "u8"),
        (256, "affine8", "fp16", 64, "fp16", "u8"),
        (256, "affine4", "bf16", 64, "fp16", "fp16"),
        (64, "affine8", "bf16", 128, "bf16", "u8"),
        (256, "codebook", "bf16", 64, "fp32", "fp32"),
        (256, "affine8", "bf16", 128, "fp16", "u8"),
        (256, "float8", "bf16", 128, "fp32", "fp32"),
        (16, "affine4", "bf16", 64, "fp16", "fp16"),
        (32, "affine8", "fp16", 128, "bf16", "u8"),
        (64, "codebook", "fp16", 64, "fp32", "fp32"),
        (128, "float8", "fp16", 0, "fp32", "fp32"),
        (128, "affine8", "bf16", 64, "fp16", "fp16"),
    ],
)
def test_compiled_code(rows: int, kind: Kind, dtype: str, group: int, scale: str, zero: str) -> None:
    """Units read by `ldmatrix.trans`; products that are not made to wait for each other; decoding beside products in
    flight; no operand written again while a product may be reading it; no spills where products are."""
    of_rows, of_units = wide_hopper_dx_launch.layouts(kind)
    width = BN * wide_hopper_launch.bits(kind) // 16
    types = {
        "dy_desc": f"tensordesc<{dtype}[{rows}, {BS}],{of_rows!r}>",
        "w_desc": f"tensordesc<i16[{BS}, {width}],{of_units!r}>",
        "dx_desc": f"tensordesc<{dtype}[{rows}, {BN // 2}],{of_rows!r}>",
        "scale_ptr": f"*{scale}",
        "zero_ptr": f"*{zero}",
        "lut_ptr": "*fp32",
        "parts_ptr": "*fp32",
        "arrived_ptr": "*i32",
    }
    constants: dict[str, Any] = {
        "GROUP": group,
        "BN": BN,
        "BM": rows,
        "BS": BS,
        "STAGES": wide_hopper_dx_launch.stages(kind, group, rows),
        "TOGETHER": wide_hopper_launch.TOGETHER,
        "KIND": wide_hopper_launch.KINDS[kind],
        "REGISTERS": wide_hopper_dx_launch.OF_PRODUCTS,
        "OTHERS": wide_hopper_dx_launch.OF_OTHERS,
    }
    options = {"num_warps": 4, "maxnreg": wide_hopper_launch.REGISTERS}
    binary = compiled(wide_hopper_dx_kernel, types, constants, GPUTarget("cuda", 90, 32), **options)
    assert binary.metadata.shared <= SHARED
    lines = disassembled(binary.asm["cubin"])
    loops = product_loops(lines)
    assert len(loops) == 2  # one of each warpgroup
    for loop in loops:
        assert not any("STL" in line or "LDL" in line for line in loop)
        assert sum("HGMMA" in line for line in loop) == 8
        assert sum(line.startswith("LDSM.16.MT88.4") for line in loop) == 4
        for between in beside_products(loop):  # 32 weights are decoded
            split = (kind, dtype, scale) == ("affine4", "bf16", "fp16")
            pairs = kind in ("affine4", "affine8") and zero == "u8" and (scale == dtype or split)
            if pairs:
                assert sum(line.startswith("HMUL2") for line in between) == 16
            else:
                assert sum(line.startswith(("FFMA", "FMUL")) for line in between) >= 32
        assert not overwritten_operands(loop)
        assert not any("MEMBAR" in line for line in loop)


def test_buffers_fit() -> None:
    for kind in wide_hopper_dx_launch.DECODED:
        for group in (0, 64, 128):
            found = [wide_hopper_dx_launch.stages(kind, group, rows) for rows in TILES]
            assert all(3 <= count <= tile.stages for count, tile in zip(found, TILES.values()))
