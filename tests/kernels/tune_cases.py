"""Tuning in Triton's interpreter with a clock that prefers one tile: choose, write, read back, use.

A program of its own (TRITON_INTERPRET must be set before Triton is imported); prints one JSON object.
"""

from __future__ import annotations

import json
from unittest import mock

import torch

from quantkit.kernels import codebook_tuning, float8_tuning, tune, tuned, tuning

CPU = torch.device("cpu")


def main() -> None:
    timed: list[object] = []

    def clock(products, x):  # type: ignore[no-untyped-def]
        cells = [cell.cell_contents for cell in products[0].__closure__]
        config = next(c for c in cells if hasattr(c, "stages"))
        timed.append(config)
        cost = 100.0 + abs(config.split - 2) * 10 + abs(config.stages - 2) * 10
        return lambda: cost / 1e6

    out = {}
    with mock.patch.object(tuned, "device_class", lambda device=None: "interpreter"):
        found = tune.tune(
            ["affine-4g32", "nf4", "fp8-block"], [(32, 256)], [1], device=CPU, dtype=torch.float32,
            seconds=100, clock=clock,
        )  # fmt: skip
        tuned.write(tuned.Cache(device="interpreter", torch="test", entries=[f.entry for f in found]))
        used = {
            "affine": tuning.gemm_config(1, 32, 256, 4),
            "codebook": codebook_tuning.config(1, 32, False, 256),
            "float8": float8_tuning.config(1, 32, False, 256),
        }
        for item in found:
            entry = item.entry
            tile = used[entry.family]
            out[entry.family] = {
                "used": tile.split == entry.tile.split == 2 and tile.stages == entry.tile.stages == 2,
                "gain": entry.shipped_us / entry.tuned_us,
                "tried": item.tried,
                "other_shape_is_shipped": tuning.gemm_config(1, 64, 256, 4).split == 1,
            }
        with tuned.ignored():
            out["ignored"] = tuning.gemm_config(1, 32, 256, 4) != used["affine"]
    print(json.dumps(out))


if __name__ == "__main__":
    main()
