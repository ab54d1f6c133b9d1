"""Packing and dequantization against independent definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import bitpack
from quantkit.encoding import Affine, Codebook, Float8, PackedWeight, dequantize, pack_affine


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    word=st.sampled_from([8, 32]),
    count=st.integers(1, 200),
    rows=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_pack_low_is_one_little_endian_bit_stream(bits, word, count, rows, seed):
    codes = torch.randint(
        0, 2**bits, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    packed = bitpack.pack_low(codes, bits, word)
    assert packed.dtype == (torch.uint8 if word == 8 else torch.int32)
    # Independent definition: bit j of code i is bit i * bits + j of the byte stream.
    flat = (codes.numpy()[..., None] >> np.arange(bits) & 1).reshape(rows, -1).astype(np.uint8)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % word)))
    expected = np.packbits(flat, axis=-1, bitorder="little").view("<u1" if word == 8 else "<i4")
    assert np.array_equal(packed.numpy(), expected)
    assert torch.equal(bitpack.unpack_low(packed, bits, count), codes)


@given(count=st.integers(1, 100), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_three_bit_planes(count, seed):
    codes = torch.randint(0, 8, (2, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = bitpack.pack_planes3(codes)
    assert packed.shape[1] == -(-count // 4) + -(-count // 8)
    assert torch.equal(bitpack.unpack_planes3(packed, count), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("k, group", [(63, 16), (64, 64), (100, 7), (8, 100)])
def test_affine_matches_float64(bits, k, group):
    n, groups = 5, -(-k // group)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale = torch.randn(n, groups)
    zero = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8)
    perm = torch.randperm(k)
    packed = pack_affine(codes, scale, zero, bits, group, perm=perm)
    expected = np.zeros((n, k))
    for i in range(n):
        for j in range(k):
            g = j // group
            expected[i, perm[j]] = (float(codes[i, j]) - float(zero[i, g])) * float(scale[i, g])
    assert np.array_equal(dequantize(packed, torch.float64).numpy(), expected)
    # float32: one rounding of an exact difference times the scale.
    np.testing.assert_allclose(dequantize(packed).numpy(), expected, rtol=2**-23)


def test_float16_scale_gives_the_owners_float16_numbers():
    """(q - zero) * scale in float32, rounded once, equals the float16 product of GPTQ's loaders."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    scale = torch.randn(1, 256).half()
    zero = torch.randint(0, 256, (1, 256), dtype=torch.uint8)
    packed = pack_affine(codes, scale, zero, 8, 1)
    owner = scale * (codes.half() - zero.half())
    assert torch.equal(dequantize(packed, torch.float16), owner)


def test_codebook_and_float8_match_float64():
    lut, n, k = torch.randn(16), 3, 50
    codes = torch.randint(0, 16, (n * k,), dtype=torch.uint8)
    absmax = torch.rand(-(-n * k // 64))
    packed = PackedWeight(Codebook(4, 64), (n, k), bitpack.pack_nibbles_high_first(codes), absmax, lut=lut)
    expected = lut.double()[codes.long()] * absmax.double()[torch.arange(n * k) // 64]
    assert torch.equal(dequantize(packed, torch.float64), expected.view(n, k))
    bytes_ = torch.randint(0, 255, (200, 130), dtype=torch.uint8)
    bytes_[(bytes_ & 127) == 127] = 0  # NaN codes
    scale = torch.rand(2, 2)
    packed = PackedWeight(Float8((128, 128)), (200, 130), bytes_, scale)
    value = bytes_.view(torch.float8_e4m3fn).double()
    for i, j in ((0, 0), (127, 129), (128, 127), (199, 129)):
        assert dequantize(packed, torch.float64)[i, j] == value[i, j] * scale[i // 128, j // 128].double()


@pytest.mark.parametrize(
    "change, text",
    [
        ({"scale": torch.ones(2, 3)}, "scale"),
        ({"codes": torch.zeros(2, 31, dtype=torch.uint8)}, "codes"),
        ({"codes": torch.zeros(2, 32, dtype=torch.int8)}, "uint8"),
        ({"zero": None}, "zero"),
        ({"perm": torch.arange(5)}, "perm"),
    ],
)
def test_wrong_shapes_are_refused(change, text):
    good = {
        "encoding": Affine(4, 32),
        "shape": (2, 64),
        "codes": torch.zeros(2, 32, dtype=torch.uint8),
        "scale": torch.ones(2, 2),
        "zero": torch.zeros(2, 2),
    }
    with pytest.raises(ValueError, match=text):
        PackedWeight(**{**good, **change})
