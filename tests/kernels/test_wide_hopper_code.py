"""What the compiled code of the wide product must look like: only a device runs it, but ptxas is here."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_support import compiled
from sass_support import beside_products, disassembled, overwritten_operands, product_loops

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from triton.backends.compiler import GPUTarget

from quantkit.kernels import wide_hopper_kinds, wide_hopper_launch
from quantkit.kernels.launch_weight import Kind
from quantkit.kernels.wide_hopper import wide_hopper_kernel
from quantkit.kernels.wide_hopper_plan import BK, BN, TILES


@pytest.mark.parametrize(
    ("rows", "kind", "dtype", "group", "scale", "zero", "bias"),
    [
        (256, "affine4", "bf16", 128, "fp16", "u8", False),
        (256, "affine4", "fp16", 64, "fp16", "fp16", True),
        (256, "affine4", "bf16", 0, "fp16", "u8", True),
        (256, "codebook", "bf16", 64, "fp32", "fp32", False),
        (256, "affine8", "bf16", 128, "bf16", "u8", False),
        (256, "affine8", "bf16", 64, "fp16", "u8", False),
        (256, "affine4", "bf16", 64, "bf16", "u8", False),
        (256, "affine4", "fp16", 128, "fp16", "u8", True),
        (256, "affine4", "bf16", 64, "fp16", "fp16", False),
        (256, "affine8", "bf16", 64, "fp16", "fp16", True),
        (256, "affine4", "bf16", 64, "fp32", "fp32", False),
        (256, "affine4", "bf16", 64, "bf16", "bf16", False),
        (256, "affine4", "fp16", 128, "bf16", "u8", False),
        (256, "affine8", "fp16", 64, "fp16", "fp16", True),
        (256, "float8", "bf16", 128, "fp32", "fp32", False),
        (256, "float8", "fp16", 0, "fp32", "fp32", True),
        (16, "affine4", "bf16", 64, "fp16", "fp16", False),
        (32, "affine8", "fp16", 128, "fp16", "u8", False),
        (64, "affine4", "bf16", 128, "fp16", "u8", True),
        (64, "codebook", "fp16", 64, "fp32", "fp32", False),
        (128, "float8", "bf16", 0, "fp32", "fp32", False),
        (128, "affine8", "bf16", 64, "fp16", "fp16", False),
        (256, "affine3", "bf16", 128, "fp16", "u8", False),
        (256, "affine3", "bf16", 64, "bf16", "u8", True),
        (256, "affine3", "fp16", 64, "fp16", "fp16", True),
        (256, "affine3", "fp16", 0, "fp32", "u8", True),
        (256, "affine2", "bf16", 64, "fp16", "fp16", True),
        (16, "affine3", "bf16", 0, "fp16", "u8", False),
        (32, "affine3", "fp16", 128, "fp16", "u8", False),
        (64, "affine3", "bf16", 64, "fp16", "fp16", True),
        (64, "affine2", "fp16", 0, "fp16", "u8", False),
        (128, "affine3", "bf16", 128, "fp16", "u8", False),
    ],
)
def test_compiled_code(
    rows: int, kind: Kind, dtype: str, group: int, scale: str, zero: str, bias: bool
) -> None:
    """No spills; products that are not made to wait for each other; decoding beside products in flight; and no
    operand written again while a product may be reading it."""
    of_x, of_words, of_high, of_y = wide_hopper_launch.layouts(kind)
    width, high = wide_hopper_launch.widths(kind)
    types = {
        "x_desc": f"tensordesc<{dtype}[{rows}, {BK}],{of_x!r}>",
        "w_desc": f"tensordesc<i32[{BN}, {width}],{of_words!r}>",
        "y_desc": f"tensordesc<{dtype}[{rows}, {BN // 2}],{of_y!r}>",
        "scale_ptr": f"*{scale}",
        "lut_ptr": "*fp32",
        "zero_ptr": f"*{zero}",
        "bias_ptr": f"*{dtype}",
        "parts_ptr": "*fp32",
        "arrived_ptr": "*i32",
    }
    constants: dict[str, Any] = {
        "GROUP": group,
        "BN": BN,
        "BM": rows,
        "BK": BK,
        "STAGES": TILES[rows].stages,
        "TOGETHER": wide_hopper_launch.TOGETHER,
        "KIND": wide_hopper_launch.KINDS[kind],
        "TWO": group == BK,
        "HAS_BIAS": bias,
        "REGISTERS": wide_hopper_launch.OF_PRODUCTS,
    }
    if high:
        types["high_desc"] = f"tensordesc<i32[{BN}, {high}],{of_high!r}>"
    else:
        constants["high_desc"] = None
    target = GPUTarget("cuda", 90, 32)
    options = {"num_warps": 4, "maxnreg": wide_hopper_launch.REGISTERS}
    binary = compiled(wide_hopper_kernel, types, constants, target, **options)
    assert binary.metadata.shared <= 232448
    lines = disassembled(binary.asm["cubin"])
    assert not any("STL" in line or "LDL" in line for line in lines)
    loops = product_loops(lines)
    assert len(loops) == 2  # one of each warpgroup
    # An instruction that every pair of codes takes, and how many of them a step and thread has. (2 and 3 bits: that
    # takes those of 4 octets, beside which each of these has 9 permutations.)
    planes = kind in ("affine2", "affine3")
    pairs = (
        kind in ("affine4", "affine8")
        and zero == "u8"
        and (scale == dtype or (kind, dtype, scale) == ("affine4", "bf16", "fp16"))
    )
    takes = {"affine8": "PRMT", "float8": "F2FP.F16.E4M3"}.get(kind, "SHF.L.W")
    count = {"affine8": 32, "affine3": 12, "affine2": 4}.get(kind, 16)
    if pairs:
        takes, count = "HMUL2", 16
    for loop in loops:
        assert sum("HGMMA" in line for line in loop) == 8
        # 32 weights are decoded while the product before is in flight: from one issue to the next, and from there
        # to the last wait, behind which ptxas leaves only the rounding.
        for between in beside_products(loop):
            taken = sum(line.startswith(takes) for line in between)
            assert taken == count or (
                kind == "affine8" and count < taken <= count + 4
            )  # halves of two groups' scales
            if planes:
                # Beside them those of tables, 4 each: two a step, which may be the next one's.
                assert 36 <= sum(line.startswith("PRMT") for line in between) <= 36 + 16
            elif not pairs and (kind != "float8" or group):
                assert sum(line.startswith(("FFMA", "FMUL")) for line in between) >= 32
        assert not overwritten_operands(loop)
        assert not any("MEMBAR" in line for line in loop)
        # The first release gives back what the second step's decoding reads as well: by all warps, before its product.
        ends = [i for i, line in enumerate(loop) if "HGMMA" in line and "gsb0" in line]
        release = next(i for i, line in enumerate(loop) if "SYNCS.ARRIVE" in line)
        reads = [i for i, line in enumerate(loop[:release]) if line.startswith("LDS")]
        assert reads and ends[0] < min(reads) and max(reads) < ends[1]
        assert any(line.startswith("BAR.SYNC") for line in loop[ends[1] : release])


def test_the_launch_names_decodings_as_the_kernel_does() -> None:
    known = {
        "codebook": wide_hopper_kinds.TABLE_4,
        "float8": wide_hopper_kinds.FLOAT8,
        "affine2": wide_hopper_kinds.AFFINE_2,
        "affine3": wide_hopper_kinds.AFFINE_3,
        "affine4": wide_hopper_kinds.AFFINE_4,
        "affine8": wide_hopper_kinds.AFFINE_8,
    }
    assert {kind: value.value for kind, value in known.items()} == wide_hopper_launch.KINDS
    for kind, value in known.items():
        assert wide_hopper_kinds.bits_of(value.value) == wide_hopper_launch.bits(kind)
    affine = {f"affine{bits}" for bits in wide_hopper_launch.AFFINE_BITS}
    assert affine == {kind for kind in known if kind.startswith("affine")}


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
    matrices = [*loop[:2], "LDSM.16.MT88.4 R150, [R8]", loop[2].replace("0x1", "0x0")]
    assert overwritten_operands(matrices), "four registers"
    assert not overwritten_operands([line.replace(".4 ", ".2 ") for line in matrices])
