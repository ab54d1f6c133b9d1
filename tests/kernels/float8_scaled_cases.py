"""What the route through torch's scaled product is checked on, in Triton's interpreter.

Run as a program (`TRITON_INTERPRET=1 python float8_scaled_cases.py`) it prints one JSON object, case -> error relative
to its bound (`codebook_float8_cases`); a case fails above 1. A device of sm_90 is pretended. `documented` stands for
torch on it: the checks of torch about 2.11 (ATen/native/cuda/ScaledBlas.cpp) and of cuBLAS's manual ("128-element
1D and 128x128 2D block scaling"), scales read from memory as cuBLAS reads them, sums in float64. Where torch itself
has the product on a CPU (scales per tensor and per row), it multiplies as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from codebook_float8_cases import error, float8_weight
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from quantkit.encoding import PackedWeight, dequantize
from quantkit.kernels import float8, float8_scaled, float8_tuning, launch, reference

E4M3 = torch.float8_e4m3fn
#: (dtype, bounds of float16): bfloat16 has three bits less.
DTYPES = ((torch.float32, 1.0), (torch.float16, 1.0), (torch.bfloat16, 4.0))
#: Rows from which the routes answer here: sizes that an interpreter can take.
NATIVE, SCALED, SCALED_BLOCK = 8, 16, 20


def check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def memory(tensor: Tensor, count: int) -> Tensor:
    """`count` numbers from the tensor's address on, whatever its strides."""
    check(tensor.dtype == torch.float32, "scales must be float32")
    check(tensor.data_ptr() % 16 == 0, "scales must begin at a multiple of 16 bytes")
    return tensor.as_strided((count,), (1,)).double()


def strides(scale: Tensor, major: int) -> bool:
    return scale.stride(0) == 1 and (
        scale.stride(1) == major or (scale.size(1) == 1 and scale.stride(1) == 1)
    )


def documented(
    q: Tensor,
    w: Tensor,
    scale_a: Tensor,
    recipe_a: Any,
    scale_b: Tensor,
    recipe_b: Any,
    *,
    bias: Tensor | None,
    output_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    """`torch.nn.functional.scaled_mm` on sm_90; ValueError for what torch or cuBLAS refuses or reads wrongly."""
    (m, k), n = q.shape, w.shape[1]
    check(w.shape == (k, n) and q.dtype == w.dtype == E4M3, "two e4m3 matrices")
    check(q.stride() == (k, 1) and w.stride() == (1, k), "q row-major, W column-major")
    check(k % 16 == 0 and n % 16 == 0, "K and N must be multiples of 16")
    check(q.data_ptr() % 16 == 0 and w.data_ptr() % 16 == 0, "operands must begin at a multiple of 16 bytes")
    check(not use_fast_accum, "sums of 14 bits")
    if bias is not None:
        check(output_dtype != torch.float32, "no bias beside a float32 result")
        check(bias.dtype == output_dtype and bias.shape == (n,), "a bias in the dtype of the result")
        check(bias.is_contiguous() and bias.data_ptr() % 16 == 0, "a bias that begins at 16 bytes")
    if (recipe_a, recipe_b) == (ScalingType.TensorWise, ScalingType.TensorWise):
        check(scale_a.numel() == scale_b.numel() == 1, "one scale each")
        a, b = memory(scale_a, 1), memory(scale_b, 1)
    elif (recipe_a, recipe_b) == (ScalingType.RowWise, ScalingType.RowWise):
        check(scale_a.shape == (m, 1) and scale_a.is_contiguous(), "scale_a [M, 1]")
        check(scale_b.shape == (1, n) and scale_b.is_contiguous(), "scale_b [1, N]")
        a, b = memory(scale_a, m)[:, None], memory(scale_b, n)[:, None]
    else:
        check((recipe_a, recipe_b) == (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128), "recipes")
        steps, blocks = -(-k // 128), -(-n // 128)
        padded = -(-steps // 4) * 4
        check(m % 4 == 0, "M must be a multiple of 4")
        check(scale_a.shape == (m, steps) and strides(scale_a, m), "scale_a [M, L], strides (1, M)")
        check(
            scale_b.shape == (padded, blocks) and strides(scale_b, padded), "scale_b [L4, N / 128], (1, L4)"
        )
        a = memory(scale_a, m * steps).view(steps, m).T.repeat_interleave(128, 1)[:, :k]
        b = memory(scale_b, blocks * padded).view(blocks, padded)[:, :steps]
        b = b.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    out = (q.double() * a) @ (w.T.double() * b).T
    return (out if bias is None else out + bias.double()).to(output_dtype)


def refuses(*arguments: Any, **options: Any) -> Tensor:
    raise NotImplementedError("DeepSeek style (1x128, 128x128) scaling requires cublasLt >= 12.9\nand so on")


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    tail = (*packed.encoding.block, packed.activation, packed.input_scale)  # type: ignore[union-attr]
    return float8.float8_linear(x, packed.codes, packed.scale, bias, *tail)


class Torch:
    """Counts the calls of torch's product."""

    def __init__(self, product: Callable[..., Tensor]) -> None:
        self.product, self.recipes = product, []

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        self.recipes.append(arguments[3])
        return self.product(*arguments, **options)


def has_product() -> bool:
    """Does torch multiply by row scales on this CPU?"""
    q, w, ones = torch.zeros(16, 16).to(E4M3), torch.zeros(16, 16).to(E4M3).T, torch.ones(16, 1)
    try:
        scaled_mm(q, w, ones, ScalingType.RowWise, ones.T, ScalingType.RowWise)
    except NotImplementedError:
        return False
    return True


#: N, K, block of W, activation, recipe. Blocks with a tail of N; steps of K that 4 divides, or does not; one step.
WEIGHTS = [
    (48, 256, (48, 256), "fp8_static", "TENSOR"),
    (48, 272, (1, 272), "fp8_static", "ROW"),
    (32, 272, (1, 272), "fp8_token", "ROW"),
    (48, 256, (48, 256), "fp8_token", "ROW"),
    (144, 384, (128, 128), "fp8_group128", "BLOCK"),
    (32, 512, (128, 128), "fp8_group128", "BLOCK"),
    (16, 128, (128, 128), "fp8_group128", "BLOCK"),
]


def route_cases() -> Iterator[tuple[str, float]]:
    products = {"documented": documented}
    if has_product():
        products["torch"] = scaled_mm
    for n, k, block, activation, name in WEIGHTS:
        packed = float8_weight(n, k, block, activation)
        exact = dequantize(packed, torch.float64).T
        for source, product in products.items():
            if source == "torch" and name == "BLOCK":
                continue
            for dtype, slack in DTYPES:
                for m in (SCALED_BLOCK, SCALED_BLOCK + 1, SCALED_BLOCK + 3):
                    x = torch.randn(m, k + 8).to(dtype)[:, :k]
                    rounded = reference.round_activation(x.float(), packed).double()
                    for bias in (None, torch.randn(n).to(dtype)):
                        calls = Torch(product)
                        with mock.patch.object(float8_scaled, "scaled_mm", calls):
                            got = linear(x.view(1, m, k), packed, bias)[0]
                        case = f"{source} {n}x{k} {block} {activation} {dtype} {m} {bias is not None}"
                        yield f"product {case}", error(got, rounded, exact, bias, dtype, slack)
                        # torch adds no bias to a float32 result.
                        expected = [] if dtype == torch.float32 and bias is not None else [name]
                        taken = [recipe(r) for r in calls.recipes]
                        yield f"route {case}", 0.0 if taken == expected else 2.0


def recipe(of_x: Any) -> str:
    return next(r.name for r in float8_scaled.Recipe if r.value[0] == of_x)


def threshold_cases() -> Iterator[tuple[str, float]]:
    for n, k, block, activation, name in WEIGHTS:
        packed = float8_weight(n, k, block, activation)
        exact = dequantize(packed, torch.float64).T
        least = SCALED_BLOCK if name == "BLOCK" else SCALED
        for m in (NATIVE, least - 1, least):
            x = torch.randn(m, k).half()
            calls = Torch(documented)
            with mock.patch.object(float8_scaled, "scaled_mm", calls):
                got = linear(x, packed, None)
            rounded = reference.round_activation(x.float(), packed).double()
            yield f"rows {m} {n}x{k} {activation}", error(got, rounded, exact, None, torch.float16)
            taken = len(calls.recipes) == (m == least)
            yield f"calls {m} {n}x{k} {activation}", 0.0 if taken else 2.0


def uncovered_cases() -> Iterator[tuple[str, float]]:
    """Weights and inputs that `float8_native` keeps."""
    weights = [
        (40, 256, (1, 256), "fp8_token"),  # N is no multiple of 16
        (48, 264, (1, 264), "fp8_token"),  # nor K
        (32, 256, (16, 256), "fp8_token"),  # one scale for several rows
        (144, 256, (128, 128), "fp8_token"),
        (144, 256, (128, 128), "fp8_static"),
        (144, 216, (128, 128), "fp8_group128"),  # a tail of K
        (144, 256, (64, 128), "fp8_group128"),
        (144, 256, (144, 256), "fp8_group128"),
    ]
    for n, k, block, activation in weights:
        packed = float8_weight(n, k, block, activation)
        x = torch.randn(SCALED_BLOCK, k).half()
        calls = Torch(documented)
        with mock.patch.object(float8_scaled, "scaled_mm", calls):
            got = linear(x, packed, None)
        rounded = reference.round_activation(x.float(), packed).double()
        wrong = error(got, rounded, dequantize(packed, torch.float64).T, None, torch.float16)
        yield f"not covered {n}x{k} {block} {activation}", 2.0 if calls.recipes else wrong


def refusal_cases() -> Iterator[tuple[str, float]]:
    """The native kernel answers, also for M that was rounded up, and torch is not asked again."""
    for n, k, block, activation, _ in WEIGHTS:
        packed = float8_weight(n, k, block, activation)
        exact = dequantize(packed, torch.float64).T
        float8_scaled._refused.clear()
        calls = Torch(refuses)
        for m in (SCALED_BLOCK + 1, SCALED_BLOCK + 3):
            x = torch.randn(m, k).half()
            with (
                mock.patch.object(float8_scaled, "scaled_mm", calls),
                mock.patch.dict(os.environ, {"QUANTKIT_KERNELS": ""}),
            ):
                got = linear(x, packed, None)
            rounded = reference.round_activation(x.float(), packed).double()
            yield f"refused {m} {n}x{k} {activation}", error(got, rounded, exact, None, torch.float16)
        yield f"asked once {n}x{k} {activation}", 0.0 if len(calls.recipes) == 1 else 2.0
    float8_scaled._refused.clear()


def main() -> None:
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    # Memory that nobody wrote holds NaN: rows that pad M must reach no other row.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch, "target", lambda: ("cuda", 90)))
        stack.enter_context(mock.patch.dict(os.environ, {"QUANTKIT_KERNELS": "strict"}))
        for name, rows in (
            ("NATIVE_ROWS", NATIVE), ("SCALED_ROWS", SCALED), ("SCALED_BLOCK_ROWS", SCALED_BLOCK)
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(float8_tuning, name, rows))
        found = {}
        for cases in (route_cases, threshold_cases, uncovered_cases, refusal_cases):
            found |= dict(cases())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
