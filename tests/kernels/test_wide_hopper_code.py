"""What the compiled code of the wide product must look like: only a device runs it, but ptxas is here."""

from __future__ import annotations

import pytest
from kernel_support import compiled
from sass_support import disassembled, overwritten_operands, product_loops

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from triton.backends.compiler import GPUTarget

from quantkit.kernels import wide_hopper_launch
from quantkit.kernels.wide_hopper import wide_hopper_kernel
from quantkit.kernels.wide_hopper_launch import FLOAT8, TABLE_4
from quantkit.kernels.wide_hopper_plan import BK, BN, TILES


@pytest.mark.parametrize(
    ("rows", "kind", "dtype", "group", "scale", "zero", "bias"),
    [
        (256, 4, "bf16", 128, "fp16", "u8", False),
        (256, 4, "fp16", 64, "fp16", "fp16", True),
        (256, 4, "bf16", 0, "fp16", "u8", True),
        (256, TABLE_4, "bf16", 64, "fp32", "fp32", False),
        (256, 8, "bf16", 128, "bf16", "u8", False),
        (256, 8, "bf16", 64, "fp16", "u8", False),
        (256, 8, "fp16", 64, "fp16", "fp16", True),
        (256, FLOAT8, "bf16", 128, "fp32", "fp32", False),
        (256, FLOAT8, "fp16", 0, "fp32", "fp32", True),
        (16, 4, "bf16", 64, "fp16", "fp16", False),
        (32, 8, "fp16", 128, "fp16", "u8", False),
        (64, 4, "bf16", 128, "fp16", "u8", True),
        (64, TABLE_4, "fp16", 64, "fp32", "fp32", False),
        (128, FLOAT8, "bf16", 0, "fp32", "fp32", False),
        (128, 8, "bf16", 64, "fp16", "fp16", False),
    ],
)
def test_compiled_code(
    rows: int, kind: int, dtype: str, group: int, scale: str, zero: str, bias: bool
) -> None:
    """No spills; products that are not made to wait for each other; decoding beside products in flight; and no
    operand written again while a product may be reading it."""
    of_x, of_words, of_y = wide_hopper_launch.layouts(kind)
    width = BK // 8 if kind in (4, TABLE_4) else BK // 4
    types = {
        "x_desc": f"tensordesc<{dtype}[{rows}, {BK}],{of_x!r}>",
        "w_desc": f"tensordesc<i32[{BN}, {width}],{of_words!r}>",
        "y_desc": f"tensordesc<{dtype}[{rows}, {BN // 2}],{of_y!r}>",
        "scale_ptr": f"*{scale}",
        "lut_ptr": "*fp32",
        "zero_ptr": f"*{zero}",
        "bias_ptr": f"*{dtype}",
        "parts_ptr": "*fp32",
    }
    constants = {
        "GROUP": group,
        "BN": BN,
        "BM": rows,
        "BK": BK,
        "STAGES": TILES[rows].stages,
        "TOGETHER": wide_hopper_launch.TOGETHER,
        "KIND": kind,
        "HAS_BIAS": bias,
        "REGISTERS": wide_hopper_launch.OF_PRODUCTS,
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
