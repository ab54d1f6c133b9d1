"""Time of a decoder layer's quantized products, with the elementwise kernels of a model in between.

    python scripts/bench_layer.py --form nf4 --form affine-4g128 --rows 1,2,4,8,16
    python scripts/bench_layer.py --device cpu --hidden 512 --intermediate 1024 --key-value 128 --form nf4 --rows 1

q, k, v, o, gate, up and down of a Llama layer (Llama-3-8B's sizes unless told otherwise); a copy of x stands where a
model normalizes, attends, gates and adds. What only helps a row of equal products, `quantkit bench kernels` shows and
this does not. On a GPU the calls over some layers' weights, too large for the L2 cache, are captured. us per layer,
medians.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.kernels import bench
from quantkit.kernels.bench_cases import FORMATS, random_weight, run_op

LAYERS = 4
REPLAYS = 60


def layer(
    form: str, hidden: int, wide: int, key_value: int, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """A layer's products of `x [M, hidden]`; what leaves is down's result."""

    def op(n: int, k: int) -> Callable[[Tensor], Tensor]:
        return run_op(random_weight(form, n, k, device))

    q, o = op(hidden, hidden), op(hidden, hidden)
    k, v = op(key_value, hidden), op(key_value, hidden)
    gate, up, down = op(wide, hidden), op(wide, hidden), op(hidden, wide)

    def run(x: Tensor) -> Tensor:
        x = x.clone()
        k(x), v(x)
        x = q(x).clone()
        x = o(x).clone()
        gate(x)
        return down(up(x).clone()).clone()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--form", action="append", choices=FORMATS)
    parser.add_argument("--rows", default="1,2,4,8,16")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--key-value", type=int, default=1024, help="Rows of k and of v.")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    device = torch.device(given.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    print(bench.device_name(device), f"torch {torch.__version__}")
    for form in given.form or ["nf4", "hqq-4g64", "affine-4g128", "affine-3g128"]:
        sizes = (given.hidden, given.intermediate, given.key_value)
        layers = [layer(form, *sizes, device) for _ in range(LAYERS)]
        for rows in map(int, given.rows.split(",")):
            x = torch.randn(rows, given.hidden, device=device, dtype=dtype)
            replay = bench.timer(layers, x)
            replay()
            us = statistics.median(replay() for _ in range(REPLAYS)) * 1e6
            print(f"{form:14} M={rows:<4} {us:9.1f} us a layer", flush=True)


if __name__ == "__main__":
    main()
