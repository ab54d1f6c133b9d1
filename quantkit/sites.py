"""Converting single linear weights: read, quantize, name the tensors, report the error."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from quantkit.checkpoint import CheckpointReader
from quantkit.encoding import PackedWeight, dequantize
from quantkit.error_limits import default_limit, error_note
from quantkit.errors import NumericsError, QuantkitError
from quantkit.formats.base import LayerStats, take_notes
from quantkit.plan import ConvertPlan, LayerPlan, Unit
from quantkit.progress import Progress
from quantkit.report_types import LayerReport


def stream_unit(
    plan: ConvertPlan, unit: Unit, device: torch.device, progress: Progress
) -> tuple[dict[str, Tensor], list[LayerReport]]:
    """Convert a unit's tensors one at a time, without a model."""
    out: dict[str, Tensor] = {}
    reports: list[LayerReport] = []
    by_source = plan.by_source()
    for name in unit.names:
        layers = by_source.get(name, [])
        if not any(p.config is not None for p in layers):
            out[name] = plan.reader.read(name, check_finite=True)
            reports.extend(kept_report(p) for p in layers)
            continue
        for layer in layers:
            weight = read_site(plan.reader, layer)
            if layer.config is None:
                out[layer.site.name + ".weight"] = weight
                reports.append(kept_report(layer))
                continue
            started = time.perf_counter()
            dense = weight.to(device, torch.float32)
            if layer.site.conv1d:
                dense = dense.t().contiguous()
            packed = quantize_site(plan, layer, dense, None)
            report = layer_report(plan, layer, dense, packed, None, time.perf_counter() - started)
            out.update(site_tensors(plan, layer, packed))
            reports.append(report)
            progress.layer(report)
    return out, reports


def read_site(reader: CheckpointReader, layer: LayerPlan) -> Tensor:
    """The dense weight of one site as stored (a slice where experts are fused)."""
    site = layer.site
    if site.index is None:
        return reader.read(site.source, check_finite=True)
    value = reader.read_index(site.source, site.index, check_finite=True)
    return value if site.rows is None else value[site.rows[0] : site.rows[1]].clone()


def quantize_site(
    plan: ConvertPlan, layer: LayerPlan, weight: Tensor, stats: LayerStats | None
) -> PackedWeight:
    """`format.quantize` with errors that name the layer."""
    take_notes()
    try:
        return plan.format.quantize(weight, layer.config, stats)
    except QuantkitError as error:
        raise type(error)(f"layer {layer.site.name!r}: {error.what}", hint=error.hint) from error


def site_tensors(plan: ConvertPlan, layer: LayerPlan, packed: PackedWeight) -> dict[str, Tensor]:
    """Named tensors of one quantized layer, on the CPU."""
    tensors = plan.format.to_checkpoint(packed, layer.config)
    return {f"{layer.site.name}.{suffix}": t.detach().cpu().contiguous() for suffix, t in tensors.items()}


def kept_report(layer: LayerPlan) -> LayerReport:
    """Report of a linear weight that stays as it was."""
    count = layer.site.shape[0] * layer.site.shape[1]
    return LayerReport(
        layer.site.name,
        layer.site.shape,
        "kept",
        bits_per_weight=layer.size_before * 8 / count,
        notes=[layer.note],
    )


def layer_report(
    plan: ConvertPlan,
    layer: LayerPlan,
    weight: Tensor,
    packed: PackedWeight,
    stats: LayerStats | None,
    seconds: float,
) -> LayerReport:
    """Errors of one quantized layer: of the weight, and of its output under the calibration inputs."""
    assert layer.config is not None
    dense = dequantize(packed)
    delta = dense - weight
    norm = _norm(weight)
    weight_error = _norm(delta) / norm if norm > 0 else _norm(delta)
    if not torch.isfinite(dense).all():
        raise NumericsError(
            f"layer {layer.site.name!r}: the quantized weight is not finite", hint="Skip this layer."
        )
    output_error = None
    if stats is not None and stats.hessian is not None and stats.hessian.numel() and stats.tokens:
        signal = float(((weight @ stats.hessian) * weight).sum().clamp_min(0))
        noise = float(((delta @ stats.hessian) * delta).sum().clamp_min(0))
        output_error = (noise / signal) ** 0.5 if signal > 0 else 0.0
    notes = ([layer.note] if layer.note else []) + take_notes()
    limit = plan.max_error if plan.max_error is not None else default_limit(packed.encoding, weight.shape[1])
    # Codes fitted to the outputs may be far from the weight: then the output's error is the one that counts.
    counted = weight_error if output_error is None else min(weight_error, output_error)
    if note := error_note(weight, delta, counted, limit):
        notes.append(note)
    return LayerReport(
        layer.site.name,
        layer.site.shape,
        "quantized",
        layer.config.model_dump(mode="json"),
        layer.size_after * 8 / (weight.shape[0] * weight.shape[1]),
        weight_error,
        output_error,
        seconds,
        notes,
    )


def _norm(values: Tensor) -> float:
    """Euclidean norm, also where its square is beyond float32 (weights of 1e30)."""
    norm = float(values.norm())
    if math.isfinite(norm):
        return norm
    top = float(values.abs().amax())
    return float((values / top).norm()) * top
