"""The CPU path: onnxruntime's operators and torch's int4 operator against the reference in float64."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.algorithms import codebook
from quantkit.encoding import Affine, Codebook, PackedWeight, pack_affine
from quantkit.errors import UsageError
from quantkit.kernels import (
    cpu,
    cpu_blas,
    cpu_codebook,
    cpu_sessions,
    cpu_weights,
    cpu_workers,
    dispatch,
    reference,
)
from quantkit.linear import QuantLinear, set_cpu_activations

needs_ort = pytest.mark.skipif(not cpu_sessions.available(), reason="onnxruntime is not installed")

#: float32 sums of K <= 1000 products: sqrt(K) * 2**-24 is 2e-6 at most, relative to the output's norm.
FLOAT32 = 2e-6
#: int8 rounding as well: an input next to a tie may fall to either side (a step of 1/127 of its block's
#: maximum, 3e-4 of the output here). Not rounding at all would show as 5e-3.
INT8 = 1.5e-3


@pytest.fixture(autouse=True)
def fresh_sessions() -> Iterator[None]:
    cpu_sessions.forget()
    yield
    cpu_sessions.forget()


def affine(
    n: int,
    k: int,
    bits: int,
    group: int,
    *,
    zeros: str = "integer",
    perm: bool = False,
    activation: str | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> PackedWeight:
    codes = torch.randint(0, 2**bits, (n, k))
    groups = -(-k // group)
    scale = (torch.rand(n, groups) * 0.02 + 0.001).to(scale_dtype)
    zero = {
        "integer": lambda: torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8),
        "middle": lambda: torch.full((n, groups), 2 ** (bits - 1), dtype=torch.uint8),
        "beyond": lambda: torch.full((n, groups), min(2**bits, 255), dtype=torch.uint8),
        "float": lambda: torch.rand(n, groups) * (2**bits - 1),
    }[zeros]()
    order = torch.randperm(k) if perm else None
    return pack_affine(codes, scale, zero, bits, group, perm=order, activation=activation)  # type: ignore[arg-type]


def run(packed: PackedWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The CPU backend's answer, which may be NotImplemented."""
    enc, k = packed.encoding, (packed.codes, packed.scale)
    if isinstance(enc, Affine):
        assert packed.zero is not None
        tail = (enc.bits, enc.group_size, packed.activation)
        return cpu.affine_linear(x, *k, packed.zero, bias, packed.perm, *tail)
    assert isinstance(enc, Codebook) and packed.lut is not None
    return cpu.codebook_linear(x, *k, packed.lut, bias, packed.shape[0], enc.block_size)


def error(got: Tensor, packed: PackedWeight, x: Tensor, bias: Tensor | None = None) -> float:
    wide = None if bias is None else bias.double()
    want = reference.quant_linear(x.double(), packed, wide)
    return float((got.double() - want).norm() / want.norm())


@needs_ort
@pytest.mark.parametrize("activation", [None, "int8_block"])
@pytest.mark.parametrize("zeros", ["integer", "middle", "beyond", "float"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_affine_matches_reference(bits: int, zeros: str, activation: str | None) -> None:
    """Every width and kind of zero, with odd N, a K tail, groups from 16 to the row, one row and several."""
    for n, k, group in [(63, 1000, 128), (64, 512, 32), (17, 96, 96), (33, 240, 48), (9, 64, 16)]:
        packed = affine(n, k, bits, group, zeros=zeros, activation=activation)
        for rows in (1, 5):
            x, bias = torch.randn(rows, k), torch.randn(n)
            got = run(packed, x, bias)
            assert got.shape == (rows, n) and got.dtype == torch.float32
            assert error(got, packed, x, bias) < (INT8 if activation else FLOAT32), (n, k, group, rows)


@needs_ort
@pytest.mark.parametrize("activation", [None, "int8_block"])
def test_affine_with_permutation(activation: str | None) -> None:
    packed = affine(31, 200, 4, 40 if activation is None else 32, perm=True, activation=activation)
    if packed.encoding == Affine(4, 40):
        assert run(packed, torch.randn(2, 200)) is NotImplemented  # 40 has no factor 16
        packed = affine(31, 200, 4, 64, perm=True)
    x = torch.randn(2, 200)
    assert error(run(packed, x), packed, x) < (INT8 if activation else FLOAT32)


@needs_ort
def test_int8_mode_rounds_and_exact_mode_does_not() -> None:
    """The two modes differ by what int8 loses, so neither quietly runs the other's kernel."""
    exact = affine(64, 512, 4, 128)
    x = torch.randn(4, 512)
    rounded = PackedWeight(
        exact.encoding, exact.shape, exact.codes, exact.scale, exact.zero, activation="int8_block"
    )
    assert error(run(rounded, x), rounded, x) < INT8
    assert 3e-3 < error(run(rounded, x), exact, x) < 2e-2


@needs_ort
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    """Half inputs run in float32 and are rounded once: at most half a unit in the last place per element."""
    packed = affine(48, 256, 4, 64)
    x = torch.randn(2, 3, 256).to(dtype)
    got = run(packed, x)
    assert got.dtype == dtype and got.shape == (2, 3, 48)
    want = reference.quant_linear(x.double(), packed)
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)


@needs_ort
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(64, 512), (63, 1000), (16, 96)])
def test_ternary_int8_is_exact(n: int, k: int, dtype: torch.dtype) -> None:
    """BitNet's rule is a product of integers: the same bits as the reference."""
    codes = torch.randint(0, 3, (n, k))
    scale, zero = torch.rand(n, 1) + 0.5, torch.ones(n, 1, dtype=torch.uint8)
    packed = pack_affine(codes, scale, zero, 2, k, activation="int8_token")
    x = torch.randn(5, k).to(dtype)
    assert torch.equal(run(packed, x), reference.quant_linear(x, packed))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("n", "k", "block"), [(63, 1000, 64), (64, 512, 64), (5, 7, 64), (33, 100, 32)])
def test_codebook_matches_reference(kind: str, n: int, k: int, block: int) -> None:
    """Blocks that straddle rows included (K = 1000 and 7 are no multiples of 64)."""
    packed = nf4(n, k, block, kind)
    for rows in (1, 4):
        x, bias = torch.randn(rows, k), torch.randn(n)
        assert error(run(packed, x, bias), packed, x, bias) < FLOAT32


def nf4(n: int, k: int, block: int = 64, kind: str = "nf4", lut: Tensor | None = None) -> PackedWeight:
    codes = torch.randint(0, 256, (-(-n * k // 2),), dtype=torch.uint8)
    lut = codebook.table(kind, torch.device("cpu")) if lut is None else lut
    return PackedWeight(Codebook(4, block), (n, k), codes, torch.rand(-(-n * k // block)) + 0.1, lut=lut)


def test_any_table_and_gradients_of_codebooks() -> None:
    """Tables of someone's own too; dx and the dense weight are the reference's, bit for bit."""
    for n, k, block in [(8, 64, 64), (63, 1000, 64), (5, 7, 64), (33, 100, 32)]:
        packed = nf4(n, k, block, lut=torch.randn(16))
        assert packed.lut is not None
        for rows in (2, 20):  # multiplied where it was decoded, and by BLAS
            x, grad = torch.randn(rows, k), torch.randn(rows, n)
            assert error(run(packed, x), packed, x) < FLOAT32
            w = (packed.codes, packed.scale, packed.lut)
            want = reference.codebook_linear_backward(grad, *w, k, block)
            assert torch.equal(cpu.codebook_linear_backward(grad, *w, k, block), want)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            want = reference.dequantize_codebook(*w, n, k, block, dtype)
            assert torch.equal(cpu.dequantize_codebook(*w, n, k, block, dtype), want)


@pytest.mark.parametrize("alone", [True, False])
def test_codebook_slices(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces, the last shorter, on three threads; and several slices where BLAS cannot run on one thread alone."""
    if alone and not cpu_blas.available():
        pytest.skip("this torch has no MKL")
    if not alone:
        monkeypatch.setattr(cpu_blas, "_set_threads", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(cpu_codebook, "PIECE", 1 << 12)
    monkeypatch.setattr(cpu_codebook, "SLICE_BYTES", 1 << 16)
    for n, k in [(200, 256), (130, 1000)]:
        packed = nf4(n, k)
        for rows in (1, 8, 9, 33):
            x = torch.randn(rows, k)
            assert error(run(packed, x), packed, x) < FLOAT32
    assert cpu_workers.count() >= 2


@pytest.mark.skipif(not cpu_blas.available(), reason="this torch has no MKL")
def test_products_alone_leave_other_products_their_threads() -> None:
    """Also after an error inside; and what the thread had asked for before comes back."""
    set_threads = cpu_blas._set_threads()
    assert set_threads is not None
    a, b, out = torch.randn(3, 40), torch.randn(40, 5), torch.empty(3, 5)
    for own in (0, 2):
        set_threads(own)
        cpu_blas.mm(a, b, out)
        assert float((out.double() - a.double() @ b.double()).norm()) < 1e-5
        with pytest.raises(RuntimeError):
            cpu_blas.mm(a, b.t(), out)
        assert set_threads(0) == own


def test_refused_arguments() -> None:
    packed = affine(8, 100, 4, 20)
    assert run(packed, torch.randn(1, 100)) is NotImplemented  # no power of two >= 16 divides 20
    packed = affine(8, 64, 4, 32)
    assert run(packed, torch.randn(1, 64, dtype=torch.float64)) is NotImplemented
    assert run(packed, torch.randn(0, 64)) is NotImplemented


@needs_ort
def test_weights_are_not_copied() -> None:
    """What the node gets for B is the layer's own memory, where the layout allows it."""
    packed = affine(64, 512, 4, 128)
    assert packed.zero is not None
    for level in (cpu_weights.FLOAT32, cpu_weights.INT8):
        plan = cpu_weights.plan(packed.codes, packed.scale, packed.zero, 512, 4, 128, 128, level)
        assert plan.nodes[0].initializers["b"].data_ptr() == packed.codes.data_ptr()
        session = plan.nodes[0].session([packed.codes])
        assert set(session.kept) == {"scales", "zeros"}  # converted to float32, and packed


@needs_ort
@pytest.mark.parametrize("bits", [2, 8])
def test_widened_codes_are_freed_or_kept_as_onnxruntime_needs(bits: int) -> None:
    """Two planes of 8 bits, or 2 bits widened to 4: overwriting the memory that was freed changes nothing."""
    packed = affine(64, 512, bits, 64)
    assert packed.zero is not None
    plan = cpu_weights.plan(packed.codes, packed.scale, packed.zero, 512, bits, 64, 64, cpu_weights.FLOAT32)
    x = torch.randn(3, 512)
    for node in plan.nodes:
        session = node.session()
        want = session(x)
        if "b" not in session.kept:
            node.initializers["b"].fill_(0)
        assert torch.equal(session(x), want)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_unpack_equals_bitpack(bits: int) -> None:
    packed = affine(7, 101, bits, 101)
    from quantkit.encoding import affine_codes

    assert torch.equal(cpu_weights.unpack(packed.codes, bits, 101), affine_codes(packed))


@needs_ort
def test_sessions_follow_their_tensors() -> None:
    packed = affine(16, 64, 4, 32)
    layer = QuantLinear(packed)
    x = torch.randn(1, 64)
    first = layer(x)
    assert cpu_sessions.count() == 1
    layer(x)
    assert cpu_sessions.count() == 1
    with torch.no_grad():  # a write is seen
        layer.scale.mul_(2)
    torch.testing.assert_close(layer(x), 2 * first, rtol=1e-5, atol=1e-6)
    other = affine(16, 64, 4, 32)
    layer.load_state_dict(QuantLinear(other).state_dict())
    assert error(layer(x), other, x) < FLOAT32
    assert cpu_sessions.count() == 1
    del layer, packed
    gc.collect()
    assert cpu_sessions.count() == 0


@needs_ort
def test_module_stays_plain_after_a_call() -> None:
    """deepcopy, pickle and a move to another device work on a layer that has a session."""
    packed = affine(16, 64, 4, 32)
    layer = QuantLinear(packed)
    x = torch.randn(2, 64)
    want = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), want)
    assert layer.to("meta")(x.to("meta")).shape == want.shape


@needs_ort
def test_concurrent_calls() -> None:
    layers = [QuantLinear(affine(32, 128, 4, 32)) for _ in range(3)]
    x = torch.randn(8, 3, 128)
    with dispatch.use_reference():
        want = [[layer(x[i]) for layer in layers] for i in range(8)]
    failures: list[object] = []

    def work(i: int) -> None:
        for _ in range(5):
            for layer, expected in zip(layers, want[i]):
                if not torch.allclose(layer(x[i]), expected, rtol=1e-4, atol=1e-4):
                    failures.append((i, layer))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert cpu_sessions.count() == 3


@needs_ort
def test_sessions_share_one_thread_pool() -> None:
    psutil = pytest.importorskip("psutil")
    layers = [QuantLinear(affine(16, 64, 4, 32)) for _ in range(12)]
    x = torch.randn(1, 64)
    layers[0](x)
    before = psutil.Process().num_threads()
    for layer in layers:
        layer(x)
    assert psutil.Process().num_threads() == before


@needs_ort
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_parts_on_several_threads(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer large enough is cut into parts of rows; the last one is shorter."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x = torch.randn(rows, 1024)
    for packed in (affine(2060, 1024, 4, 64), affine(2060, 1024, 8, 64)):
        assert error(run(packed, x), packed, x) < FLOAT32
    (entry,) = cpu_sessions._entries.values()  # that of the weight that still lives: two planes
    # One piece for each thread, and two for whoever is free first.
    assert [len(session._parts) for session in entry.value.sessions] == [5, 5]
    assert cpu_workers.count() >= 2  # beside the caller's own thread


@needs_ort
@pytest.mark.parametrize(("rows", "jobs"), [(1, 1), (8, 1), (9, 1), (40, 2), (50, 3), (200, 3)])
def test_threads_take_rows_of_x_where_a_layer_is_small(
    rows: int, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    given = []
    run_all = cpu_workers.run_all

    def counted(jobs: Any, threads: int, own: Any = None) -> None:
        given.append((len(jobs), threads))
        run_all(jobs, threads, own)

    monkeypatch.setattr(cpu_workers, "run_all", counted)
    packed, x = affine(1000, 1024, 4, 64), torch.randn(rows, 1024)
    run(packed, torch.randn(1, 1024))
    given.clear()
    assert error(run(packed, x), packed, x) < FLOAT32
    assert given == [(jobs, jobs)]
    (entry,) = cpu_sessions._entries.values()
    assert [len(session._parts) for session in entry.value.sessions] == [1]


@needs_ort
def test_no_thread_is_left_without_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few outputs of very long rows are one piece, and worth more threads than nine rows are."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(cpu_sessions, "SHARED_WORK", 1000)
    given = []

    def counted(jobs: Any, threads: int, own: Any = None) -> None:
        given.append((len(jobs), threads))
        for function, argument in jobs:
            function(argument)

    monkeypatch.setattr(cpu_workers, "run_all", counted)
    packed, x = affine(64, 1024, 4, 64), torch.randn(9, 1024)
    assert error(run(packed, x), packed, x) < FLOAT32
    assert given[-1] == (9, 9)


@needs_ort
def test_other_users_of_onnxruntime_are_not_disturbed() -> None:
    """A session with default options still builds beside ours (with a global thread pool it would not)."""
    import onnxruntime

    packed = affine(16, 64, 4, 32)
    run(packed, torch.randn(1, 64))
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "other",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": torch.tensor([-1.0, 2.0]).numpy()})[0].tolist() == [0.0, 2.0]


@needs_ort
def test_gradients_pass() -> None:
    packed = affine(24, 96, 4, 32)
    x = torch.randn(3, 96, requires_grad=True)
    grad = torch.randn(3, 24)
    QuantLinear(packed)(x).backward(grad)
    want = reference.affine_linear_backward(grad.double(), *_tensors(packed), 4, 32, 96)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), want, rtol=1e-4, atol=1e-5)


def _tensors(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    assert packed.zero is not None
    return packed.codes, packed.scale, packed.zero, packed.perm


@needs_ort
def test_compiles_with_dynamic_rows() -> None:
    layer = QuantLinear(affine(24, 96, 4, 32))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (1, 3, 7):
        x = torch.randn(rows, 96)
        assert torch.equal(compiled(x), layer(x))
    assert cpu_sessions.count() == 1


@needs_ort
def test_cpu_activations_is_a_choice_of_the_model() -> None:
    model = torch.nn.Sequential(
        QuantLinear(affine(64, 64, 4, 32, scale_dtype=torch.float32)), QuantLinear(nf4(64, 64))
    )
    x = torch.randn(2, 64)
    exact = model(x)
    assert set_cpu_activations(model, "int8") == 1
    rounded = model(x)
    assert 1e-3 < float((rounded - exact).norm() / exact.norm()) < 5e-2
    set_cpu_activations(model, "exact")
    assert torch.equal(model(x), exact)
    with pytest.raises(UsageError, match="Did you mean 'int8'"):
        set_cpu_activations(model, "int4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zeros", ["integer", "float"])
def test_torch_int4_operator_without_onnxruntime(
    zeros: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_sessions, "available", lambda: False)
    cpu._say_once.cache_clear()
    packed = affine(64, 256, 4, 64, zeros=zeros)
    x, bias = torch.randn(2, 256).to(dtype), torch.randn(64).to(dtype)
    for _ in range(2):
        got = run(packed, x, bias)
    # bfloat16: the operator rounds scale and offset (up to 2**-9 each) as the reference rounds the weight.
    assert error(got, packed, x, bias) < (FLOAT32 if dtype == torch.float32 else 1e-2)
    assert sum("quantkit[cpu]" in message for message in caplog.messages) == 1
    assert run(affine(63, 256, 4, 64), x) is NotImplemented  # N no multiple of 16
    assert run(affine(64, 256, 2, 64), x) is NotImplemented
    cpu._say_once.cache_clear()
