"""Times of `wide_hopper_kernel` by tile and how tiles are shared, beside the route before it and dense (sm_90).

    python scripts/bench_wide_gpu.py --form affine-4g128 --form nf4 --shape 4096x4096 --shape 14336x4096 \
        --rows 64,512,1024 [--tiles 64,128,256] [--jobs 12]

One line a cell: us of torch's product on the dense weight, of the op without this kernel (other fused kernels, or
dequantize and BLAS), and of every tile, as rows/whole tiles/programs that share the rest; `<` marks what the op's plan
takes. Medians of captured graphs over copies of the weight that overflow the L2 cache. `--jobs` processes compile
before the clock starts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from unittest import mock

import torch
from torch import Tensor

from quantkit.encoding import PackedWeight, dequantize
from quantkit.kernels import bench, launch, launch_weight, sliced, wide_hopper_launch
from quantkit.kernels.bench_cases import random_weight, run_op
from quantkit.kernels.wide_hopper_plan import BN, TILES, choose, share, ways

#: Bytes of codes that take turns.
COLD_BYTES = 160 << 20
REPLAYS = 5


def compile_kernel(form: str, rows: int) -> str:
    """Into Triton's cache; what went wrong."""
    try:
        weight = launch_weight.of(random_weight(form, 256, 1024, torch.device("cuda")))
        assert weight.kind in wide_hopper_launch.KINDS, "the kernel has no decoding for it"
        x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
        wide_hopper_launch.launch_wide(x, weight, None, share(rows, 256, 1024, 3, rows, 0, 3))
        torch.cuda.synchronize()
    except Exception as error:
        return f"{form}, {rows} rows: {type(error).__name__}: {error}"[:300]
    return ""


def microseconds(products: list[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    replay = bench.timer(products, x)
    replay()
    return statistics.median(replay() for _ in range(REPLAYS)) * 1e6


def copies(form: str, n: int, k: int) -> list[PackedWeight]:
    first = random_weight(form, n, k, torch.device("cuda"))
    count = max(2, min(6, COLD_BYTES // first.codes.numel() + 1))
    return [
        first,
        *(replace(first, **{a: t.clone() for a, t in first.tensors().items()}) for _ in range(count - 1)),
    ]


def measure(form: str, n: int, k: int, rows: list[int], tiles: list[int]) -> None:
    packed = copies(form, n, k)
    weights, dense = [launch_weight.of(p) for p in packed], [dequantize(packed[0], torch.bfloat16)]
    if dense[0].numel() < 9e7:
        dense.append(dense[0].clone())
    cost, units = (
        wide_hopper_launch.decoding_cost(weights[0]),
        sliced.multiprocessors(packed[0].codes.device),
    )
    for m in rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        on_dense = microseconds([lambda x, w=w: x @ w.T for w in dense], x)
        with mock.patch.object(wide_hopper_launch, "multiply", lambda *_: None):
            before = microseconds([run_op(p) for p in packed], x)
        taken = choose(m, n, k, cost, units)
        cells, seen = [], set()
        for high in tiles or [min((t for t in TILES if t >= m), default=256)]:
            for whole, sharers in ways(-(-n // BN) * -(-m // high), units):
                plan = share(m, n, k, units, high, whole, sharers)
                if plan in seen:
                    continue
                seen.add(plan)
                us = microseconds(
                    [lambda x, w=w, p=plan: wide_hopper_launch.launch_wide(x, w, None, p) for w in weights], x
                )
                cells.append(
                    f"{plan.rows}/{plan.whole}/{plan.sharers} {us:.1f}{'<' if plan == taken else ''}"
                )
        print(
            f"{form} {n}x{k} M={m}: dense {on_dense:.1f}, before {before:.1f}, {', '.join(cells)}", flush=True
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--form", action="append", help="as `quantkit bench kernels -f`")
    parser.add_argument("--shape", action="append")
    parser.add_argument("--rows", default="64,512,1024")
    parser.add_argument("--tiles", default="", help="rows of x per tile (default: the plan's)")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    if not torch.cuda.is_available() or launch.target() != ("cuda", 90):
        print("no device of sm_90: nothing measured")
        return 2
    rows, tiles = ([int(v) for v in text.split(",") if v] for text in (given.rows, given.tiles))
    forms = given.form or ["affine-4g128"]
    needed = tiles or sorted({min((t for t in TILES if t >= m), default=256) for m in rows})
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        pairs = list(product(forms, needed))
        for said in pool.map(compile_kernel, *zip(*pairs)):
            if said:
                print(said)
    for form in forms:
        for shape in given.shape or ["4096x4096"]:
            n, k = map(int, shape.split("x"))
            measure(form, n, k, rows, tiles)
    return 0


if __name__ == "__main__":
    sys.exit(main())
