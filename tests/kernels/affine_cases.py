"""What the affine Triton kernels are checked on, in the interpreter (CPU) and on a device alike.

Run as a program it checks every case and prints one JSON object, case -> worst error relative to its
bound (a case fails above 1). On a CPU: `TRITON_INTERPRET=1 python affine_cases.py`. The interpreter dies
at an out-of-bounds load, so tests run this in a process of its own.

Bounds. The kernels multiply exact integers q - zero by inputs of `dtype`, accumulate in float32 and scale
in float32, so the only roundings are those of sums (float32, K terms) and of the result (half an ulp of
`dtype`). Where a scale or a float zero enters before the dot, weights are rounded once to `dtype`: errors
of K independent roundings add like a random walk, and `4 * ulp * sqrt(sum of squares)` holds them.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from quantkit.encoding import Affine, PackedWeight, dequantize, expected_shapes
from quantkit.kernels import affine, affine_launch, reference, ternary
from quantkit.kernels.affine_launch import Fusion
from quantkit.kernels.tuning import BackwardConfig, GemmConfig

ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@dataclass(frozen=True)
class Case:
    bits: int
    group: int
    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.float16
    float_zero: bool = False
    bias: bool = True
    perm: bool = False
    config: GemmConfig | None = None  # None: what tuning.py says
    asm: bool | None = None

    @property
    def name(self) -> str:
        parts = [f"{self.bits}bit-g{self.group}-{self.m}x{self.n}x{self.k}", str(self.dtype)[6:]]
        parts += [flag for flag in ("float_zero", "perm") if getattr(self, flag)]
        if self.config is not None:
            parts.append("-".join(str(v) for v in asdict(self.config).values()))
        return "-".join(parts)


def packed_weight(case: Case, device: str, seed: int) -> PackedWeight:
    """Random codes (every byte value), scales and zeros."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(Affine(case.bits, case.group), (case.n, case.k))
    codes = torch.randint(0, 256, shapes["codes"], dtype=torch.uint8, generator=generator)
    if codes.numel() >= 256:
        codes.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)  # every byte, whatever the draw
    scale = (torch.rand(shapes["scale"], generator=generator) * 0.02 + 0.005).to(torch.float16)
    zero = torch.randint(0, 1 << case.bits, shapes["scale"], dtype=torch.uint8, generator=generator)
    if case.float_zero:
        zero = (zero + torch.rand(shapes["scale"], generator=generator) - 0.5).to(torch.float32)
    perm = torch.randperm(case.k, generator=generator) if case.perm else None
    packed = PackedWeight(Affine(case.bits, case.group), (case.n, case.k), codes, scale, zero, perm=perm)
    return packed.to(device)


def affine_weight(w: PackedWeight) -> affine_launch.AffineWeight:
    assert isinstance(w.encoding, Affine) and w.zero is not None
    return affine_launch.AffineWeight(
        w.codes, w.scale, w.zero, w.perm, w.encoding.bits, w.encoding.group_size
    )


def bound(exact: Tensor, x: Tensor, w: Tensor, dtype: torch.dtype, rounded: bool) -> Tensor:
    """Largest error allowed per element of `exact = x @ w.T` (float64)."""
    ulp = ULP[dtype]
    squares = ((x * x) @ (w * w).T).sqrt()
    sums = 2.0**-22 * (x.abs() @ w.abs().T) * 8
    return 1.01 * ulp * exact.abs() + sums + (6 * ulp * squares if rounded else 0) + 1e-7


def run_linear(case: Case, device: str, seed: int) -> float:
    w = packed_weight(case, device, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(case.m, case.k, generator=generator).to(case.dtype).to(device)
    bias = torch.randn(case.n, generator=generator).to(case.dtype).to(device) if case.bias else None
    assert w.zero is not None
    if case.config is None:
        args = (x, w.codes, w.scale, w.zero, bias, w.perm, case.bits, case.group, None)
        out = affine.affine_linear(*args)
    else:
        out = affine_launch.launch_gemm(x, affine_weight(w), bias, case.config, asm=case.asm)
    assert out.shape == (case.m, case.n) and out.dtype == case.dtype
    dense = dequantize(w, torch.float64)
    exact = x.double() @ dense.T
    limit = bound(exact, x.double(), dense, case.dtype, rounded=True)
    if bias is not None:
        exact = exact + bias.double()
        limit = limit + ULP[case.dtype] * bias.double().abs()
    return worst(out, exact, limit)


def run_backward(case: Case, device: str, seed: int, config: BackwardConfig | None) -> float:
    w = packed_weight(case, device, seed)
    generator = torch.Generator().manual_seed(seed + 2)
    grad = torch.randn(case.m, case.n, generator=generator).to(case.dtype).to(device)
    assert w.zero is not None
    if config is None:
        args = (grad, w.codes, w.scale, w.zero, w.perm, case.bits, case.group, case.k)
        out = affine.affine_linear_backward(*args)
    else:
        out = affine_launch.launch_backward(grad, affine_weight(w), case.k, config)
    dense = dequantize(w, torch.float64)
    exact = grad.double() @ dense
    return worst(out, exact, bound(exact, grad.double(), dense.T, case.dtype, rounded=True))


def run_dequantize(case: Case, device: str, seed: int) -> float:
    """0 when equal to the reference bit for bit, else infinite."""
    w = packed_weight(case, device, seed)
    assert w.zero is not None
    args = (w.codes, w.scale, w.zero, w.perm, case.bits, case.group, case.k, case.dtype)
    same = torch.equal(affine.dequantize_affine(*args), dequantize(w, case.dtype))
    return 0.0 if same else float("inf")


@dataclass(frozen=True)
class FusionCase:
    """Each prologue and epilogue alone, and all at once."""

    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.float16
    bias: bool = False
    residual: bool = False
    norm: bool = False
    gated: bool = False
    inputs: int = 64

    @property
    def name(self) -> str:
        flags = [f for f in ("bias", "residual", "norm", "gated") if getattr(self, f)]
        flags += ["blocks"] if self.inputs > 64 else []
        return f"{self.m}x{self.n}x{self.k}-{str(self.dtype)[6:]}-{'-'.join(flags) or 'plain'}"


def run_fusion(case: FusionCase, device: str, seed: int) -> float:
    """Against float64 steps: relative L2 error over 4 roundings of the dtype (x * norm, and the result)."""
    w = packed_weight(Case(4, 64, case.m, case.n, case.k), device, seed)
    generator = torch.Generator().manual_seed(seed + 3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype).to(device)

    x = draw(case.m, case.k) * 3
    bias = draw(case.n) if case.bias else None
    residual = draw(case.m, case.n // 2 if case.gated else case.n) if case.residual else None
    norm = draw(case.k) if case.norm else None
    config = GemmConfig(16, 8, case.inputs, 2)
    fusion = Fusion(residual, norm, 1e-5, case.gated)
    out = affine_launch.launch_gemm(x, affine_weight(w), bias, config, fusion).double()
    exact = x.double()
    if norm is not None:
        exact = torch.nn.functional.rms_norm(exact, (case.k,), norm.double(), 1e-5)
    exact = exact @ dequantize(w, torch.float64).T
    exact = exact if bias is None else exact + bias.double()
    if case.gated:
        gate, up = exact.chunk(2, dim=-1)
        exact = torch.nn.functional.silu(gate) * up
    exact = exact if residual is None else exact + residual.double()
    error = float((out - exact).norm() / exact.norm())
    return error / (4 * ULP[case.dtype]) if error == error else float("inf")


@dataclass(frozen=True)
class TernaryCase:
    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.float16
    perm: bool = False
    int8: bool = True  # False: as on chips without an int8 dot

    @property
    def name(self) -> str:
        flags = ("-perm" if self.perm else "") + ("" if self.int8 else "-float16_dot")
        return f"{self.m}x{self.n}x{self.k}-{str(self.dtype)[6:]}{flags}"


def run_ternary(case: TernaryCase, device: str, seed: int) -> float:
    """0 when equal to the reference bit for bit (BitNet's rule is exact), else infinite."""
    spec = Case(2, case.k, case.m, case.n, case.k, perm=case.perm)
    w = replace(packed_weight(spec, device, seed), activation="int8_token")
    generator = torch.Generator().manual_seed(seed + 4)
    x = (torch.randn(case.m, case.k, generator=generator) * 5).to(case.dtype).to(device)
    bias = torch.randn(case.n, generator=generator).to(case.dtype).to(device)
    with mock.patch.object(ternary, "_int8_units", lambda: case.int8):
        out = affine.affine_linear(x, w.codes, w.scale, w.zero, bias, w.perm, 2, case.k, "int8_token")
    return 0.0 if torch.equal(out, reference.quant_linear(x, w, bias)) else float("inf")


def worst(out: Tensor, exact: Tensor, limit: Tensor) -> float:
    """Largest error over its bound; NaN counts as infinite."""
    ratio = (out.double() - exact).abs() / limit
    return float("inf") if not torch.isfinite(ratio).all() else float(ratio.max())


SMALL = GemmConfig(16, 8, 64, 2)
WIDE = GemmConfig(16, 16, 64, 1)
LINEAR = [
    Case(4, 32, 1, 16, 128, config=SMALL),
    Case(4, 64, 3, 33, 192, config=SMALL),  # rows beyond N, columns beyond M
    Case(4, 32, 2, 15, 63, config=SMALL),  # K tail inside a byte
    Case(4, 128, 9, 16, 1000, config=replace(SMALL, inputs=128, split=3)),
    Case(4, 24, 2, 16, 96, config=SMALL),  # groups that no tile divides: scales before the dot
    Case(4, 16, 2, 17, 144, config=SMALL),  # the smallest group
    Case(4, 64, 2, 16, 128, float_zero=True, config=SMALL),
    Case(4, 128, 1, 16, 128, torch.float32, config=SMALL),
    Case(2, 64, 3, 17, 128, config=SMALL),
    Case(2, 200, 1, 16, 200, config=SMALL),  # one group per row, ternary's shape
    Case(1, 128, 2, 16, 256, config=replace(SMALL, inputs=128)),
    Case(3, 64, 2, 16, 128, config=SMALL),
    Case(3, 64, 1, 16, 100, config=SMALL),
    Case(8, 32, 2, 16, 64, config=replace(SMALL, inputs=32)),
    Case(4, 64, 3, 16, 128, perm=True, config=SMALL),
    Case(4, 64, 17, 33, 192, config=WIDE),
    Case(4, 128, 16, 16, 1000, config=replace(WIDE, inputs=128, split=2)),
    Case(4, 24, 9, 16, 63, config=WIDE),
    Case(4, 64, 9, 16, 128, float_zero=True, config=WIDE),
    Case(3, 64, 9, 16, 100, perm=True, config=WIDE),
    Case(2, 64, 9, 16, 128, config=WIDE),
    Case(1, 128, 9, 16, 128, config=replace(WIDE, inputs=128)),
    Case(8, 32, 9, 16, 64, torch.float32, config=replace(WIDE, inputs=32)),
    # Tiles that span two and four groups, with a tail of K and without; planes of three bits.
    Case(4, 64, 1, 16, 512, config=replace(SMALL, inputs=128)),
    Case(4, 32, 3, 33, 320, float_zero=True, config=replace(SMALL, inputs=128)),
    Case(4, 32, 1, 16, 512, torch.float32, config=replace(SMALL, inputs=128)),
    Case(3, 128, 2, 16, 512, config=replace(SMALL, inputs=256)),
    Case(3, 128, 1, 16, 384, config=replace(SMALL, inputs=128)),
    Case(3, 128, 9, 16, 256, config=replace(WIDE, inputs=128)),
]
BACKWARD = [
    (Case(4, 64, 3, 33, 128), BackwardConfig(16, 64, 32)),
    (Case(4, 64, 3, 100, 128), BackwardConfig(16, 64, 32, split=3)),
    (Case(4, 32, 17, 16, 63), BackwardConfig(16, 32, 16)),
    (Case(4, 24, 3, 16, 96), BackwardConfig(16, 32, 16)),
    (Case(2, 128, 2, 16, 128, float_zero=True), BackwardConfig(16, 64, 16)),
    (Case(3, 64, 2, 16, 128, perm=True), BackwardConfig(16, 64, 16)),
    (Case(1, 128, 2, 16, 128), BackwardConfig(16, 128, 16)),
    (Case(8, 64, 2, 16, 64), BackwardConfig(16, 32, 16)),
]
DEQUANTIZE = [
    Case(4, 32, 1, 33, 63),
    Case(4, 128, 1, 16, 256),
    Case(1, 16, 1, 3, 100),
    Case(2, 24, 1, 3, 100, float_zero=True),
    Case(3, 64, 1, 5, 100, torch.float32, perm=True),
    Case(8, 32, 1, 3, 64),
    Case(4, 64, 1, 64, 256),  # whole tiles: no masks
    Case(3, 128, 1, 32, 512),  # whole words
    Case(3, 64, 1, 16, 256, torch.float32, float_zero=True),
    Case(3, 256, 1, 16, 256),
]


FUSION = [
    FusionCase(3, 34, 192),
    FusionCase(1, 34, 192, bias=True),
    FusionCase(3, 34, 192, residual=True),
    FusionCase(1, 33, 192, norm=True),
    FusionCase(3, 33, 200, norm=True),
    FusionCase(3, 34, 192, gated=True),
    FusionCase(1, 64, 200, bias=True, residual=True, norm=True, gated=True),
    FusionCase(2, 64, 200, bias=True, residual=True, norm=True, gated=True, inputs=128),
    FusionCase(1, 33, 256, norm=True, inputs=128),
]
TERNARY = [
    TernaryCase(1, 33, 200),
    TernaryCase(3, 33, 200, int8=False),
    TernaryCase(9, 16, 64, torch.float32),
    TernaryCase(3, 32, 300, perm=True),
]


def device_cases() -> list[Case]:
    """The configurations that users get, for every regime of M, width and dtype."""
    cases = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for m in (1, 2, 7, 8, 16, 17, 33, 64, 100, 300):
            cases.append(Case(4, 128, m, 1000, 1024, dtype))
            cases.append(Case(4, 64, m, 256, 1000, dtype, float_zero=True))
        for m in (1, 5, 20, 70):
            for bits in (1, 2, 3, 8):
                cases.append(Case(bits, 128, m, 512, 1024, dtype))
                cases.append(Case(bits, 64, m, 200, 456, dtype, float_zero=True, perm=True))
            cases.append(Case(2, 1024, m, 512, 1024, dtype))
            cases.append(Case(4, 32, m, 512, 1024, dtype))
            cases.append(Case(4, 24, m, 63, 1000, dtype))
    return cases


def check_device(device: str, seed: int) -> dict[str, float]:
    results = {}
    for case in device_cases():
        results[f"linear-{case.name}"] = run_linear(case, device, seed)
        results[f"backward-{case.name}"] = run_backward(case, device, seed, None)
    return results


def check(device: str, seed: int) -> dict[str, float]:
    results = {f"linear-{c.name}": run_linear(c, device, seed) for c in LINEAR}
    results |= {f"backward-{c.name}": run_backward(c, device, seed, config) for c, config in BACKWARD}
    results |= {f"dequantize-{c.name}": run_dequantize(c, device, seed) for c in DEQUANTIZE}
    results |= {f"fusion-{c.name}": run_fusion(c, device, seed) for c in FUSION}
    results |= {f"ternary-{c.name}": run_ternary(c, device, seed) for c in TERNARY}
    return results


def names() -> list[str]:
    listed = [f"linear-{c.name}" for c in LINEAR] + [f"backward-{c.name}" for c, _ in BACKWARD]
    listed += [f"dequantize-{c.name}" for c in DEQUANTIZE] + [f"fusion-{c.name}" for c in FUSION]
    return listed + [f"ternary-{c.name}" for c in TERNARY]


if __name__ == "__main__":
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # fills new outputs with NaN: all must be written
    assert os.environ.get("TRITON_INTERPRET") == "1" or len(sys.argv) > 2
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else int(torch.seed() % 2**31)
    print(json.dumps(check(sys.argv[2] if len(sys.argv) > 2 else "cpu", seed)))
