"""Proof of exported kernels: where a GPU of their targets is here, each product is run and compared.

Every distinct product is launched through `quantkit.export.aot` at the ends of its regimes, on random x, and
compared with quantkit's reference in float32 on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quantkit.errors import NumericsError, UsageError
from quantkit.export import aot
from quantkit.export.kernel_manifest import read_manifest
from quantkit.export.proof import Proof
from quantkit.kernels import reference

#: Allowed L2 error of a product: rounding of the result to the dtype; of activations, where they are rounded.
ALLOWED = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-4}
ROUNDED = 2e-2


def prove(
    model: Any, folder: Path, dtype: torch.dtype, atol: float | None
) -> tuple[Proof | None, str | None]:
    """(the proof, None), or (None, why there is none); NumericsError names the layer that differs.

    `atol` is the largest absolute difference of an output; None allows `ALLOWED` relative to the output.
    """
    manifest = read_manifest(folder)
    try:
        kernels = aot.load(folder)
    except UsageError as absent:
        return None, f"the kernels were compiled and not run: {absent.what}"
    worst, largest, squared, total, compared = 0.0, 0.0, 0.0, 0.0, 0
    generator = torch.Generator().manual_seed(20)
    for index, product in enumerate(manifest["products"]):
        name = next(n for n, i in manifest["layers"].items() if i == index)
        layer = model.get_submodule(name)
        ends = [r["rows"] for r in product["plans"][kernels.target]["regimes"]]
        beyond = min(ends[-1][1] + 1, 512)
        for rows in sorted({min(m, 512) for pair in ends for m in pair} | {beyond}):
            x = torch.randn(rows, product["shape"][1], generator=generator).to(dtype)
            bias = None if layer.bias is None else layer.bias.data.float()
            want = reference.quant_linear(x.float(), layer.packed, bias)
            device = torch.accelerator.current_accelerator()
            got = kernels.linear(name, x.to(device)).cpu().float()
            error = float((got - want).norm() / want.norm().clamp(min=1e-30))
            allowed = max(ALLOWED[dtype], ROUNDED if layer.activation else 0.0)
            difference = float((got - want).abs().max())
            if not (error <= allowed if atol is None else difference <= atol):
                raise NumericsError(
                    f"the kernels of {name} differ at {rows} rows: relative error {error:.2g}, allowed {allowed:g}",
                    hint="Nothing was published. Report this.",
                )
            worst, largest = max(worst, difference), max(largest, float(want.abs().max()))
            squared += float((got - want).double().square().sum())
            total += float(want.double().square().sum())
            compared += 1
    shown = atol if atol is not None else ALLOWED[dtype] * largest
    return Proof(worst, (squared / max(total, 1e-30)) ** 0.5, largest, compared, shown), None
