"""What a conversion will cost, from headers alone: memory, disk, time.

Memory follows from what is held at once (see `quantkit.convert`); time from rates measured with
`scripts/bench_convert.py` on two CPU cores and recorded in docs/benchmarks/convert.md, so it is an
order of magnitude, not a promise.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch

from quantkit.calibration_data import CalibrationData
from quantkit.plan import UNIT_BYTES, ConvertPlan
from quantkit.report_types import PlannedLayer, PlanReport

#: Dense weights quantized per second and CPU core, by format.
_WEIGHTS_PER_SECOND = {"nf4": 6e6, "hqq": 1.5e6, "fp8": 15e6, "ternary": 0.2e6, "gptq": 0.15e6, "awq": 0.08e6}
_ACCELERATOR_FACTOR = 40.0
#: Multiply-adds per second and core in calibration's float32 forward passes.
_FLOPS_PER_CORE = 2.5e10
_PASSES = 5


def plan_report(
    plan: ConvertPlan,
    source: str,
    output: str | os.PathLike[str] | None,
    data: CalibrationData | None,
    device: torch.device,
) -> PlanReport:
    """The dry run's report."""
    layers = [
        PlannedLayer(
            p.site.name,
            p.site.shape,
            "quantized" if p.config is not None else "kept",
            p.note,
            p.config.model_dump(mode="json") if p.config is not None else {},
            p.size_before,
            p.size_after,
        )
        for p in plan.layers
    ]
    quantized = [p for p in plan.layers if p.config is not None]
    weights = sum(p.site.shape[0] * p.site.shape[1] for p in quantized)
    largest = max((p.site.shape[0] * p.site.shape[1] for p in quantized), default=0)
    size_after = plan.size_after()
    total = sum(math.prod(i.shape) for i in plan.reader.infos())
    seconds = _seconds(plan, weights, data, device)
    memory = _memory(plan, largest, data)
    on_device = device.type != "cpu"
    report = PlanReport(
        source,
        str(output) if output is not None else None,
        plan.format.name,
        plan.config.model_dump(mode="json"),
        layers,
        plan.reader.total_bytes,
        size_after,
        sum(p.size_after for p in quantized) * 8 / max(1, weights),
        size_after * 8 / max(1, total),
        peak_rss=memory if not on_device else UNIT_BYTES * 2 + largest * 4,
        peak_device_memory=memory if on_device else None,
        disk=size_after + _scratch(plan, data),
        disk_free=_free(output),
        seconds=seconds,
        calibration=data.describe() if data else None,
        warnings=list(plan.warnings),
    )
    if report.disk_free is not None and report.disk > report.disk_free:
        report.warnings.append("the destination's disk has too little room for this")
    return report


def _memory(plan: ConvertPlan, largest: int, data: CalibrationData | None) -> int:
    """Bytes above the interpreter's base: a layer in float32, its Hessians and work copies."""
    work = largest * 4 * 6  # float32 weight, codes, errors, dense result, a copy for the report
    if data is None:
        return UNIT_BYTES + work
    per_layer: dict[int, int] = {}
    hessians: dict[int, int] = {}
    for p in plan.layers:
        if p.site.layer is not None:
            per_layer[p.site.layer] = per_layer.get(p.site.layer, 0) + p.site.shape[0] * p.site.shape[1] * 4
            hessians[p.site.layer] = hessians.get(p.site.layer, 0) + p.site.shape[1] ** 2 * 4
    embedding = max((i.nbytes for i in plan.reader.infos()), default=0) * 2
    return max(max(per_layer.values(), default=0) + max(hessians.values(), default=0), embedding) + work


def _scratch(plan: ConvertPlan, data: CalibrationData | None) -> int:
    """Two generations of hidden states on disk."""
    if data is None:
        return 0
    hidden = max((p.site.shape[1] for p in plan.layers if p.site.layer is not None), default=0)
    return int(data.ids.numel()) * hidden * 4 * 2


def _seconds(plan: ConvertPlan, weights: int, data: CalibrationData | None, device: torch.device) -> float:
    cores = max(1, torch.get_num_threads())
    factor = _ACCELERATOR_FACTOR if device.type != "cpu" else float(cores)
    seconds = weights / (_WEIGHTS_PER_SECOND.get(plan.format.name, 1e6) * factor)
    if data is not None:
        inside = sum(p.site.shape[0] * p.site.shape[1] for p in plan.layers if p.site.layer is not None)
        seconds += 2 * inside * data.ids.numel() * _PASSES / (2 * _FLOPS_PER_CORE * factor)
    return seconds + plan.reader.total_bytes / 500e6


def _free(output: str | os.PathLike[str] | None) -> int | None:
    if output is None:
        return None
    where = Path(output).expanduser().absolute()
    while not where.exists():
        where = where.parent
    return shutil.disk_usage(where).free
