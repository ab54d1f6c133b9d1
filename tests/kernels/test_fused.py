"""Concatenated layers and what surrounds a product, each on and off, against float64 (composed on a CPU)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from quantkit.encoding import Affine, PackedWeight, dequantize, pack_affine
from quantkit.errors import UsageError
from quantkit.kernels import ops
from quantkit.kernels.fused import concatenate_rows, fused_linear
from quantkit.linear import QuantLinear


def weight(n: int, k: int = 48, *, perm: Tensor | None = None, bits: int = 4) -> PackedWeight:
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    scale = torch.rand(n, k // 16) * 0.1 + 0.01
    zero = torch.randint(0, 1 << bits, scale.shape, dtype=torch.uint8)
    return pack_affine(codes, scale, zero, bits, 16, perm=perm)


@pytest.mark.parametrize(
    ("norm", "gated", "residual", "bias"), list(itertools.product([False, True], repeat=4))
)
def test_each_step_on_and_off(norm: bool, gated: bool, residual: bool, bias: bool) -> None:
    w = weight(22)
    x = torch.randn(2, 3, 48) * 2
    out_features = 11 if gated else 22
    norm_weight = torch.randn(48) if norm else None
    b = torch.randn(22) if bias else None
    r = torch.randn(2, 3, out_features) if residual else None
    got = fused_linear(x, w, b, residual=r, norm_weight=norm_weight, norm_eps=1e-5, gated=gated)
    want = x.double()
    if norm_weight is not None:
        want = want / (want.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm_weight.double()
    want = want @ dequantize(w, torch.float64).T
    want = want if b is None else want + b.double()
    if gated:
        gate, up = want[..., :11], want[..., 11:]
        want = gate * torch.sigmoid(gate) * up
    want = want if r is None else want + r.double()
    assert got.dtype == torch.float32 and got.shape == want.shape
    # float32 throughout: a few roundings of sums of 48 terms.
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


def test_concatenated_rows_are_the_layers_side_by_side() -> None:
    parts = [weight(8), weight(4), weight(4)]
    x = torch.randn(5, 48)
    separate = torch.cat([QuantLinear(p)(x) for p in parts], dim=-1)
    torch.testing.assert_close(fused_linear(x, concatenate_rows(parts)), separate, rtol=1e-6, atol=1e-6)


def test_concatenation_keeps_a_common_input_order() -> None:
    order = torch.randperm(48)
    parts = [weight(8, perm=order), weight(4, perm=order.clone())]
    x = torch.randn(5, 48)
    separate = torch.cat([QuantLinear(p)(x) for p in parts], dim=-1)
    torch.testing.assert_close(fused_linear(x, concatenate_rows(parts)), separate, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: weight(4, bits=8), "only affine weights of one encoding"),
        (lambda: weight(4, k=64), "takes other inputs"),
        (lambda: weight(4, perm=torch.randperm(48)), "another input permutation"),
    ],
)
def test_unequal_layers_are_refused(other: object, message: str) -> None:
    assert callable(other)
    with pytest.raises(UsageError, match=f"(?i){message}"):
        concatenate_rows([weight(8), other()])


def test_odd_gates_and_rounded_activations_are_refused() -> None:
    with pytest.raises(UsageError, match="even number of rows, not 7"):
        fused_linear(torch.randn(1, 48), weight(7), gated=True)
    ternary = pack_affine(
        torch.ones(4, 48, dtype=torch.uint8),
        torch.ones(4, 1),
        torch.ones(4, 1, dtype=torch.uint8),
        2,
        48,
        activation="int8_token",
    )
    assert isinstance(ternary.encoding, Affine)
    with pytest.raises(UsageError, match="without rounded activations"):
        fused_linear(torch.randn(1, 48), ternary)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_few_rows_take_one_launch(rows: int, target: str) -> None:
    """Concatenated q, k and v, and a product with norm, gate, bias and residual around it: one kernel each."""
    pytest.importorskip("triton")
    from quantkit.kernels import affine, aot

    k, n = 4096, 4096 + 1024 + 1024

    def empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, bias = empty(rows, k), empty(n)
    w = (empty(n, k // 2, dtype=torch.uint8), empty(n, k // 128), empty(n, k // 128, dtype=torch.uint8))
    with aot.record(aot.parse_target(target)) as records:
        assert affine.affine_linear(x, *w, bias, None, 4, 128, None).shape == (rows, n)
    assert [r.name for r in records] == [
        "few_rows_kernel" if rows <= 4 and target == "sm_80" else "affine_gemm_kernel"
    ]
    residual = empty(rows, n // 2)
    with aot.record(aot.parse_target(target)) as records:
        out = affine.affine_fused_linear(x, *w, bias, None, residual, empty(k), 1e-5, True, 4, 128)
    assert out.shape == (rows, n // 2) and [r.name for r in records] == ["affine_gemm_kernel"]


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated: bool) -> None:
    w = weight(22)
    args = (w.codes, w.scale, w.zero, None, None, None, torch.randn(48), 1e-6, gated, 4, 16)
    torch.library.opcheck(ops.affine_fused_linear.definition, (torch.randn(3, 48), *args))
