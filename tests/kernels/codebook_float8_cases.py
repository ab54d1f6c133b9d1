"""What the codebook and float8 Triton kernels are checked on, in the interpreter or on a device.

Run as a program (`TRITON_INTERPRET=1 python codebook_float8_cases.py codebook`) it checks every case and
prints one JSON object, case -> error relative to its bound; a case fails above 1. The interpreter dies at an
out-of-bounds load, so tests run this in a process of its own.

Bounds: products are exact or rounded once to the dtype of x, sums are float32. Relative to the size of the result
that is 2e-6 in float32 (K <= 1000 terms) and 1e-3 in float16 (rounding of weight and result). The size is the root of
the sum of the terms' squares, which the result's norm is on average: the norm itself may come out a third of that
where there are five results, while the rounding of the weight keeps its size.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.algorithms import codebook as tables
from quantkit.encoding import Codebook, Float8, PackedWeight, dequantize
from quantkit.kernels import (
    codebook,
    codebook_tuning,
    few_rows_launch,
    few_rows_tuning,
    float8,
    float8_launch,
    float8_tuning,
    launch_weight,
    reference,
    tuning,
)
from quantkit.kernels.bench_cases import random_weight

BOUND = {torch.float32: 2e-6, torch.float16: 1e-3}
DEVICE = "cpu"


def error(
    got: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype, slack: float = 1
) -> float:
    """Error of `got` as x @ w + bias (w [inner, outer], float64) in bounds; infinite where dtype or shape is wrong."""
    wide = x.double()
    want, squares = wide @ w, wide**2 @ w**2
    if bias is not None:
        want, squares = want + bias.double(), squares + bias.double() ** 2
    if got.shape != want.shape or got.dtype != dtype:
        return float("inf")
    off = (got.double() - want).norm() / squares.sum().sqrt()
    return float(off) / BOUND[torch.float16 if dtype == torch.bfloat16 else dtype] / slack


def codebook_weight(n: int, k: int, block: int, kind: str) -> PackedWeight:
    """Random bytes, all 256 where there is room."""
    codes = torch.randint(0, 256, (-(-n * k // 2),), dtype=torch.uint8)
    codes[: min(256, codes.numel())] = torch.arange(256)[: codes.numel()].to(torch.uint8)
    lut = tables.table(kind, torch.device("cpu"))
    return PackedWeight(Codebook(4, block), (n, k), codes, torch.rand(-(-n * k // block)) + 0.1, lut=lut)


def codebook_cases() -> Iterator[tuple[str, float]]:
    Config = codebook_tuning.Config
    tiles = [
        (1, Config(16, 8, 64, 4)),
        (3, Config(16, 8, 64, 2, split=2)),
        (5, Config(32, 8, 64, 1)),
        (9, Config(16, 8, 64, 1, split=2)),
        (1, Config(16, 8, 256, 2)),  # tiles that span blocks
        (2, Config(16, 8, 128, 2, split=2)),
        (6, Config(32, 8, 128, 1)),
    ]
    # Odd N, a K tail, blocks that straddle rows (1000, 63), rows that begin inside a byte (63), other blocks.
    for n, k, block in [
        (33, 256, 64),
        (5, 1000, 64),
        (7, 63, 64),
        (16, 320, 32),
        (9, 128, 128),
        (32, 512, 64),
    ]:
        packed = codebook_weight(n, k, block, "nf4" if block == 64 else "fp4")
        exact = dequantize(packed, torch.float64)
        parts = (packed.codes, packed.scale, packed.lut)
        for dtype in (torch.float32, torch.float16):
            name = f"{n}x{k} block {block} {dtype}"
            dense = codebook.dequantize_codebook(*parts, n, k, block, dtype)
            yield f"dequantize {name}", 0.0 if torch.equal(dense, dequantize(packed, dtype)) else 2.0
            for m, config in tiles:
                x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
                got = codebook.launch_gemm(x, *parts, bias, n, block, config)
                yield f"linear {name} {m} {config}", error(got, x, exact.T, bias, dtype)
            grad = torch.randn(2, 3, n).to(dtype)
            dx = codebook.codebook_linear_backward(grad, *parts, k, block)
            yield f"backward {name}", error(dx, grad, exact, None, dtype)
            if k % block == 0:
                tile = tuning.BackwardConfig(16, 64, 16, split=2)
                dx = codebook.launch_backward(grad.view(6, n), *parts, k, block, tile)
                yield f"fused backward {name}", error(dx, grad.view(6, n), exact, None, dtype)
        x = torch.randn(codebook_tuning.FUSED_ROWS + 1, k)
        got = codebook.codebook_linear(x, *parts, None, n, block)
        yield f"sliced {name}", error(got, x, exact.T, None, torch.float32)
    part = torch.empty(4, 64)
    packed = codebook_weight(9, 256, 64, "nf4")
    codebook.launch_dequantize(packed.codes, packed.scale, packed.lut, 256, 64, part, 3, 128)
    yield "part", 0.0 if torch.equal(part, dequantize(packed)[3:7, 128:192]) else 2.0
    part = torch.empty(16, 256)  # whole words
    packed = codebook_weight(40, 640, 64, "nf4")
    codebook.launch_dequantize(packed.codes, packed.scale, packed.lut, 640, 64, part, 17, 128)
    yield "part in words", 0.0 if torch.equal(part, dequantize(packed)[17:33, 128:384]) else 2.0


#: Inputs' dtypes of the kernel without shared memory, and how much wider than float16's their bound is. Inputs are
#: widened by their bits, so bfloat16 runs too; the interpreter rounds its results toward zero (8 bits: less than a
#: last place, 2**-7 relative).
HALVES = ((torch.float16, 1.0), (torch.bfloat16, 2.0**-7 / BOUND[torch.float16]))


def few_rows_cases() -> Iterator[tuple[str, float]]:
    """`few_rows_kernel` on portable loads and products: each decoding, all rows of x that fit, groups of less than a
    slice, of one and one per row, tiles of 2 to 32 rows of W, one and two products, fewer programs than tiles, a K that
    ends inside a step, both kinds of zeros.
    """
    device = torch.device("cpu")
    tile = few_rows_tuning.FewRowsConfig
    plain = (((16, 512), tile(4, 1)), ((32, 704), tile(2, 2)), ((16, 704), tile(4, 1)))
    longer = (((32, 640), tile(2, 2)), ((16, 640), tile(4, 1)))
    wide = (((16, 768), tile(2, 1, 64)), ((32, 512), tile(2, 2, 64)), ((16, 768), tile(2, 1, 64, 4)))
    two = (((16, 704), tile(2, 1, slices=2)),)
    four = (((24, 704), tile(1, 1, slices=4)), ((16, 512), tile(2, 2, slices=4)))
    eight = (((16, 1408), tile(2, 2, slices=8)), ((6, 1408), tile(1, 1, 64, slices=8)))
    twice = (((16, 384), tile(2, 1, blocks=2)),)
    both = (((32, 384), tile(1, 2, slices=2, blocks=2)),)
    for form, counts, cells in (
        ("nf4", (7,), twice),
        ("nf4", (3,), both),
        ("affine-4g128", (12,), twice),
        ("affine-3g128", (8,), both),
        ("nf4", (1, 4), plain),
        ("nf4", (2,), two),
        ("nf4", (1,), four),
        ("affine-4g32", (1, 2), plain[:2]),
        ("affine-4g32", (1,), two),
        ("affine-4g128", (1, 8), longer),
        ("affine-4g128", (1,), eight[:1]),
        ("affine-4g704", (5,), plain[2:]),
        ("hqq-4g64", (3,), plain[:1]),
        ("hqq-4g64", (1,), four),
        ("affine-3g64", (2,), plain[:1] + wide[1:2]),
        ("affine-3g128", (1, 4), longer[:1] + wide[:2]),
        ("affine-3g128", (1,), wide[2:] + eight[:1]),
        ("affine-3g1408", (1,), eight[1:]),
        ("affine-3g704", (8,), plain[1:2]),
        ("hqq-3g64", (4,), plain[:1]),
    ):
        for (n, k), config in cells:
            packed = random_weight(form, n, k, device)
            weight, exact = launch_weight.of(packed), dequantize(packed, torch.float64)
            for m in counts:
                for dtype, slack in HALVES:
                    x, bias = torch.randn(m, k + 8).to(dtype)[:, :k], torch.randn(n).to(dtype)
                    got = few_rows_launch.launch_few_rows(x, weight, bias, config, asm=False, most=3)
                    name = f"few rows {form} {m} x {n}x{k} {config} {dtype}"
                    yield name, error(got, x, exact.T, bias, dtype, slack)


def float8_weight(n: int, k: int, block: tuple[int, int], activation: str | None) -> PackedWeight:
    """Every code but the two NaNs."""
    valid = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    codes = valid[torch.randint(0, 254, (n, k))]
    codes.view(-1)[:254] = valid
    scale = torch.rand(-(-n // block[0]), -(-k // block[1])) + 0.1
    fixed = torch.tensor([0.01]) if activation == "fp8_static" else None
    return PackedWeight(Float8(block), (n, k), codes, scale, activation=activation, input_scale=fixed)  # type: ignore[arg-type]


def float8_cases() -> Iterator[tuple[str, float]]:
    Config = float8_tuning.Config
    tiles = [(1, Config(16, 8, 64, 4)), (3, Config(16, 8, 64, 2, split=2)), (5, Config(32, 8, 64, 1))]
    for n, k, block in [
        (33, 256, (33, 256)),
        (17, 200, (1, 200)),
        (40, 300, (128, 128)),
        (33, 256, (32, 64)),
    ]:
        for activation in (None, "fp8_token", "fp8_group128", "fp8_static"):
            packed = float8_weight(n, k, block, activation)
            exact = dequantize(packed, torch.float64)
            for dtype in (torch.float32, torch.float16):
                name = f"{n}x{k} block {block} {activation} {dtype}"
                for m, config in tiles:
                    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
                    q, scales = x, {}
                    if activation is not None:
                        q, s = float8.round_activation(x, activation, packed.input_scale, dtype)
                        scales = {"x_scale": s, "group": float8._GROUPS[activation]}
                    args = (q, packed.codes, packed.scale, bias, *block, config)
                    got = float8_launch.launch_gemm(*args, **scales)  # type: ignore[arg-type]
                    rounded = reference.round_activation(x.float(), packed).double()
                    yield f"linear {name} {m} {config}", error(got, rounded, exact.T, bias, dtype)
            x = torch.randn(2, 3, k)
            got = float8.float8_linear(
                x, packed.codes, packed.scale, None, *block, activation, packed.input_scale
            )
            rounded = reference.round_activation(x, packed)
            yield f"op {n}x{k} {block} {activation}", error(got, rounded, exact.T, None, torch.float32)
        dense = float8.dequantize_float8(packed.codes, packed.scale, *block, torch.float32)
        yield f"dequantize {name}", 0.0 if torch.equal(dense, dequantize(packed)) else 2.0
        grad = torch.randn(3, n)
        dx = float8.float8_linear_backward(grad, packed.codes, packed.scale, *block)
        yield f"backward {name}", error(dx, grad, exact, None, torch.float32)
        grad = torch.randn(5, n).half()
        tile = tuning.BackwardConfig(16, 64, 16, split=2)
        dx = float8_launch.launch_backward(grad, packed.codes, packed.scale, *block, tile)
        yield f"fused backward {name}", error(dx, grad, exact, None, torch.float16)
    every = torch.arange(256, dtype=torch.uint8).view(1, 256)
    dense = float8.dequantize_float8(every, torch.ones(1, 1), 1, 256, torch.float32)
    want = every.view(torch.float8_e4m3fn).float()
    yield "all codes, NaN included", 0.0 if torch.equal(dense.nan_to_num(1e9), want.nan_to_num(1e9)) else 2.0
    yield "e4m3 rounding", rounding_error()


def rounding_error() -> float:
    """`round_rows_kernel` against torch's cast: ties, subnormals, both signs, next to every code's value."""
    values = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (values[1:] + values[:-1]) / 2
    near = torch.cat([values, middles, middles * (1 + 2e-7), middles * (1 - 2e-7), torch.rand(3000) * 0.02])
    x = torch.cat([near, -near]).clamp(-448, 448)
    x = torch.nn.functional.pad(x, (0, -len(x) % 4096)).view(-1, 4096)
    q, _ = float8.round_activation(x, "fp8_static", torch.ones(1), torch.float32)
    return 0.0 if torch.equal(q, x.to(torch.float8_e4m3fn).float()) else 2.0


def main() -> None:
    torch.manual_seed(int.from_bytes(__import__("os").urandom(4), "little"))
    cases = {
        "codebook": codebook_cases,
        "few-rows": few_rows_cases,
        "float8": float8_cases,
    }[sys.argv[1]]
    print(json.dumps(dict(cases())))


if __name__ == "__main__":
    main()
