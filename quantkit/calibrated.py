"""One decoder layer through a calibrated format: statistics, smoothing, codes, outputs.

For each layer: (AWQ only) statistics of all its linears, then the scale search, which rewrites norms
and weights in place; then, group by group in the order of computation, statistics of the group's input
with everything before it already quantized, and `format.quantize`; then the quantized layer's outputs,
which are the next layer's inputs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.calibration import LayerRunner
from quantkit.distributed import Workers
from quantkit.encoding import dequantize
from quantkit.errors import DestinationError
from quantkit.formats.base import LayerStats, Needs, note
from quantkit.linear import materialize
from quantkit.plan import ConvertPlan, LayerPlan, Unit
from quantkit.progress import Progress
from quantkit.report_types import LayerReport
from quantkit.sites import kept_report, layer_report, quantize_site, site_tensors


class CalibratedLayers:
    """Converts the decoder layers of a plan one after another."""

    def __init__(
        self,
        plan: ConvertPlan,
        ids: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        scratch: Path,
        workers: Workers,
        completed: set[str],
        progress: Progress,
    ) -> None:
        self.plan = plan
        self.progress = progress
        share = ids[workers.rank :: workers.world]
        own = scratch / f"worker-{workers.rank}" if workers.world > 1 else scratch
        self.runner = LayerRunner(
            plan.reader, plan.skeleton, share, device=device, dtype=dtype, scratch=own, workers=workers
        )
        self.units = [u for u in plan.units if u.layer is not None]
        finished = [u for u in self.units if u.id in completed]
        progress.stage("running the embeddings")
        self.runner.capture(keep_first=not finished)
        if finished and len(finished) < len(self.units):
            nxt = self.runner.states(int(finished[-1].layer or 0) + 1)
            if not nxt.complete():
                raise DestinationError(
                    f"{nxt.path}: the interrupted run's activations are gone or damaged",
                    hint="Start again without --resume.",
                )
        self.by_source = plan.by_source()
        self.model_type = str(getattr(plan.skeleton.hf_config.get_text_config(), "model_type", ""))

    def convert(self, unit: Unit) -> tuple[dict[str, Tensor], list[LayerReport]]:
        """Quantize one decoder layer; its outputs are on disk when this returns."""
        assert unit.layer is not None
        plan, index = self.plan, unit.layer
        prefix = f"{plan.skeleton.layers_path}.{index}."
        layers = [p for name in unit.names for p in self.by_source.get(name, [])]
        by_path = {p.site.module.removeprefix(prefix): p for p in layers if p.config is not None}
        self.progress.stage(f"layer {index + 1} of {len(self.units)}")
        tensors: dict[str, Tensor] = {}
        reports: dict[str, LayerReport] = {}
        with self.runner.layer(index) as layer, torch.no_grad():
            remarks = self._smooth(index, layer, by_path)
            order = self.runner.groups(index, list(by_path)) if by_path else []
            for group in order:
                stats = self.runner.statistics(index, [group], list(by_path))
                unseen = pool_unseen(stats) if group.routed else set()
                for path, stat in stats.items():
                    target = by_path[path]
                    started = time.perf_counter()
                    module = layer.get_submodule(path)
                    weight = _dense(module)
                    packed = quantize_site(plan, target, weight, stat)
                    for remark in remarks.get(path, ()):
                        note(remark)
                    if path in unseen:
                        note("no calibration token reached this expert: its siblings' statistics were used")
                    reports[path] = layer_report(
                        plan, target, weight, packed, stat, time.perf_counter() - started
                    )
                    tensors.update(site_tensors(plan, target, packed))
                    dense = dequantize(packed)
                    if target.site.conv1d:
                        dense = dense.t().contiguous()
                    materialize(plan.skeleton.model, target.site.module + ".weight", dense)
                del stats
            self.runner.advance(index)
            out = self._in_order(unit, tensors)
        final = [
            reports[p.site.module.removeprefix(prefix)] if p.config is not None else kept_report(p)
            for p in layers
        ]
        return out, final

    def done(self, unit: Unit) -> None:
        """The unit is durable: the inputs of its layer are no longer needed."""
        if unit.layer is not None:
            self.runner.drop(unit.layer)

    # -- AWQ --------------------------------------------------------------------------------------

    def _smooth(self, index: int, layer: nn.Module, by_path: dict[str, LayerPlan]) -> dict[str, list[str]]:
        """Scale search for formats that want it; remarks per linear."""
        plan = self.plan
        if plan.format.needs(plan.config) is not Needs.SMOOTHING or not by_path:
            return {}
        from quantkit.algorithms.awq import smooth_layer
        from quantkit.topology import discover_groups, scale_groups

        scale = scale_groups(layer, self.model_type)
        remarks: dict[str, list[str]] = {}
        if not scale:
            start = 0
            stop = min(self.runner.micro, self.runner.ids.shape[0])
            hidden = self.runner.inputs(index, start, stop)
            scale, found = discover_groups(
                layer, lambda: self.runner.run(index, start, stop, hidden, exact=True)
            )
            for path in by_path:
                remarks[path] = list(found)
        # Statistics for every consumer, also those that stay dense: their producer may be rescaled.
        paths = sorted({c for g in scale for c in g.consumers} | set(by_path))
        stats: dict[str, LayerStats] = self.runner.statistics(index, self.runner.groups(index, paths), paths)
        configs: dict[str, Any] = {path: p.config for path, p in by_path.items()}
        dtypes = {plan.reader.info(n).dtype for n in self.runner._by_layer[index]}
        store = next((d for d in dtypes if d.is_floating_point), None)
        for report in smooth_layer(layer, scale, stats, plan.config, configs, store_dtype=store):
            for path in report.consumers:
                remarks.setdefault(path, []).extend(report.notes)
        return remarks

    # -- writing ----------------------------------------------------------------------------------

    def _in_order(self, unit: Unit, quantized: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of the unit in source order: quantized ones, and the others as the layer has them
        now if smoothing changed them, else byte for byte."""
        plan = self.plan
        smoothing = plan.format.needs(plan.config) is Needs.SMOOTHING
        out: dict[str, Tensor] = {}
        for name in unit.names:
            layers = self.by_source.get(name, [])
            if not any(p.config is not None for p in layers):
                value = plan.reader.read(name)
                out[name] = self._current(name, value) if smoothing else value
                continue
            for layer in layers:
                mine = {k: v for k, v in quantized.items() if k.startswith(layer.site.name + ".")}
                if layer.config is None:
                    weight = plan.skeleton.model.get_parameter(layer.site.module + ".weight")
                    out[layer.site.name + ".weight"] = weight.detach().to("cpu", plan.reader.info(name).dtype)
                out.update(mine)
        return out

    def _current(self, name: str, value: Tensor) -> Tensor:
        """`value` of checkpoint tensor `name`, with what smoothing changed in the model put in."""
        if not value.is_floating_point():
            return value
        for target in self.plan.skeleton.targets(name, tuple(value.shape)):
            now = self.plan.skeleton.model.get_parameter(target.param).detach().cpu()
            part = value if target.index is None else value[target.index]
            part = part if target.rows is None else part[target.rows[0] : target.rows[1]]
            if not torch.equal(part.float(), now):
                part.copy_(now.to(value.dtype))
        return value


def pool_unseen(stats: dict[str, LayerStats]) -> set[str]:
    """Give experts that no token reached the statistics summed over their siblings (the same matrix of
    the other experts), in place; returns their paths. Untouched when no sibling saw a token either."""
    unseen = {path for path, stat in stats.items() if stat.tokens == 0}
    for leaf in {path.rpartition(".")[2] for path in unseen}:
        seen = {
            id(s): s for path, s in stats.items() if path.rpartition(".")[2] == leaf and s.tokens
        }.values()
        if not seen:
            continue
        pooled = LayerStats(sum(s.tokens for s in seen))
        for name in ("hessian", "abs_sum"):
            setattr(pooled, name, torch.stack([getattr(s, name) for s in seen]).sum(0))
        pooled.abs_max = torch.stack([s.abs_max for s in seen if s.abs_max is not None]).amax(0)
        for path in unseen:
            if path.rpartition(".")[2] == leaf:
                stats[path] = pooled
    return unseen


def _dense(module: nn.Module) -> Tensor:
    """Weight `[N, K]` of a linear or Conv1D."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t().contiguous() if type(module).__name__ == "Conv1D" else weight.detach()
