"""Torch's scaled product for rounded fp8 activations (`quantkit.kernels.float8_scaled`) on a device, sm_89 or newer.

    python scripts/check_scaled_gpu.py [--seconds 60]
    TRITON_INTERPRET=1 python scripts/check_scaled_gpu.py --smoke      the same code with small sizes on a CPU

Whatever the shipped thresholds are, this run sets its own. First products against float64 of the rounded
operands, sums of many terms of one sign, and CUDA graphs; then times of an op (rounding and product) through
`float8_native` and through torch, beside a dense bf16 product: medians in microseconds. The last lines say from how
many rows on torch was faster in every measured shape, which is what `float8_tuning.SCALED_ROWS` and
`SCALED_BLOCK_ROWS` want. What `--seconds` does not suffice for is named and left out.

What torch refuses, `float8_native` answers: named, and no failure. Exits with 1 where a result is wrong or torch
multiplied nothing at all, with 2 without such a device.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from quantkit.encoding import Float8, PackedWeight, dequantize
from quantkit.kernels import bench, float8, float8_scaled, float8_tuning, launch
from quantkit.kernels.bench_cases import random_weight

E4M3 = torch.float8_e4m3fn
#: (scales of W, rounding of x): all that the route covers.
KINDS = (
    ("tensor", "fp8_static"), ("channel", "fp8_static"), ("tensor", "fp8_token"), ("channel", "fp8_token"),
    ("block", "fp8_group128"),
)  # fmt: skip
#: Relative to the norm: the rounding of the result (bf16 1.7e-3, fp16 2e-4) and the sums of the fp8 unit, which keep
#: about 14 bits between promotions to float32. One row may be off by three times as much.
LIMITS = {torch.bfloat16: 3e-3, torch.float16: 8e-4, torch.float32: 8e-4}
#: Triton's interpreter cuts bf16 off where a device rounds it.
SMOKE_LIMITS = LIMITS | {torch.bfloat16: 4e-3}
COLUMNS = ("dense", "native", "torch", "rounding")


@dataclass(frozen=True)
class Sizes:
    """(N, K) and M of what is checked, summed (N, K, M) and timed."""

    checked: tuple[tuple[int, int], ...] = ((1024, 2048), (576, 640), (2112, 7168))
    rows: tuple[int, ...] = (64, 129, 512, 513, 700)
    summed: tuple[int, int, int] = (512, 16384, 512)
    timed: tuple[tuple[int, int], ...] = ((4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192))
    rows_timed: tuple[int, ...] = (1024, 512, 256, 128, 64, 4096)


SMOKE_SIZES = Sizes(((144, 640), (64, 512)), (16, 17), (64, 512, 16), ((64, 512),), (16, 64))


class Check:
    def __init__(self, seconds: float, smoke: bool) -> None:
        self.start = time.perf_counter()
        self.seconds, self.smoke = seconds, smoke
        self.sizes, self.limits = (SMOKE_SIZES, SMOKE_LIMITS) if smoke else (Sizes(), LIMITS)
        self.device = torch.device("cpu" if smoke else "cuda")
        self.failed = self.multiplied = 0
        self.product = float8_scaled.scaled_mm
        float8_scaled.scaled_mm = self.scaled_mm

    def scaled_mm(self, *arguments: Any, **options: Any) -> Tensor:
        """Torch's, counted."""
        out = self.product(*arguments, **options)
        self.multiplied += 1
        return out

    def over(self, share: float) -> bool:
        return time.perf_counter() > self.start + share * self.seconds

    def verdict(self, good: bool, text: str) -> None:
        self.failed += not good
        print("ok   " if good else "WRONG", text, flush=True)

    def crashed(self, what: object, error: Exception) -> None:
        self.verdict(False, f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:250]}")

    def weight(self, n: int, k: int, kind: str, activation: Any) -> PackedWeight:
        fixed = torch.tensor([0.01], device=self.device) if activation == "fp8_static" else None
        packed = random_weight(f"fp8-{kind}", n, k, self.device)
        return replace(packed, activation=activation, input_scale=fixed)


def op(packed: PackedWeight, least: int | None, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """The backend's linear with torch's product from `least` rows on; None: `float8_native`."""
    assert isinstance(packed.encoding, Float8)
    weight = (packed.codes, packed.scale, bias, *packed.encoding.block, packed.activation, packed.input_scale)

    def run(x: Tensor) -> Tensor:
        float8_tuning.SCALED_ROWS = float8_tuning.SCALED_BLOCK_ROWS = least
        return float8.float8_linear(x, *weight)

    return run


def exact(x: Tensor, packed: PackedWeight) -> Tensor:
    """`x`, rounded, times W in float64."""
    assert packed.activation is not None
    q, scale = float8.round_activation(x, packed.activation, packed.input_scale, E4M3)
    wide = scale.double()
    if packed.activation == "fp8_group128":
        wide = wide.repeat_interleave(128, 1)[:, : q.shape[1]]
    return (q.double() * wide) @ dequantize(packed, torch.float64).T


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def check_products(check: Check) -> None:
    """Per weight: the route of each M (T torch's, N native), the worst error, the limit."""
    shapes, rows = check.sizes.checked, check.sizes.rows
    print("routes for M =", *rows)
    for (n, k), dtype, kind, with_bias in product(shapes, LIMITS, KINDS, (False, True)):
        # float32 and the largest shape: once
        if (dtype == torch.float32 and (n, k) != shapes[0]) or (n == 2112 and dtype != torch.bfloat16):
            continue
        case = f"{' '.join(kind):20s} {n} x {k} {str(dtype)[6:]}{' bias' if with_bias else ''}"
        if check.over(0.45):
            print(f"time is up: {case} and what follows not checked")
            return
        try:
            packed, routes, worst = check.weight(n, k, *kind), "", 0.0
            bias = torch.randn(n, device=check.device, dtype=dtype) if with_bias else None
            for m in rows:
                x = torch.randn(m, k, device=check.device, dtype=dtype)
                want = exact(x, packed) + (0 if bias is None else bias.double())
                before = check.multiplied
                got = op(packed, 1, bias)(x)
                routes += "T" if check.multiplied > before else "N"
                assert got.shape == want.shape and got.dtype == dtype and got.is_contiguous()
                # A misplaced scale shows in its row.
                row = float(((got.double() - want).norm(dim=1) / want.norm(dim=1)).max())
                worst = max(worst, relative(got, want), row / 3)
            good = worst < check.limits[dtype]
            check.verdict(good, f"{case}: {routes} {worst:.1e} of {check.limits[dtype]:.0e}")
        except Exception as error:
            check.crashed(case, error)


def check_sums(check: Check) -> None:
    """All terms positive, long K, float32 results: how much of the running sum is kept?"""
    n, k, m = check.sizes.summed
    for kind in KINDS[3:]:
        packed = check.weight(n, k, *kind)
        packed = replace(packed, codes=packed.codes & 0x7F)
        x, before = torch.randn(m, k, device=check.device).abs(), check.multiplied
        want = exact(x, packed)
        by_torch, native = (relative(op(packed, least)(x), want) for least in (1, None))
        if check.multiplied == before:
            print("-    ", *kind, f"not torch's; native {native:.1e}")
            continue
        limit = max(LIMITS[torch.float32], 2 * native)
        check.verdict(by_torch < limit, f"{kind}: torch {by_torch:.1e} of {limit:.0e}, native {native:.1e}")


def check_graphs(check: Check) -> None:
    """Captured, which a host sync would break; a replay on other inputs equals eager bit for bit."""
    if check.smoke:
        print("-     no graphs on a CPU")
        return
    for kind in KINDS:
        run = op(check.weight(1024, 2048, *kind), 1)
        x = torch.randn(513, 2048, device=check.device, dtype=torch.bfloat16)
        run(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        check.verdict(torch.equal(out, run(x)), f"{' '.join(kind)}: replay and eager")


def times(check: Check) -> Iterator[tuple[str, int, float]]:
    """(scales of W, M, native / torch) of every measured cell."""
    print(f"\n{'weight':8s} {'N':>6s} {'K':>6s} {'M':>5s}", *(f"{c:>10s}" for c in COLUMNS), "native/torch")
    for (n, k), kind in product(check.sizes.timed, KINDS[3:]):
        packed = check.weight(n, k, *kind)
        # Together three times the cache.
        most = 2 if check.smoke else 48
        count = min(most, max(2, -(-3 * bench.cache_bytes(check.device) // packed.nbytes())))
        copies = [deepcopy(packed) for _ in range(count)]
        dense = [dequantize(packed, torch.bfloat16) for _ in range(max(2, count // 2))]
        rounding = partial(float8.round_activation, activation=kind[1], input_scale=None, dtype=E4M3)
        for m in check.sizes.rows_timed:
            case = f"{kind[0]:8s} {n:6d} {k:6d} {m:5d}"
            if check.over(1.0):
                print(f"time is up: {case} and what follows not measured")
                return
            timed: dict[str, list[Any]] = {
                "dense": [partial(torch.nn.functional.linear, weight=d) for d in dense],
                "native": [op(c, None) for c in copies],
                "torch": [op(c, 1) for c in copies],
                "rounding": [partial(rounding, blocks=kind[0] == "block")] * 2,
            }
            try:
                x, before = torch.randn(m, k, device=check.device, dtype=torch.bfloat16), check.multiplied
                timed["torch"][0](x)
                if check.multiplied == before:
                    del timed["torch"]
                bench.GRAPH_CALLS = 8 if m * n * k > 1 << 36 else 24
                timers = {name: bench.timer(calls, x) for name, calls in timed.items()}
                taken = bench._take_turns(timers, 0.0 if check.smoke else 0.01)
            except Exception as error:
                check.crashed(case, error)
                continue
            us = {name: statistics.median(t) * 1e6 for name, t in taken.items()}
            ratio = us["native"] / us.get("torch", math.nan)
            print(case, *(f"{us.get(c, math.nan):10.1f}" for c in COLUMNS), f"{ratio:.2f}", flush=True)
            if "torch" in us:
                yield kind[0], m, ratio


def thresholds(measured: list[tuple[str, int, float]]) -> None:
    for kind, name in (("channel", "SCALED_ROWS"), ("block", "SCALED_BLOCK_ROWS")):
        least, slower = None, False
        for m in sorted({m for of, m, _ in measured if of == kind}, reverse=True):
            ratios = [ratio for of, rows, ratio in measured if (of, rows) == (kind, m)]
            print(f"{kind} M = {m}: native/torch {min(ratios):.2f} to {max(ratios):.2f}")
            slower = slower or min(ratios) <= 1
            least = least if slower else m
        print(f"{name} = {least}", "(None: never faster in every shape, or not measured)")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for all, compilation included")
    parser.add_argument("--smoke", action="store_true", help="small sizes on a CPU, sm_90 pretended")
    given = parser.parse_args()
    if given.smoke:
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("--smoke needs TRITON_INTERPRET=1 in the environment")
        launch.target = lambda: ("cuda", 90)  # type: ignore[assignment]
        float8_tuning.NATIVE_ROWS = 8
    elif not torch.cuda.is_available() or not launch.has_float8():
        print("no device of sm_89 or newer: nothing checked")
        return 2
    os.environ["QUANTKIT_KERNELS"] = ""  # strict would raise where torch refuses
    torch.manual_seed(0)
    check = Check(given.seconds, given.smoke)
    print(f"{bench.device_name(check.device)}, {launch.target()}, torch {torch.__version__}, CUDA", torch.version.cuda,
          "triton", triton.__version__)  # fmt: skip
    for part in (check_products, check_sums, check_graphs):
        print(f"\n{part.__doc__}")
        try:
            part(check)
        except Exception as error:
            check.crashed(part.__name__, error)
    print("\nrefused:", *(f"{r[1].name} {r[2]}{' bias' * r[3]};" for r in float8_scaled._refused))
    thresholds(list(times(check)))
    if not check.multiplied:
        print("torch multiplied nothing: nothing checked")
    return 1 if check.failed or not check.multiplied else 0


if __name__ == "__main__":
    sys.exit(main())
