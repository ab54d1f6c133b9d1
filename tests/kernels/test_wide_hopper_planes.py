"""Two and three bits in the fused product of many rows: its decoding, run as Python with PTX on numpy arrays, makes
the same weights as `quantkit.encoding.dequantize`. (Which thread holds what is the compiler's: it refuses to move.)
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gluon_values import BFLOAT16, FLOAT16, Values, plain

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from quantkit.encoding import Affine, PackedWeight, dequantize, pack_affine
from quantkit.kernels import wide_hopper_planes
from quantkit.kernels.wide_hopper_affine import one_addition

PLANES = plain(wide_hopper_planes)
DTYPES = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


def decoded(weight: PackedWeight, step: int, dtype: torch.dtype, exact_sum: bool) -> torch.Tensor:
    """Inputs 64 * step to 64 * step + 63 of every row, through the functions that the kernel calls."""
    assert isinstance(weight.encoding, Affine) and weight.zero is not None
    bits, k = weight.encoding.bits, weight.shape[1]
    words = weight.codes.numpy().view(np.uint32)
    turn = step // 2
    low = Values(words[:, 8 * turn : 8 * turn + 8])
    high = low if bits == 2 else Values(words[:, k // 16 :][:, 4 * turn : 4 * turn + 4])
    group = 64 * step // weight.encoding.group_size
    scale, zero = (Values(t[:, group].float().numpy()) for t in (weight.scale, weight.zero))
    table = PLANES["tables"](scale, zero, exact_sum, bits, DTYPES[dtype])
    of_step = PLANES["words_of_step"](low, high, step % 2, bits, None)
    constants = PLANES["quad_constants"](None)
    pairs = PLANES["look_up"](of_step, constants, table, bits)
    out = PLANES["operand_of"](pairs, DTYPES[dtype], None, None)
    return torch.from_numpy(out.array.view(np.int16).copy()).view(dtype)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale_dtype", "zeros"), [
    (torch.float16, "integer"), (torch.bfloat16, "integer"), (torch.float32, "integer"), (torch.float16, "float"),
])  # fmt: skip
def test_weights_are_those_of_the_definition(
    bits: int, dtype: torch.dtype, scale_dtype: torch.dtype, zeros: str
) -> None:
    """All integer zeros (a byte holds more than codes need), every code at every place, three turns of K."""
    generator = torch.Generator().manual_seed(bits)
    n, k, group = 256, 384, 64
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(n, k // group, generator=generator) * 2 - 1).mul(0.02).to(scale_dtype)
    zero = torch.arange(n).view(n, 1).repeat(1, k // group).to(torch.uint8)
    if zeros == "float":
        zero = (torch.rand(n, k // group, generator=generator) * 2**bits).half()
    weight = pack_affine(codes, scale, zero, bits, group)
    want = dequantize(weight, dtype)
    for exact_sum in (False, True) if zeros == "integer" and scale.element_size() == 2 else (False,):
        got = torch.cat([decoded(weight, step, dtype, exact_sum) for step in range(k // 64)], 1)
        assert torch.equal(got, want)


@pytest.mark.parametrize("bits", [2, 3])
def test_every_place_takes_its_own_bits(bits: int) -> None:
    """One code that is not zero, at every place of a turn, with every value."""
    k = 128
    codes = torch.zeros(k * (2**bits - 1), k, dtype=torch.uint8)
    for value in range(1, 2**bits):
        codes[(value - 1) * k : value * k].fill_diagonal_(value)
    n = codes.shape[0]
    weight = pack_affine(codes, torch.ones(n, 1), torch.zeros(n, 1, dtype=torch.uint8), bits, k)
    got = torch.cat([decoded(weight, step, torch.bfloat16, True) for step in (0, 1)], 1)
    assert torch.equal(got, codes.to(torch.bfloat16))


def test_one_addition_is_exact() -> None:
    """code * scale - zero * scale in float32, for every code, every zero, and scales of 11 and 8 bits."""
    code, zero = torch.arange(8.0).view(-1, 1, 1), torch.arange(256.0).view(1, -1, 1)
    halves = torch.arange(1, 2**15 - 2**10, 7, dtype=torch.int16).view(torch.float16).float()
    brains = torch.arange(2**7, 2**15 - 2**11, 5, dtype=torch.int16).view(torch.bfloat16).float()
    for scale in (halves, brains):
        product = -zero * scale
        assert torch.equal(product.double(), -zero.double() * scale.double())
        exact = (code.double() - zero.double()) * scale.double()
        assert torch.equal(exact.float().double(), exact)
    assert one_addition(DType(16), DType(8, True))
    assert not one_addition(DType(32), DType(8, True))
    assert not one_addition(DType(16), DType(16))


class DType:
    """What `one_addition` asks of a dtype."""

    def __init__(self, bits: int, integer: bool = False) -> None:
        self.primitive_bitwidth, self.integer = bits, integer

    def is_int(self) -> bool:
        return self.integer
