"""The fused product of many rows on Hopper: which weights it covers, and who asks it.

What it computes only a device shows: `scripts/check_wide_gpu.py`.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from quantkit.encoding import Codebook, Float8, PackedWeight
from quantkit.kernels import affine, codebook, float8, launch, launch_weight, sliced, wide_hopper_launch
from quantkit.kernels.bench_cases import random_weight
from quantkit.kernels.launch_weight import LaunchWeight
from quantkit.kernels.wide_hopper_plan import BK, LEAST_ROWS, Plan

SM_90 = mock.patch.object(launch, "target", lambda: ("cuda", 90))


def packed(n: int = 256, k: int = 512, group: int = 128, **changed: Any) -> LaunchWeight:
    codes, zero = torch.zeros(n, k // 2, dtype=torch.uint8), torch.zeros(n, k // group, dtype=torch.uint8)
    weight = launch_weight.affine(codes, zero.half() + 1, zero, None, n, 4, group)
    return weight._replace(**changed)


def nf4(n: int, k: int, block: int = 64, **changed: Any) -> LaunchWeight:
    codes, scale = torch.zeros(n * k // 2, dtype=torch.uint8), torch.ones(-(-n * k // block))
    return launch_weight.codebook(codes, scale, torch.zeros(16), n, block)._replace(**changed)


def inputs(m: int = 300, k: int = 512, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(m, k, dtype=dtype)


def test_what_is_covered() -> None:
    covers = wide_hopper_launch.covers
    with SM_90:
        assert covers(inputs(), packed())
        assert covers(inputs(dtype=torch.float16), packed(group=64))
        assert covers(inputs(), packed(group=512))  # one group per row
        assert not covers(inputs(dtype=torch.float32), packed())
        assert not covers(inputs(), packed(group=32))
        assert not covers(inputs(k=544), packed(k=544, group=544))  # a step of K is left over
        assert not covers(inputs(), packed(n=260))  # rows of y of 520 bytes
        wider = torch.zeros(256, 512, dtype=torch.uint8)
        assert not covers(inputs(), packed(codes=wider[:, :256]))
        assert not covers(
            inputs(), packed(codes=torch.zeros(256 * 256 + 8, dtype=torch.uint8)[8:].view(256, 256))
        )
        assert not covers(inputs().to("meta"), packed())
        assert not covers(inputs(), packed(kind="affine1")), "no decoding"
    for other in (("cuda", 80), ("cuda", 100), ("hip", 0)):
        with mock.patch.object(launch, "target", lambda other=other: other):
            assert not covers(inputs(), packed())


def planes(bits: int, k: int, group: int = 64) -> LaunchWeight:
    codes, zero = torch.zeros(256, k * bits // 8, dtype=torch.uint8), torch.zeros(256, -(-k // group))
    return launch_weight.affine(codes, zero.half() + 1, zero.to(torch.uint8), None, 256, bits, group)


def test_three_bits_are_covered_where_high_planes_are_aligned() -> None:
    covers = wide_hopper_launch.covers
    with SM_90:
        assert covers(inputs(k=640), planes(3, 640)) and covers(inputs(k=128), planes(3, 128, 128))
        assert not covers(inputs(k=576), planes(3, 576)), "the high plane begins between words of 16 bytes"
        assert covers(inputs(k=576), planes(2, 576))
        assert not covers(inputs(k=640), planes(3, 640, 32))
        for bits in (2, 3):
            weight = planes(bits, 640)
            low, high = wide_hopper_launch.widths(weight.kind)
            turns = 640 // (2 * BK)
            assert (low + high) * turns * 4 == weight.codes.shape[1], "a row is copied once"


def test_codebooks_are_covered_where_rows_are_whole_blocks() -> None:
    covers = wide_hopper_launch.covers
    with SM_90:
        assert covers(inputs(), nf4(256, 512))
        assert not covers(inputs(), nf4(256, 512, block=32))
        assert not covers(inputs(k=544), nf4(256, 544))
        assert not covers(inputs(k=576), nf4(256, 576, block=128)), "blocks run on from row to row"
        assert not covers(inputs(), nf4(256, 512, lut=torch.zeros(16, dtype=torch.float16)))
        assert not covers(inputs(), nf4(256, 512, lut=torch.zeros(8)))


def test_where_triton_refuses_the_other_route_answers_and_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def launch_wide(*_: Any) -> torch.Tensor:
        asked.append(1)
        raise ImportError("no Gluon\nin this Triton")

    monkeypatch.delenv("QUANTKIT_KERNELS", raising=False)
    monkeypatch.setattr(wide_hopper_launch, "launch_wide", launch_wide)
    monkeypatch.setattr(wide_hopper_launch, "_refused", False)
    monkeypatch.setattr(sliced, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(affine, "_sliced_linear", lambda x, weight, bias: x.new_full((x.shape[0], 8192), 7))
    weight = packed(n=8192)
    arguments = (inputs(512), weight.codes, weight.scale, weight.zero, None, None, 4, 128, None)
    with SM_90:
        assert all(bool((affine.affine_linear(*arguments) == 7).all()) for _ in range(2))
        assert len(asked) == 1 and "no Gluon" in caplog.text and "in this Triton" not in caplog.text
        monkeypatch.setattr(wide_hopper_launch, "_refused", False)
        monkeypatch.setenv("QUANTKIT_KERNELS", "strict")
        with pytest.raises(ImportError):
            affine.affine_linear(*arguments)


@pytest.mark.parametrize(
    "form",
    [
        "affine-4g128",
        "affine-8g64",
        "affine-3g128",
        "affine-3g64",
        "affine-2g128",
        "hqq-4g64",
        "hqq-3g64",
        "nf4",
        "fp8-block",
        "fp8-channel",
    ],
)
def test_many_rows_of_a_covered_weight_take_this_route(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        wide_hopper_launch,
        "launch_wide",
        lambda x, weight, bias, plan: calls.append((x.shape, plan.rows)) or x.new_zeros(x.shape[0], 8192),
    )
    monkeypatch.setattr(sliced, "multiprocessors", lambda _: 132)
    weight = random_weight(form, 8192, 4096, torch.device("cpu"))
    with SM_90:
        for rows, tile in ((LEAST_ROWS + 1, 32), (64, 64), (100, 128), (512, 256)):
            assert through_op(inputs(rows, 4096).view(1, rows, 4096), weight).shape == (1, rows, 8192)
            assert calls.pop() == ((rows, 4096), tile)


def through_op(x: torch.Tensor, w: PackedWeight) -> torch.Tensor:
    enc = w.encoding
    if isinstance(enc, Float8):
        return float8.float8_linear(x, w.codes, w.scale, None, *enc.block, None, None)
    if isinstance(enc, Codebook):
        assert w.lut is not None
        return codebook.codebook_linear(x, w.codes, w.scale, w.lut, None, w.shape[0], enc.block_size)
    assert w.zero is not None
    return affine.affine_linear(x, w.codes, w.scale, w.zero, None, None, enc.bits, enc.group_size, None)


def test_two_groups_at_once_where_they_are_aligned_and_even() -> None:
    two = wide_hopper_launch.two_at_once
    weight = packed(group=64)
    assert two(weight, 512) and not two(packed(), 512) and not two(weight, 576)
    shifted = torch.zeros(256 * 8 + 1, dtype=torch.uint8)[1:].view(256, 8)
    assert not two(weight._replace(zero=shifted), 512)
    assert not two(weight._replace(zero=torch.zeros(256, 8, dtype=torch.int64)), 512), (
        "no integers of 128 bits"
    )


def test_room_for_the_parts_of_shared_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        wide_hopper_launch, "arrivals", lambda count, device: torch.zeros(count, device=device)
    )
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.empty(300, 520, dtype=dtype)  # 5 by 2 tiles of 256 rows, of which 3 are whole
        sums, arrived = wide_hopper_launch.room_for_parts(out, Plan(256, 3, 11, 11, 0.0))
        assert sums.shape == (22, 256, 128) and sums.dtype == torch.float32 and arrived.numel() == 14
        sums, arrived = wide_hopper_launch.room_for_parts(out, Plan(256, 10, 1, 10, 0.0))
        assert sums is out and arrived.numel() == 0


def test_what_is_decoded_in_sixteen_bits() -> None:
    def of(scale: torch.dtype, zero: torch.dtype, dtype: torch.dtype) -> tuple[bool, float]:
        weight = packed()
        assert weight.zero is not None
        weight = weight._replace(scale=weight.scale.to(scale), zero=weight.zero.to(zero))
        return wide_hopper_launch.in_sixteen_bits(weight, dtype), wide_hopper_launch.decoding_cost(
            weight, dtype
        )

    half, brain, byte = torch.float16, torch.bfloat16, torch.uint8
    assert of(half, byte, half) == of(brain, byte, brain) == of(half, byte, brain) == (True, 0.98)
    assert of(half, half, brain) == of(half, brain, brain) == (True, 1.05)
    assert of(half, half, half) == of(brain, brain, brain) == of(brain, byte, half) == (False, 1.15)
    assert of(half, torch.int32, brain) == (False, 1.15)
