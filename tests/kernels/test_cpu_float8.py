"""float8 weights on a CPU: W bit for bit, products against float64, and what is left to the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantkit.encoding import Float8, PackedWeight
from quantkit.kernels import cpu, cpu_float8, reference
from quantkit.linear import QuantLinear

#: float32 sums over K <= 1000 terms, relative to the root of the terms' squares (as in codebook_float8_cases.py).
FLOAT32 = 2e-6
SHAPES = [
    (33, 256, (33, 256)),  # one scale
    (17, 200, (1, 200)),  # one a row
    (140, 300, (128, 128)),  # tails of both blocks
    (7, 45, (3, 5)),
    (5, 1, (1, 1)),
]


def weight(n: int, k: int, block: tuple[int, int], activation: Any = None) -> PackedWeight:
    """Random codes without the NaNs; all 254 where there is room, subnormal ones included."""
    valid = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    codes = valid[torch.randint(0, 254, (n * k,))]
    codes[:254] = valid[: n * k]
    scale = torch.rand(-(-n // block[0]), -(-k // block[1])) + 0.1
    fixed = torch.tensor([0.01]) if activation == "fp8_static" else None
    return PackedWeight(
        Float8(block), (n, k), codes.view(n, k), scale, activation=activation, input_scale=fixed
    )


def values(w: PackedWeight) -> torch.Tensor:
    """W in float64 from torch's own float8 numbers; a scale times a code of 4 bits is one rounding in float32."""
    assert isinstance(w.encoding, Float8)
    (n, k), (block_n, block_k) = w.shape, w.encoding.block
    wide = w.scale.double().repeat_interleave(block_n, 0)[:n].repeat_interleave(block_k, 1)[:, :k]
    return w.codes.view(torch.float8_e4m3fn).double() * wide


def arguments(w: PackedWeight) -> tuple[Any, ...]:
    assert isinstance(w.encoding, Float8)
    return w.codes, w.scale, *w.encoding.block


def product(x: torch.Tensor, w: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    codes, scale, block_n, block_k = arguments(w)
    return cpu.float8_linear(x, codes, scale, bias, block_n, block_k, w.activation, w.input_scale)


def error(got: torch.Tensor, x: torch.Tensor, w: PackedWeight, bias: torch.Tensor | None = None) -> float:
    wide, dense = x.double(), values(w)
    want, squares = wide @ dense.T, wide**2 @ dense.T**2
    if bias is not None:
        want, squares = want + bias.double(), squares + bias.double() ** 2
    assert got.shape == want.shape
    return float((got.double() - want).norm() / squares.sum().sqrt())


@pytest.mark.parametrize(("n", "k", "block"), SHAPES)
def test_weights_bit_for_bit(n: int, k: int, block: tuple[int, int]) -> None:
    w = weight(n, k, block)
    exact = values(w)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = cpu.dequantize_float8(*arguments(w), dtype)
        assert got.dtype == dtype and torch.equal(got, exact.float().to(dtype))
        assert torch.equal(got, reference.dequantize_float8(*arguments(w), dtype))


@pytest.mark.parametrize("slice_of", [None, 1000])
@pytest.mark.parametrize(("n", "k", "block"), SHAPES)
def test_products(
    n: int, k: int, block: tuple[int, int], slice_of: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one slice and in several, the last shorter; rows of x that are no matrix's own."""
    if slice_of:
        monkeypatch.setattr(cpu_float8, "SLICE", slice_of)
    w, bias = weight(n, k, block), torch.randn(n)
    for rows in (1, 3, 20):
        x = torch.randn(rows, k + 3)[:, :k]
        assert error(product(x, w, bias), x, w, bias) < FLOAT32
    x = torch.randn(2, 3, k)
    assert product(x, w).shape == (2, 3, n)
    grad = torch.randn(4, n)
    got = cpu.float8_linear_backward(grad, *arguments(w))
    assert torch.equal(got, reference.float8_linear_backward(grad, *arguments(w)))


@pytest.mark.parametrize("activation", ["fp8_token", "fp8_group128", "fp8_static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_activations(activation: str, dtype: torch.dtype) -> None:
    """Rounded by the rule's definition, then multiplied without further rounding but that of the result."""
    w = weight(40, 300, (128, 128), activation)
    x = torch.randn(5, 300).to(dtype)
    got = product(x, w)
    assert got.dtype == dtype
    wide, dense = reference.round_activation(x, w).double(), values(w)
    want, size = wide @ dense.T, (wide**2 @ dense.T**2).sqrt()
    # Half a unit in the last place of each result (of 8 and 11 bits), and what its float32 sum is off by: the bound
    # of the norm, twice for a single element.
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert bool(((got.double() - want).abs() <= rounding * want.abs() + 2 * FLOAT32 * size).all())


def test_what_the_reference_keeps() -> None:
    w = weight(33, 256, (33, 256))
    assert product(torch.randn(2, 256, dtype=torch.float64), w) is NotImplemented
    assert product(torch.randn(0, 256), w) is NotImplemented
    assert cpu.dequantize_float8(*arguments(w), torch.float64) is NotImplemented
    w.scale[0] = 2.0**119
    assert product(torch.randn(2, 256), w) is NotImplemented
    w.scale[0] = 1.0
    assert product(torch.randn(2, 256), w) is not NotImplemented


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_is_seen_when_it_comes(code: int) -> None:
    """Also after a first call that found none: the look is kept only while the codes do not change."""
    layer = QuantLinear(weight(40, 64, (1, 64)))
    x = torch.randn(3, 64)
    assert bool(layer(x).isfinite().all())
    layer.packed.codes[7, 3] = code
    assert product(x, layer.packed) is NotImplemented
    got = layer(x)
    assert bool(got[:, 7].isnan().all()) and bool(got[:, :7].isfinite().all())
