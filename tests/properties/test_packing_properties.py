"""Packing and format round trips for all widths, groups and shapes, against arithmetic done here."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit import bitpack
from quantkit.encoding import Affine, affine_codes, dequantize, pack_affine
from quantkit.errors import NumericsError
from quantkit.formats import FORMATS, get_format
from quantkit.formats.base import LayerStats, Needs

seeds = st.integers(0, 2**31)


@given(seeds, st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8]), st.integers(1, 200), st.sampled_from([8, 32]))
def test_low_first_packing_is_one_integer(seed: int, bits: int, count: int, word: int) -> None:
    """The words of a row, read as one little-endian integer, are the sum of code << (i * bits)."""
    codes = torch.randint(0, 1 << bits, (count,), generator=torch.Generator().manual_seed(seed))
    words = bitpack.pack_low(codes, bits, word)
    assert words.shape == (math.ceil(count * bits / word),)
    value = int.from_bytes(words.numpy().tobytes(), "little")
    assert value == sum(int(code) << (i * bits) for i, code in enumerate(codes))
    assert torch.equal(bitpack.unpack_low(words, bits, count).long(), codes)


@given(seeds, st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 70), st.integers(1, 5), st.integers(0, 7))
def test_canonical_packing_round_trip(seed: int, bits: int, count: int, rows: int, junk: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed))
    packed = bitpack.pack_canonical(codes.to(torch.uint8), bits)
    assert torch.equal(bitpack.unpack_canonical(packed, bits, count).long(), codes)
    if bits == 4 and count % 2 == 0:
        high = bitpack.pack_nibbles_high_first(codes.to(torch.uint8))
        assert torch.equal(bitpack.unpack_nibbles_high_first(high).long(), codes)
        assert torch.equal(high >> 4, codes[:, ::2].to(torch.uint8))


@given(seeds, st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 40), st.integers(1, 70), st.integers(1, 80))
def test_affine_dequantization_is_its_definition(seed: int, bits: int, n: int, k: int, group: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = math.ceil(k / group)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator)
    zero = torch.randint(0, 1 << bits, (n, groups), generator=generator)
    scale = torch.randn(n, groups, generator=generator)
    perm = torch.randperm(k, generator=generator) if seed % 2 else None
    packed = pack_affine(codes, scale, zero.to(torch.uint8), bits, group, perm=perm)
    assert packed.encoding == Affine(bits, group)
    assert torch.equal(affine_codes(packed).long(), codes)
    owner = torch.arange(k) // group
    want = (codes.double() - zero[:, owner].double()) * scale[:, owner].double()
    if perm is not None:
        want = torch.empty_like(want).index_copy_(1, perm, want)
    # one float32 product, rounded once
    torch.testing.assert_close(dequantize(packed).double(), want, rtol=2.0**-23, atol=1e-38)


def _options(draw: st.DrawFn, fmt: str) -> dict[str, object]:
    group = draw(st.sampled_from([16, 32, 64, 128]))
    return {
        "nf4": {"block_size": draw(st.sampled_from([64, 128])), "double_quant": draw(st.booleans())},
        "gptq": {"bits": draw(st.sampled_from([2, 3, 4, 8])), "group_size": draw(st.sampled_from([group, -1])),
                 "desc_act": draw(st.booleans()), "sym": draw(st.booleans())},
        "awq": {"group_size": group},
        "hqq": {"bits": draw(st.sampled_from([1, 2, 3, 4, 8])), "group_size": group},
        "fp8": {"scheme": draw(st.sampled_from(["block", "tensor"]))},
        "ternary": {"fit": draw(st.sampled_from(["weight", "absmean"]))},
    }[fmt]  # fmt: skip


@st.composite
def format_and_weight(draw: st.DrawFn) -> tuple[str, dict[str, object], torch.Tensor]:
    fmt = draw(st.sampled_from(sorted(FORMATS)))
    n, k = draw(st.integers(1, 24)) * draw(st.sampled_from([1, 8])), draw(st.integers(1, 9)) * 32
    generator = torch.Generator().manual_seed(draw(seeds))
    weight = torch.randn(n, k, generator=generator) * 10.0 ** draw(st.integers(-6, 3))
    kind = draw(st.sampled_from(["normal", "normal", "constant", "zero", "sparse", "outlier"]))
    if kind == "constant":
        weight[:] = weight[0, 0]
    elif kind == "zero":
        weight[draw(st.integers(0, n - 1))] = 0
    elif kind == "sparse":
        weight *= torch.rand(weight.shape, generator=generator) < 0.02
    elif kind == "outlier":
        weight[0, 0] *= 1000
    return fmt, _options(draw, fmt), weight


@given(format_and_weight())
def test_what_a_format_writes_it_reads_back_exactly(
    case: tuple[str, dict[str, object], torch.Tensor],
) -> None:
    name, options, weight = case
    fmt = get_format(name)
    try:
        config = fmt.Config(**options)
    except ValueError:
        return  # options that exclude each other, as 2 bits and desc_act might
    fit = fmt.fit(tuple(weight.shape), config)  # type: ignore[arg-type]
    if fit.config is None:
        assert fit.note
        return
    stats = None
    if fmt.needs(fit.config) is not Needs.NONE:
        x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(1))
        stats = LayerStats(64, x.T @ x, x.abs().sum(0), x.abs().amax(0))
    try:
        packed = fmt.quantize(weight.clone(), fit.config, stats)
    except NumericsError as error:  # float16 scales end at 65504: refused, not clipped
        assert float(weight.abs().max()) > 6e4 and "float16" in str(error)
        return
    tensors = fmt.to_checkpoint(packed, fit.config)
    spec = fmt.checkpoint_spec(tuple(weight.shape), fit.config)  # type: ignore[arg-type]
    assert spec.keys() == tensors.keys()
    for suffix, tensor in tensors.items():
        if tensor.dtype != torch.uint8 or "quant_state" not in suffix:
            assert (tensor.dtype, tuple(tensor.shape)) == (spec[suffix].dtype, spec[suffix].shape), suffix
    again = fmt.from_checkpoint(tensors, fit.config, tuple(weight.shape))  # type: ignore[arg-type]
    ours, theirs = dequantize(packed), dequantize(again)
    assert torch.isfinite(theirs).all()
    # Scales may be stored in fewer bits than they were computed in; bf16 has 8, and zeros come on top.
    spread = weight.abs().amax().clamp_min(1e-30)
    assert float((ours - theirs).abs().max() / spread) < 2e-2
    # The smallest scale of float16 is 2**-24: weights below it (found at 2e-8) become 0 or one or two of such steps,
    # and GPTQ's feedback chooses which. `convert` warns about such layers (tests/test_error_limits.py).
    least = 2 * 2.0**-24 if name in ("gptq", "awq", "hqq") else 0.0
    assert float((theirs - weight).abs().max()) <= (1.01 + (name == "ternary")) * float(spread) + least
