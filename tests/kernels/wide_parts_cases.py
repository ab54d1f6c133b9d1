"""`sum_parts_kernel` in Triton's interpreter: prints one JSON object, case -> "equal" or what is wrong.

Sums of float32 in the order of the parts, rounded once: torch gives the same bits.
"""

from __future__ import annotations

import json

import torch

from quantkit.kernels.wide_hopper_launch import TOGETHER, sum_parts


def tiles(m: int, n: int, rows: int) -> list[tuple[int, int]]:
    """First row of x and of W of every tile in the kernel's order: TOGETHER tiles of W by all of x, then the next."""
    starts = range(0, n, 128)
    blocks = [starts[i : i + TOGETHER] for i in range(0, len(starts), TOGETHER)]
    return [(x, w) for block in blocks for x in range(0, m, rows) for w in block]


def case(m: int, n: int, rows: int, whole: int, parts: int, dtype: torch.dtype, bias: bool) -> str:
    order = tiles(m, n, rows)
    sums = torch.randn(len(order) - whole, parts, rows, 128)
    added = torch.randn(n).to(dtype) if bias else None
    out = torch.randn(m, n).to(dtype)
    want = out.clone()
    for i, (x, w) in enumerate(order[whole:]):
        high, wide = min(rows, m - x), min(128, n - w)
        total = sums[i, 0].clone()
        for part in sums[i, 1:]:
            total += part
        total = total[:high, :wide]
        if added is not None:
            total = total + added[w : w + wide].float()
        want[x : x + high, w : w + wide] = total.to(dtype)
    sum_parts(sums, added, out, whole)
    wrong = int((out != want).sum())
    return "equal" if not wrong else f"{wrong} of {want.numel()} differ"


def main() -> None:
    torch.manual_seed(int.from_bytes(__import__("os").urandom(4), "little"))
    results = {}
    for m, n, rows, whole in ((40, 264, 64, 0), (300, 1160, 128, 17), (17, 1288, 32, 3), (1000, 392, 256, 9)):
        for parts, dtype, bias in ((2, torch.float16, True), (3, torch.float32, False)):
            results[f"{m} x {n} by {rows}, {parts} parts"] = case(m, n, rows, whole, parts, dtype, bias)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
