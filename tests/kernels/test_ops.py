"""The ops on a CPU: opcheck, gradients, fullgraph compilation with dynamic M, the layer that calls them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantkit.encoding import Affine, Codebook, Float8, PackedWeight, dequantize, expected_shapes
from quantkit.errors import UsageError
from quantkit.kernels import dispatch, ops, reference
from quantkit.linear import QuantLinear

Call = tuple[ops.Op, tuple[object, ...]]

ENCODINGS = {
    "affine4": Affine(4, 32),
    "affine3": Affine(3, 16),
    "affine1": Affine(1, 63),
    "codebook": Codebook(4, 64),
    "float8": Float8((16, 32)),
}


def random_packed(
    encoding: Affine | Codebook | Float8, n: int, k: int, *, perm: bool = False, float_zero: bool = False
) -> PackedWeight:
    shapes = expected_shapes(encoding, (n, k))
    codes = torch.randint(0, 256, shapes["codes"], dtype=torch.uint8)
    scale = torch.rand(shapes["scale"]) * 0.1 + 0.01
    if isinstance(encoding, Affine):
        zero = torch.randint(0, 1 << encoding.bits, shapes["scale"], dtype=torch.uint8)
        if float_zero:
            zero = zero + torch.rand(shapes["scale"])
        order = torch.randperm(k) if perm else None
        return PackedWeight(encoding, (n, k), codes, scale, zero, perm=order)
    if isinstance(encoding, Codebook):
        return PackedWeight(encoding, (n, k), codes, scale, lut=torch.linspace(-1, 1, 16))
    codes[(codes & 127) == 127] = 0  # e4m3's NaN
    return PackedWeight(encoding, (n, k), codes, scale)


def linear_call(x: Tensor, w: PackedWeight, bias: Tensor | None) -> Call:
    enc = w.encoding
    if isinstance(enc, Affine):
        args = (x, w.codes, w.scale, w.zero, bias, w.perm, enc.bits, enc.group_size, w.activation)
        return ops.affine_linear, args
    if isinstance(enc, Codebook):
        return ops.codebook_linear, (x, w.codes, w.scale, w.lut, bias, w.shape[0], enc.block_size)
    return ops.float8_linear, (x, w.codes, w.scale, bias, *enc.block, w.activation, w.input_scale)


def backward_call(grad: Tensor, w: PackedWeight) -> Call:
    enc, k = w.encoding, w.shape[1]
    if isinstance(enc, Affine):
        args = (grad, w.codes, w.scale, w.zero, w.perm, enc.bits, enc.group_size, k)
        return ops.affine_linear_backward, args
    if isinstance(enc, Codebook):
        return ops.codebook_linear_backward, (grad, w.codes, w.scale, w.lut, k, enc.block_size)
    return ops.float8_linear_backward, (grad, w.codes, w.scale, *enc.block)


def dequantize_call(w: PackedWeight, dtype: torch.dtype) -> Call:
    enc, (n, k) = w.encoding, w.shape
    if isinstance(enc, Affine):
        return ops.dequantize_affine, (w.codes, w.scale, w.zero, w.perm, enc.bits, enc.group_size, k, dtype)
    if isinstance(enc, Codebook):
        return ops.dequantize_codebook, (w.codes, w.scale, w.lut, n, k, enc.block_size, dtype)
    return ops.dequantize_float8, (w.codes, w.scale, *enc.block, dtype)


@pytest.mark.parametrize("name", ENCODINGS)
def test_opcheck(name: str) -> None:
    w = random_packed(ENCODINGS[name], 17, 63)
    x = torch.randn(2, 3, 63, requires_grad=True)
    bias = torch.randn(17, requires_grad=True)
    grad = torch.randn(2, 3, 17, requires_grad=True)
    calls = [linear_call(x, w, bias), backward_call(grad, w), dequantize_call(w, torch.float16)]
    for op, args in calls:
        torch.library.opcheck(op.definition, args)


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("perm", [False, True])
def test_gradients(name: str, perm: bool) -> None:
    if perm and not name.startswith("affine"):
        pytest.skip("only affine weights have an input permutation")
    w = random_packed(ENCODINGS[name], 5, 63, perm=perm)
    x = torch.randn(4, 63, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    op = linear_call(x, w, bias)[0]

    def run(x: Tensor, bias: Tensor) -> Tensor:
        return op(*linear_call(x, w, bias)[1])

    assert torch.autograd.gradcheck(run, (x, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, bias), fast_mode=True)
    dense = torch.nn.functional.linear(x, dequantize(w, torch.float64), bias)
    torch.testing.assert_close(run(x, bias), dense, rtol=1e-12, atol=1e-12)


def test_compiles_into_one_graph_with_dynamic_rows() -> None:
    layer = QuantLinear(random_packed(Affine(4, 16), 8, 48, perm=True), torch.randn(8))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 3, 7):
        x = torch.randn(rows, 48, requires_grad=True)
        out = compiled(x)
        torch.testing.assert_close(out, layer(x))
        (got,) = torch.autograd.grad(out.sum(), x)
        (want,) = torch.autograd.grad(layer(x).sum(), x)
        torch.testing.assert_close(got, want)


def test_layer_follows_autocast() -> None:
    layer = QuantLinear(random_packed(Affine(4, 16), 8, 48))
    x = torch.randn(3, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, layer(x.bfloat16()))


def test_layer_refuses_other_widths() -> None:
    layer = QuantLinear(random_packed(Affine(4, 16), 8, 48))
    with pytest.raises(UsageError, match="the input has 40 features; this layer takes 48"):
        layer(torch.randn(3, 40))


def test_no_rows_gives_no_rows() -> None:
    w = random_packed(Affine(4, 16), 8, 48)
    op, args = linear_call(torch.empty(0, 48), w, None)
    assert op(*args).shape == (0, 8)


def test_dispatch_falls_back_where_a_backend_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    w = random_packed(Affine(4, 16), 8, 48)
    x = torch.randn(3, 48)
    op, args = linear_call(x, w, None)
    asked: list[str] = []

    def decline(name: str, device: str) -> Callable[..., object]:
        asked.append(f"{name} on {device}")
        return lambda *_: NotImplemented

    monkeypatch.setattr(dispatch, "implementation", decline)
    torch.testing.assert_close(op(*args), reference.affine_linear(*args))
    assert asked == ["affine_linear on cpu"]


def test_int8_activations_follow_bitnets_rule_exactly() -> None:
    """Integer products times both scales, once: float64 recomputation from the integers."""
    k = 200
    codes = torch.randint(0, 3, (7, k), dtype=torch.uint8)
    from quantkit.encoding import pack_affine

    scale = torch.rand(7, 1) + 0.5
    w = pack_affine(codes, scale, torch.ones(7, 1, dtype=torch.uint8), 2, k, activation="int8_token")
    x = torch.randn(4, k)
    got = QuantLinear(w)(x)
    s = 127.0 / x.abs().amax(-1, keepdim=True)
    integers = (x * s).round().to(torch.int64) @ (codes.to(torch.int64) - 1).T
    want = integers.double() * (scale[:, 0] / s).double()
    torch.testing.assert_close(got, want.float(), rtol=0, atol=0)


def test_a_kernel_that_cannot_be_launched_is_reported_and_the_reference_answers(monkeypatch, caplog):
    from quantkit.kernels import dispatch, ops, reference

    x, codes = torch.randn(3, 64), torch.randint(0, 256, (5, 32), dtype=torch.uint8)
    arguments = (x, codes, torch.rand(5, 2), torch.rand(5, 2), None, None, 4, 32, None)
    expected = reference.affine_linear(*arguments)

    def broken(message):
        def kernel(*args):
            raise RuntimeError(message)

        monkeypatch.setattr(dispatch, "implementation", lambda op, device: kernel)

    broken("Triton Error [CUDA]: invalid argument")
    for _ in range(2):
        assert torch.equal(ops.affine_linear(*arguments), expected)
    said = [r.message for r in caplog.records if "quantkit::affine_linear" in r.message]
    assert len(said) == 1
    monkeypatch.setenv("QUANTKIT_KERNELS", "strict")
    with pytest.raises(RuntimeError, match="invalid argument"):
        ops.affine_linear(*arguments)
    monkeypatch.delenv("QUANTKIT_KERNELS")
    broken("a bug of ours")
    with pytest.raises(RuntimeError, match="a bug of ours"):
        ops.affine_linear(*arguments)


@pytest.mark.parametrize("name", ENCODINGS)
def test_plain_calls_pass_the_dispatcher_by_with_the_same_result(name: str) -> None:
    """Eager calls without gradients skip torch's dispatcher; gradients, modes and transforms do not."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    w = random_packed(ENCODINGS[name], 17, 63)
    x = torch.randn(3, 63)
    op, args = linear_call(x, w, None)
    direct = op(*args)
    assert ops._plain(args)
    assert torch.equal(direct, op.definition(*args))
    with Watch():
        assert torch.equal(op(*args), direct)
    assert any(f"quantkit.{op.name}" in call for call in seen)
    wanted = (args[0].clone().requires_grad_(), *args[1:])  # type: ignore[attr-defined]
    assert op(*wanted).requires_grad
    with torch.no_grad():
        assert not op(*wanted).requires_grad
    with torch.profiler.profile() as profile:
        op(*args)
    assert any(event.key == f"quantkit::{op.name}" for event in profile.key_averages())


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_accelerators_get_the_triton_family(device: str) -> None:
    """Both device types name the same backend for every op; nothing else does."""
    for encoding in ("affine", "codebook", "float8"):
        assert dispatch.BACKENDS[device][encoding] == f"quantkit.kernels.{encoding}"
    pytest.importorskip("triton")
    for name in ops.SCHEMAS:
        function = dispatch.implementation(name, device)
        assert function is None or function.__module__.startswith("quantkit.kernels.")
        assert function is not None or name == "affine_fused_linear"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantize_equals_bitsandbytes(kind: str, nested: bool, dtype: torch.dtype) -> None:
    owner = pytest.importorskip("bitsandbytes.functional")
    from quantkit.formats.nf4 import NF4, NF4Config

    weight = torch.randn(96, 320).to(dtype)
    codes, state = owner.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    stored = {"weight": codes} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    config = NF4Config(quant_type=kind, double_quant=nested, compute_dtype=str(dtype)[6:])
    packed = NF4().from_checkpoint(stored, config, (96, 320))
    op, args = dequantize_call(packed, dtype)
    assert torch.equal(op(*args), owner.dequantize_4bit(codes, state))
