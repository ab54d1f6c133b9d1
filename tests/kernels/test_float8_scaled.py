"""Rounded activations of many rows through torch's scaled product: what goes there, how it is laid out, refusals.

What torch makes of it only a device shows; `float8_scaled_cases` holds what can be seen without one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from kernel_support import interpreted

pytest.importorskip("triton")

from quantkit.kernels import float8, float8_scaled, float8_tuning, launch
from quantkit.kernels.float8_scaled import Recipe

E4M3 = torch.float8_e4m3fn
M, N, K = 600, 256, 512
#: Rows from which the route answers here. Its own defaults are None: `test_off_by_default`.
ROWS, BLOCK_ROWS = 512, 576
PER_TENSOR, PER_ROW, TILES = (N, K), (1, K), (128, 128)


DEFAULTS = (float8_tuning.SCALED_ROWS, float8_tuning.SCALED_BLOCK_ROWS)


@pytest.fixture(autouse=True)
def nothing_refused() -> Iterator[None]:
    with mock.patch.object(float8_scaled, "_refused", set()):
        yield


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8_tuning, "SCALED_ROWS", ROWS)
    monkeypatch.setattr(float8_tuning, "SCALED_BLOCK_ROWS", BLOCK_ROWS)


def test_routes_in_the_interpreter_match_float64() -> None:
    errors = interpreted("float8_scaled_cases.py")
    assert len(errors) > 300
    bad = {case: e for case, e in errors.items() if not e <= 1}
    assert not bad, bad


def recipe(
    block: tuple[int, int],
    activation: str,
    target: tuple[str, int] = ("cuda", 90),
    m: int = M,
    n: int = N,
    k: int = K,
    dtype: torch.dtype = torch.bfloat16,
    **changed: Any,
) -> Recipe | None:
    block = (min(block[0], n), min(block[1], k)) if block != TILES else block
    given = {
        "x": torch.zeros(m, k, dtype=dtype),
        "codes": torch.zeros(n, k, dtype=torch.uint8),
        "scale": torch.ones(-(-n // block[0]), -(-k // block[1])),
        "bias": None,
    } | changed
    with mock.patch.object(launch, "target", lambda: target):
        return float8_scaled.recipe(**given, block_n=block[0], block_k=block[1], activation=activation)


def test_recipes() -> None:
    assert recipe(PER_TENSOR, "fp8_static") is Recipe.TENSOR
    assert recipe(PER_ROW, "fp8_static") is Recipe.ROW
    assert recipe(PER_TENSOR, "fp8_token") is Recipe.ROW
    assert recipe(PER_ROW, "fp8_token") is Recipe.ROW
    assert recipe(TILES, "fp8_group128") is Recipe.BLOCK
    assert recipe(TILES, "fp8_group128", n=144) is Recipe.BLOCK
    for block, activation in (
        (PER_ROW, "fp8_group128"), (TILES, "fp8_token"), (TILES, "fp8_static"), ((64, K), "fp8_token")
    ):  # fmt: skip
        assert recipe(block, activation) is None, (block, activation)
    assert recipe(TILES, "fp8_group128", k=600) is None


def test_devices() -> None:
    rows, blocks, tensors = (PER_ROW, "fp8_token"), (TILES, "fp8_group128"), (PER_TENSOR, "fp8_static")
    for target in (("cuda", 80), ("cuda", 86), ("hip", 0), ("xpu", 0), ("interpreter", 0)):
        assert not any(recipe(*case, target=target) for case in (rows, blocks, tensors)), target
    for arch in (100, 120):
        found = [recipe(*case, target=("cuda", arch)) for case in (rows, blocks, tensors)]
        assert found == [Recipe.ROW, None, Recipe.TENSOR]
    # Before 2.12 part of the row-wise product for sm_89 does not run on the current stream.
    for version, expected in (("2.11.0+cu130", None), ("2.12.0", Recipe.ROW), ("2.13.0+cpu", Recipe.ROW)):
        with mock.patch.object(torch, "__version__", torch.torch_version.TorchVersion(version)):
            assert recipe(*rows, target=("cuda", 89)) is expected
            assert recipe(*tensors, target=("cuda", 89)) is Recipe.TENSOR
            assert recipe(*rows) is Recipe.ROW


def test_sizes_and_addresses() -> None:
    rows = (PER_ROW, "fp8_token")
    assert recipe(*rows, m=ROWS) is Recipe.ROW
    assert recipe(*rows, m=ROWS - 1) is None
    assert recipe(PER_TENSOR, "fp8_static", m=ROWS) is Recipe.TENSOR
    assert recipe(PER_TENSOR, "fp8_static", m=ROWS - 1) is None
    assert recipe(TILES, "fp8_group128", m=BLOCK_ROWS) is Recipe.BLOCK
    assert recipe(TILES, "fp8_group128", m=BLOCK_ROWS - 1) is None
    assert recipe(*rows, n=248) is None and recipe(*rows, k=520) is None
    flat = torch.zeros(N * K + 8, dtype=torch.uint8)
    assert recipe(*rows, codes=flat[8:].view(N, K)) is None
    assert recipe(*rows, codes=torch.zeros(N, 2 * K, dtype=torch.uint8)[:, :K]) is None
    assert recipe(*rows, x=torch.zeros(M, K, device="meta"), codes=torch.zeros(N, K, device="meta")) is None


def test_either_is_switched_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = ((PER_ROW, "fp8_token"), (PER_TENSOR, "fp8_static"), (TILES, "fp8_group128"))
    monkeypatch.setattr(float8_tuning, "SCALED_ROWS", None)
    assert [recipe(*case) for case in cases] == [None, None, Recipe.BLOCK]
    monkeypatch.setattr(float8_tuning, "SCALED_ROWS", ROWS)
    monkeypatch.setattr(float8_tuning, "SCALED_BLOCK_ROWS", None)
    assert [recipe(*case) for case in cases] == [Recipe.ROW, Recipe.TENSOR, None]


@pytest.mark.parametrize(
    ("block", "activation"),
    [(PER_TENSOR, "fp8_static"), (PER_ROW, "fp8_static"), (PER_TENSOR, "fp8_token"), (PER_ROW, "fp8_token"),
     (TILES, "fp8_group128")],
)  # fmt: skip
def test_shipped_thresholds(block: tuple[int, int], activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the numbers measured on a device torch multiplies from 128 rows on, and `float8_native` before."""
    answer = torch.zeros(())
    native = mock.Mock(side_effect=lambda q, *_: answer.expand(q.shape[0], N))
    torchs = mock.Mock(side_effect=lambda q, *_, **__: answer.expand(q.shape[0], N))
    monkeypatch.setattr(float8, "launch_native", native)
    monkeypatch.setattr(float8_scaled, "scaled_mm", torchs)
    monkeypatch.setattr(float8, "launch", mock.Mock())  # rounding: its results are not looked at
    monkeypatch.setattr(launch, "target", lambda: ("cuda", 90))
    scale = torch.ones(-(-N // block[0]), -(-K // block[1]))
    weight = (torch.zeros(N, K, dtype=torch.uint8), scale, None, *block, activation, torch.ones(1))

    def linear(m: int) -> tuple[int, int]:
        float8.float8_linear(torch.zeros(m, K, dtype=torch.bfloat16), *weight)
        return native.call_count, torchs.call_count

    monkeypatch.setattr(float8_tuning, "SCALED_ROWS", DEFAULTS[0])
    monkeypatch.setattr(float8_tuning, "SCALED_BLOCK_ROWS", DEFAULTS[1])
    assert linear(float8_tuning.NATIVE_ROWS) == (1, 0)
    assert linear(127) == (2, 0)
    assert linear(128) == (2, 1)
    assert linear(4096) == (2, 2)
    monkeypatch.setattr(float8_tuning, "SCALED_ROWS", None)
    monkeypatch.setattr(float8_tuning, "SCALED_BLOCK_ROWS", None)
    assert linear(4096) == (3, 2), "switched off"


def test_biases() -> None:
    rows = (PER_ROW, "fp8_token")
    for dtype in (torch.bfloat16, torch.float16):
        assert recipe(*rows, dtype=dtype, bias=torch.zeros(N, dtype=dtype)) is Recipe.ROW
        assert recipe(*rows, dtype=dtype, bias=torch.zeros(N)) is None
        assert recipe(*rows, dtype=dtype, bias=torch.zeros(N + 1, dtype=dtype)[1:]) is None
    assert recipe(*rows, dtype=torch.float32) is Recipe.ROW
    assert recipe(*rows, dtype=torch.float32, bias=torch.zeros(N)) is None


def multiply(dtype: torch.dtype = torch.bfloat16, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    q, codes = torch.zeros(M, K).to(E4M3), torch.zeros(N, K, dtype=torch.uint8)
    return float8_scaled.multiply(
        q, torch.ones(M, 1), codes, torch.ones(N, 1), bias, Recipe.ROW, M, dtype
    )  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLt...`\nmore"),
        NotImplementedError("only supported in CUDA for SM90"),
        ValueError("Only bf16 and fp16 high precision output types are supported"),
    ],
)
def test_a_refusal_is_said_once_and_remembered(
    error: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QUANTKIT_KERNELS", raising=False)
    product = mock.Mock(side_effect=error)
    monkeypatch.setattr(float8_scaled, "scaled_mm", product)
    with caplog.at_level(logging.WARNING):
        assert multiply(torch.float16) is None
    (record,) = caplog.records
    text = record.getMessage()
    assert "\n" not in text and "row scales, float16" in text and str(error).splitlines()[0] in text
    assert recipe(PER_ROW, "fp8_token", dtype=torch.float16) is None
    # Another dtype, a bias or another recipe may still run.
    assert recipe(PER_ROW, "fp8_token") is Recipe.ROW
    bias = torch.zeros(N, dtype=torch.float16)
    assert recipe(PER_ROW, "fp8_token", dtype=torch.float16, bias=bias) is Recipe.ROW
    assert recipe(PER_TENSOR, "fp8_static", dtype=torch.float16) is Recipe.TENSOR


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), torch.AcceleratorError("lost")])
def test_a_failure_of_the_device_is_no_refusal(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTKIT_KERNELS", raising=False)
    monkeypatch.setattr(float8_scaled, "scaled_mm", mock.Mock(side_effect=error))
    with pytest.raises(type(error)):
        multiply()
    assert not float8_scaled._refused


def test_strict_hears_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_KERNELS", "strict")
    monkeypatch.setattr(float8_scaled, "scaled_mm", mock.Mock(side_effect=RuntimeError("not supported")))
    with pytest.raises(RuntimeError, match="not supported"):
        multiply()


def test_scales_of_blocks_are_copied_only_where_their_rows_are_no_multiple_of_16_bytes() -> None:
    scale = torch.rand(6, 8)
    assert float8_scaled._block_scale(scale).data_ptr() == scale.data_ptr()
    for other in (
        torch.rand(6, 5),
        torch.rand(1, 3),
        scale.half(),
        scale[:, :7],
        torch.rand(49)[1:].view(6, 8),
    ):
        laid = float8_scaled._block_scale(other)
        steps = other.shape[1]
        padded = -(-steps // 4) * 4
        assert laid.shape == (padded, other.shape[0]) and laid.stride() == (1, padded)
        assert laid.dtype == torch.float32 and laid.data_ptr() % 16 == 0
        assert torch.equal(laid.T[:, :steps], other.float()) and not laid[steps:].any()


def test_what_the_backend_hands_back_does_not_reach_torch() -> None:
    codes, scale = torch.zeros(N, K, dtype=torch.uint8), torch.ones(N, 1)
    product = mock.Mock()
    with (
        mock.patch.object(launch, "target", lambda: ("cuda", 90)),
        mock.patch.object(float8_scaled, "scaled_mm", product),
    ):
        for x, activation in (
            (torch.zeros(M, K, dtype=torch.float64), "fp8_token"),
            (torch.zeros(0, K), "fp8_token"),
            (torch.zeros(M, K), "int8_token"),
        ):
            assert float8.float8_linear(x, codes, scale, None, 1, K, activation, None) is NotImplemented
        # Tiles that no step of K divides: the kernel answers with NotImplemented itself.
        odd = (torch.zeros(32, 96, dtype=torch.uint8), torch.ones(4, 4), None, 8, 24, None, None)
        assert float8.float8_linear(torch.zeros(5, 96), *odd) is NotImplemented
    assert not product.called
