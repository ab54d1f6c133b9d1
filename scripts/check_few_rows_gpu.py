"""`few_rows_kernel` on a device: every shipped tile against float64, in about a minute; exit code 1 if one fails.

    python scripts/check_few_rows_gpu.py            # on the accelerator
    python scripts/check_few_rows_gpu.py --jobs 4   # processes that compile side by side

Each tile with weights whose K ends inside a step, rows of x that it takes, both dtypes, bias, x with a mean and
outliers; as many programs as tiles and three, with the same bits from both and from a second call.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch

from quantkit.encoding import PackedWeight, dequantize
from quantkit.kernels import launch_weight
from quantkit.kernels.bench_cases import random_weight
from quantkit.kernels.few_rows_launch import launch_few_rows
from quantkit.kernels.few_rows_tuning import COLUMNS, CONFIGS, FewRowsConfig

FORMS = ("nf4", "affine-4g128", "hqq-4g64", "affine-4g32", "affine-3g128", "hqq-3g64", "affine-3g1792")
SHAPE = (64, 1792)
#: Rounding of the result, relative.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
#: Rounding of the sums, relative to the sum of the terms' magnitudes: of float32 (tensor cores cut off, they do not
#: round), times what an offset of 128 adds to codes, most of which are at least 1 from their zero point.
SUMS = 2.0**-23 * 128


def tiles(form: str) -> list[FewRowsConfig]:
    """The table's tiles for the form's kind that fit its groups."""
    kind = "codebook" if form == "nf4" else f"affine{form.split('-')[1][0]}"
    group = launch_weight.of(random_weight(form, 16, SHAPE[1], torch.device("cpu"))).group
    found = set()
    for (of, _), rows in CONFIGS.items():
        for tile in (t for *_, several in rows for t in several if of == kind):
            columns = tile.columns(group)
            if (
                columns
                and columns * tile.slices <= COLUMNS * tile.blocks
                and SHAPE[1] // (group or 1) % columns == 0
            ):
                found.add(replace(tile, shared=True))
    return sorted(found, key=str)


def rounded(packed: PackedWeight, dtype: torch.dtype) -> PackedWeight:
    """The weight that the kernel multiplies: a codebook's values are rounded to x's dtype."""
    return packed if packed.lut is None else replace(packed, lut=packed.lut.to(dtype).to(packed.lut.dtype))


def check(job: tuple[str, FewRowsConfig, torch.dtype]) -> tuple[float, int, list[str]]:
    """The worst error as a share of the allowed one, how many products, and what is wrong."""
    form, tile, dtype = job
    torch.seed()
    device = torch.device("cuda")
    worst, count, wrong = 0.0, 0, []
    try:
        packed = random_weight(form, *SHAPE, device)
        weight, exact = launch_weight.of(packed), dequantize(rounded(packed, dtype), torch.float64).T
        for m in range(1, COLUMNS * tile.blocks // ((tile.columns(weight.group) or 1) * tile.slices) + 1):
            for spread in (False, True):
                x = torch.randn(m, SHAPE[1] + 8, device=device)[:, : SHAPE[1]]
                if spread:
                    x = x + 3
                    x[:, ::97] *= 30
                x, bias = x.to(dtype), torch.randn(SHAPE[0], device=device).to(dtype)
                got = launch_few_rows(x, weight, bias, tile)
                want = x.double() @ exact + bias.double()
                allowed = ROUNDING[dtype] * want.abs() + SUMS * (x.double().abs() @ exact.abs())
                error = float(((got.double() - want).abs() / allowed).max())
                worst, count = max(worst, error), count + 1
                if not error <= 1:
                    wrong.append(f"{m} rows, spread {spread}: {error:.2f} of what rounding explains")
                for most in (None, 3):
                    if not torch.equal(launch_few_rows(x, weight, bias, tile, most=most), got):
                        wrong.append(f"{m} rows: other bits with {most} programs")
    except Exception as error:  # a failed compilation is a result
        wrong.append(f"{type(error).__name__}: {str(error)[:200]}")
    return worst, count, wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=12)
    jobs = [(form, tile, dtype) for form in FORMS for tile in tiles(form) for dtype in ROUNDING]
    failed = 0
    worst = dict.fromkeys(ROUNDING, 0.0)
    products = 0
    with ProcessPoolExecutor(parser.parse_args().jobs, mp_context=get_context("spawn")) as pool:
        for job, (error, count, wrong) in zip(jobs, pool.map(check, jobs), strict=True):
            worst[job[2]], products = max(worst[job[2]], error), products + count
            failed += bool(wrong)
            for line in wrong[:3]:
                print("WRONG", *job, line)
    print(
        f"{len(jobs)} kernels, {products} products, {failed} wrong;",
        {str(d)[6:]: f"{e:.1e}" for d, e in worst.items()},
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
