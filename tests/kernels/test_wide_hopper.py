"""The fused product of hundreds of rows on Hopper: when it answers, and what its compiled code must look like.

What it computes only a device shows: `scripts/check_wide_gpu.py`.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from kernel_support import compiled
from sass_support import disassembled, overwritten_operands, product_loops

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from triton.backends.compiler import GPUTarget

from quantkit.kernels import affine, launch, sliced, wide_hopper_launch
from quantkit.kernels.wide_hopper import wide_hopper_kernel
from quantkit.kernels.wide_hopper_launch import BK, BM, BN, FLOAT8, TABLE_4, Wide, decoding_cost, faster

SM_90 = mock.patch.object(launch, "target", lambda: ("cuda", 90))


def packed(n: int = 256, k: int = 512, group: int = 128, **changed: Any) -> Wide:
    weight = Wide(
        4,
        torch.zeros(n, k // 2, dtype=torch.uint8),
        torch.ones(n, k // group, dtype=torch.float16),
        torch.zeros(n, k // group, dtype=torch.uint8),
        None,
        None,
        group if group < k else 0,
    )
    return weight._replace(**changed)


def nf4(n: int, k: int, block: int = 64, **changed: Any) -> Wide | None:
    codes, scale = torch.zeros(n * k // 2, dtype=torch.uint8), torch.ones(-(-n * k // block))
    given = {"codes": codes, "scale": scale, "lut": torch.zeros(16), "n": n, "k": k, "block": block}
    return wide_hopper_launch.codebook(**given | changed)


def inputs(m: int = 300, k: int = 512, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(m, k, dtype=dtype)


# Medians on an H100 (docs/benchmarks/kernels-h100.md): N, K, M, us fused, us dequantized and by BLAS.
GROUPS_OF_128 = [
    (4096, 4096, 1536, 87.8, 82.2),
    (4096, 4096, 2048, 92.3, 104.5),
    (4096, 4096, 3072, 147.2, 162.7),
    (6144, 4096, 512, 47.1, 58.7),
    (6144, 4096, 1024, 92.6, 92.0),
    (4096, 14336, 512, 152.9, 133.2),
    (4096, 14336, 1024, 169.3, 216.4),
    (14336, 4096, 160, 48.6, 101.8),
    (14336, 4096, 384, 90.8, 117.9),
    (14336, 4096, 1024, 203.7, 222.5),
    (14336, 4096, 2048, 356.0, 403.2),
    (8192, 8192, 192, 80.8, 117.5),
    (8192, 8192, 768, 194.6, 202.5),
    (8192, 8192, 1024, 202.0, 253.7),
    (8192, 8192, 3072, 612.9, 634.5),
    (28672, 8192, 384, 446.1, 491.0),
    (28672, 8192, 1024, 702.3, 925.1),
    (28672, 8192, 3072, 2147.4, 2311.4),
]
GROUPS_OF_64 = [
    (4096, 4096, 512, 47.6, 39.5),
    (4096, 4096, 2048, 105.1, 107.1),
    (8192, 8192, 256, 94.5, 122.4),
    (8192, 8192, 2048, 424.9, 442.1),
    (28672, 8192, 2048, 1537.0, 1626.0),
]
NF4_BLOCKS_OF_64 = [
    (4096, 4096, 512, 50.8, 42.0),
    (4096, 4096, 1024, 52.7, 61.9),
    (4096, 4096, 2048, 110.3, 109.1),
    (14336, 4096, 512, 106.9, 152.1),
    (14336, 4096, 1024, 235.0, 229.1),
    (8192, 8192, 256, 101.9, 129.0),
    (8192, 8192, 1024, 229.2, 261.7),
    (8192, 8192, 2048, 482.8, 469.9),
    (28672, 8192, 1024, 834.7, 980.4),
    (28672, 8192, 2048, 1717.2, 1653.6),
]
FLOAT_ZEROS = [
    (4096, 4096, 1024, 56.1, 60.7),
    (4096, 4096, 2048, 115.6, 106.7),
    (14336, 4096, 512, 118.5, 149.4),
    (14336, 4096, 1024, 253.6, 224.5),
    (8192, 8192, 2048, 500.1, 462.5),
    (28672, 8192, 1024, 876.5, 929.9),
    (28672, 8192, 2048, 1779.6, 1596.0),
]


def test_the_rule_chooses_what_was_measured_to_be_faster() -> None:
    float_zeros = packed(group=64, zero=torch.zeros(256, 8, dtype=torch.float16))
    tables = (
        (GROUPS_OF_128, packed()),
        (GROUPS_OF_64, packed(group=64)),
        (FLOAT_ZEROS, float_zeros),
        (NF4_BLOCKS_OF_64, nf4(256, 512)),
    )
    for table, weight in tables:
        assert weight is not None
        for n, k, m, fused, blas in table:
            assert faster(m, n, decoding_cost(weight), 132) == (fused < blas), (n, k, m, weight.group)


def test_the_rule_knows_no_device_without_multiprocessors_and_no_more_rows_than_measured() -> None:
    assert not faster(1024, 8192, 1.0, 0)
    assert faster(3072, 8192, 1.0, 132) and not faster(3073, 28672, 1.0, 132)


def test_a_weight_that_takes_longer_to_decode_answers_in_fewer_places() -> None:
    float_zeros = packed(zero=torch.zeros(256, 4, dtype=torch.float16))
    costs = [decoding_cost(packed()), decoding_cost(packed(group=64)), decoding_cost(float_zeros)]
    assert costs == sorted(costs) and costs[0] == 1.0
    assert [faster(768, 8192, cost, 132) for cost in costs] == [True, False, False]


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
    for other in (("cuda", 80), ("cuda", 100), ("hip", 0)):
        with mock.patch.object(launch, "target", lambda other=other: other):
            assert not covers(inputs(), packed())


def test_codebooks_are_covered_where_rows_are_whole_blocks() -> None:
    weight = nf4(256, 512)
    assert weight is not None and weight.codes.shape == (256, 256) and weight.scale.shape == (256, 8)
    with SM_90:
        assert wide_hopper_launch.covers(inputs(), weight)
        shorter = nf4(256, 512, block=32)
        assert shorter is not None and not wide_hopper_launch.covers(inputs(), shorter)
    assert nf4(256, 544) is None
    assert nf4(256, 512, lut=torch.zeros(16, dtype=torch.float16)) is None


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


def test_many_rows_of_a_covered_weight_take_this_route(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        wide_hopper_launch,
        "launch_wide",
        lambda x, weight, bias, units: calls.append((x.shape, units)) or x.new_zeros(x.shape[0], 8192),
    )
    monkeypatch.setattr(sliced, "multiprocessors", lambda _: 132)
    weight = packed(n=8192)
    with SM_90:
        out = affine.affine_linear(
            inputs(512).view(2, 256, 512), weight.codes, weight.scale, weight.zero, None, None, 4, 128, None
        )
    assert calls == [((512, 512), 132)] and out.shape == (2, 256, 8192)


@pytest.mark.parametrize(
    ("kind", "dtype", "group", "scale", "zero", "bias"),
    [
        (4, "bf16", 128, "fp16", "u8", False),
        (4, "fp16", 64, "fp16", "fp16", True),
        (4, "bf16", 0, "fp16", "u8", True),
        (TABLE_4, "bf16", 64, "fp32", "fp32", False),
        (8, "bf16", 128, "bf16", "u8", False),
        (8, "bf16", 64, "fp16", "u8", False),
        (8, "fp16", 64, "fp16", "fp16", True),
        (FLOAT8, "bf16", 128, "fp32", "fp32", False),
        (FLOAT8, "fp16", 0, "fp32", "fp32", True),
    ],
)
def test_compiled_code(kind: int, dtype: str, group: int, scale: str, zero: str, bias: bool) -> None:
    """No spills; products that are not made to wait for each other; decoding beside products in flight; and no
    operand written again while a product may be reading it."""
    of_x, of_words, of_y = wide_hopper_launch.layouts(kind)
    width = BK // 8 if kind in (4, TABLE_4) else BK // 4
    types = {
        "x_desc": f"tensordesc<{dtype}[{BM}, {BK}],{of_x!r}>",
        "w_desc": f"tensordesc<i32[{BN}, {width}],{of_words!r}>",
        "y_desc": f"tensordesc<{dtype}[{BM}, {BN // 2}],{of_y!r}>",
        "scale_ptr": f"*{scale}",
        "lut_ptr": "*fp32",
        "zero_ptr": f"*{zero}",
        "bias_ptr": f"*{dtype}",
        "parts_ptr": "*fp32",
    }
    constants = {
        "GROUP": group,
        "BN": BN,
        "BM": BM,
        "BK": BK,
        "STAGES": wide_hopper_launch.STAGES,
        "TOGETHER": wide_hopper_launch.TOGETHER,
        "KIND": kind,
        "HAS_BIAS": bias,
    }
    target = GPUTarget("cuda", 90, 32)
    options = {"num_warps": 4, "maxnreg": wide_hopper_launch.REGISTERS}
    binary = compiled(wide_hopper_kernel, types, constants, target, **options)
    assert binary.metadata.shared <= 232448
    lines = disassembled(binary.asm["cubin"])
    assert not any("STL" in line or "LDL" in line for line in lines)
    loops = product_loops(lines)
    assert len(loops) == 2  # one of each warpgroup
    # The instruction that takes a pair of codes out of its words, and how many of them a step and thread has.
    takes = {8: "PRMT", FLOAT8: "F2FP.F16.E4M3"}.get(kind, "SHF.L.W")
    for loop in loops:
        assert sum("HGMMA" in line for line in loop) == 8
        # Serialized products have a wait of their own each: here two, one of which leaves a group in flight.
        waits = [i for i, line in enumerate(loop) if "DEPBAR.LE gsb0" in line]
        assert [loop[i].split()[-1] for i in waits] == ["0x1", "0x0"]
        ends = [i for i, line in enumerate(loop) if "HGMMA" in line and "gsb0" in line]
        assert len(ends) == 2 and ends[1] < waits[0]
        # 32 weights are decoded while the product before is in flight: from one issue to the next, and from there
        # to the last wait, behind which ptxas leaves only the rounding.
        for start, stop in ((ends[0], ends[1]), (ends[1], waits[1])):
            between = loop[start:stop]
            assert sum(line.startswith(takes) for line in between) == (48 if kind == 8 else 16)
            if kind != FLOAT8 or group:
                assert sum(line.startswith(("FFMA", "FMUL")) for line in between) >= 32
        assert not overwritten_operands(loop)
        assert not any("MEMBAR" in line for line in loop)


def test_an_operand_written_while_it_is_read_is_found() -> None:
    loop = [
        "F2FP.BF16.F32.PACK_AB R152, R3, R2",
        "HGMMA.64x256x16.F32.BF16 R24, R152, gdesc[UR4], R24, gsb0",
        "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        "@P0 BRA `(.L_x_2)",
    ]
    assert overwritten_operands(loop) == [loop[0]]
    assert not overwritten_operands([*loop[:2], loop[2].replace("0x1", "0x0"), loop[3]])
    assert overwritten_operands([*loop[:2], "LDS.128 R150, [R8]", loop[2].replace("0x1", "0x0")])
