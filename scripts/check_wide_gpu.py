"""Products of `wide_hopper_kernel` and `wide_hopper_dx_kernel` on a device (sm_90): W bit for bit, sums, no race.

    python scripts/check_wide_gpu.py [--jobs 12]

Every kind of weight, number of rows of x per tile and way to share tiles, in bf16 and fp16. Most of the time is
compilation, which `--jobs` processes share. Exits with 1 where a case fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from torch import Tensor

from quantkit.encoding import Float8, dequantize
from quantkit.kernels import (
    launch,
    launch_weight,
    ops,
    sliced,
    wide_hopper_dx_launch,
    wide_hopper_launch,
)
from quantkit.kernels.bench_cases import random_weight
from quantkit.kernels.wide_hopper_plan import BN, Plan, plan, share

#: Groups of a step, of a turn (two steps), longer, of a row; float zeros; tails of N; odd numbers of steps and turns.
#: Scales are float16, or "own": in the dtype of x, "other": the other one of 16 bits, "wide": float32; float zeros too.
CASES = (
    ("affine-4g128", 264, 640), ("affine-4g64", 520, 576), ("hqq-4g64", 1032, 1024), ("affine-4g192", 64, 192),
    ("affine-4g1024", 256, 1024), ("nf4", 264, 576), ("affine-8g128 own", 264, 640), ("affine-8g64 own", 520, 576),
    ("hqq-8g64", 1032, 1024), ("affine-8g192 other", 64, 192), ("fp8-tensor", 264, 576), ("fp8-channel", 520, 640),
    ("affine-4g64 own", 264, 640), ("affine-4g128 other", 520, 576), ("hqq-4g64 own", 264, 640), ("nf4", 392, 640),
    ("hqq-4g64 wide", 264, 576), ("hqq-8g128 wide", 264, 640), ("affine-8g64 wide", 264, 640),
    ("affine-8g64", 264, 640), ("affine-4g64 wide", 264, 640), ("affine-4g512", 2048, 512),
    ("fp8-block", 392, 512), ("affine-4g128", 4096, 4096), ("affine-3g128", 264, 640), ("affine-3g64 own", 520, 384),
    ("hqq-3g64", 1032, 1024), ("affine-3g192", 64, 384), ("affine-3g640", 264, 640), ("affine-3g64", 392, 128),
    ("affine-3g128", 4096, 4096), ("affine-2g64", 520, 576), ("hqq-2g64", 264, 640), ("ternary", 1032, 1024),
)  # fmt: skip
#: Rows of x, of x per tile, programs (0: one for each multiprocessor), whole tiles for each, sharers of the rest.
PLANS = (
    (1, 16, 0, 0, 200), (9, 16, 7, 0, 7), (40, 32, 4, 1, 3), (40, 32, 0, 0, 200), (64, 64, 0, 9, 1),
    (100, 64, 0, 0, 200), (30, 32, 5, 0, 5), (129, 128, 3, 0, 3), (300, 256, 0, 0, 200), (300, 256, 3, 1, 2),
    (1024, 256, 0, 9, 1), (1024, 256, 0, 0, 200), (1024, 256, 5, 1, 4),
)  # fmt: skip
#: Relative to the norm of many numbers: the rounding of W and of the result.
LIMITS = {torch.bfloat16: 2e-3, torch.float16: 2.5e-4}


def check(form: str, n: int, k: int, dtype: torch.dtype) -> str:
    """One weight by every plan; what went wrong or the worst error."""
    device = torch.device("cuda")
    form, _, scales = form.partition(" ")
    packed, units = random_weight(form, n, k, device), sliced.multiprocessors(device)
    if scales:  # their dtype chooses the arithmetic
        other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
        kept = {"own": dtype, "other": other, "wide": torch.float32}[scales]
        packed = replace(packed, scale=packed.scale.to(kept))
        if packed.zero is not None and packed.zero.is_floating_point():
            packed = replace(packed, zero=packed.zero.to(kept))
    weight, dense = launch_weight.of(packed), dequantize(packed, dtype)
    # Scales of whole rows of float8 are left to the sums: W itself is not rounded.
    row_scales = isinstance(packed.encoding, Float8) and packed.encoding.block[1] >= k
    exact = dequantize(packed, torch.float64) if row_scales else dense.double()
    eye = torch.eye(k, device=device, dtype=dtype)
    assert wide_hopper_launch.covers(eye, weight), "not covered"
    through = wide_hopper_launch.launch_wide(eye, weight, None, plan(k, n, k, units))
    assert torch.equal(through.T, dense), "W differs"
    bias = torch.randn(n, device=device, dtype=dtype)

    def forward(x: Tensor, chosen: Plan) -> Tensor:
        return wide_hopper_launch.launch_wide(x, weight, bias, chosen)

    worst = check_plans(forward, exact.T, bias.double(), dtype)
    if weight.kind not in wide_hopper_dx_launch.DECODED:
        return f"{worst:.1e}"
    eye = torch.eye(n, device=device, dtype=dtype)
    assert wide_hopper_dx_launch.covers(eye, weight, k), "gradient not covered"

    def gradient(grad: Tensor, chosen: Plan) -> Tensor:
        return wide_hopper_dx_launch.launch_dx(grad, weight, k, chosen)

    assert torch.equal(gradient(eye, plan(n, k, n, units, True)), dense), "W of the gradient differs"
    return f"{worst:.1e}, gradient {check_plans(gradient, dense.double(), None, dtype):.1e}"


def check_plans(
    launch: Callable[[Tensor, Plan], Tensor], weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> float:
    """Products of random rows with float64 `weight [inputs, outputs]` by every plan; the worst error."""
    (k, n), worst, device = weight.shape, 0.0, weight.device
    units = sliced.multiprocessors(device)
    for rows, high, programs, each, sharers in PLANS:
        tiles, programs = -(-n // BN) * -(-rows // high), min(programs or units, units)
        x = torch.randn(rows, k, device=device, dtype=dtype)
        chosen = share(rows, n, k, programs, high, min(tiles, programs * each), min(sharers, programs))
        got = launch(x, chosen)
        assert all(torch.equal(got, launch(x, chosen)) for _ in range(20)), (
            f"runs differ: {rows} rows, {chosen}"
        )
        want = x.double() @ weight + (0 if bias is None else bias)
        error = float((got.double() - want).norm() / want.norm())
        # Of few numbers it varies: by a quarter for 64.
        assert error < LIMITS[dtype] * (1 + 2 / got.numel() ** 0.5), f"{error:.1e}: {rows} rows, {chosen}"
        worst = max(worst, error)
    return worst


def checked(case: tuple[str, int, int, torch.dtype]) -> tuple[bool, str]:
    try:
        return True, check(*case)
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"[:400]


def check_op() -> None:
    """The ops take these routes, with act-order too."""
    packed = random_weight("affine-4g128", 4096, 4096, torch.device("cuda"))
    assert packed.zero is not None
    x = torch.randn(2, 512, 4096, device="cuda", dtype=torch.float16)
    through = ops.affine_linear(x, packed.codes, packed.scale, packed.zero, None, None, 4, 128, None)
    direct = wide_hopper_launch.multiply(x.view(1024, 4096), launch_weight.of(packed), None)
    assert direct is not None and torch.equal(through.view(1024, 4096), direct)
    perm = torch.randperm(4096, device="cuda")
    weight = launch_weight.of(packed)._replace(perm=perm)
    back = ops.affine_linear_backward(x, packed.codes, packed.scale, packed.zero, perm, 4, 128, 4096)
    direct = wide_hopper_dx_launch.multiply(x.view(1024, 4096), weight, 4096)
    assert direct is not None and torch.equal(back.view(1024, 4096), direct)
    dense = dequantize(replace(packed, perm=perm), torch.float16)
    error = (direct.double() - x.view(1024, 4096).double() @ dense.double()).norm() / direct.double().norm()
    assert error < LIMITS[torch.float16], f"act-order: {error:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="kinds of weights that begin so")
    given = parser.parse_args()
    if not torch.cuda.is_available() or launch.target() != ("cuda", 90):
        print("no device of sm_90: nothing checked")
        return 2
    cases = [(*case, dtype) for case in CASES for dtype in LIMITS if case[0].startswith(given.only)]
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        answers = list(pool.map(checked, cases))
    for (form, n, k, dtype), (good, said) in zip(cases, answers):
        print(f"{'ok  ' if good else 'FAIL'} {form} {n} x {k} {str(dtype)[6:]}: {said}", flush=True)
    check_op()
    return 0 if all(good for good, _ in answers) else 1


if __name__ == "__main__":
    sys.exit(main())
