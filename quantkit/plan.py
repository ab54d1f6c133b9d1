"""Which layer gets which options, decided from headers alone, before any work.

`make_plan` meets the format's policy for odd shapes, the user's `skip` and `overrides`, and the
defaults (output embedding and routers stay as they are), and knows the exact size of the result.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from quantkit.checkpoint import CheckpointReader
from quantkit.errors import CheckpointError, UsageError, did_you_mean
from quantkit.formats.base import Format, Needs, QuantizedLayers
from quantkit.options import build_config
from quantkit.skeleton import Site, Skeleton

#: Streaming units end once they hold this many source bytes, so that memory does not grow with a layer.
UNIT_BYTES = 256 << 20


@dataclass(frozen=True)
class LayerPlan:
    """What will happen to one linear weight; `config` is None when it stays as it is."""

    site: Site
    config: Any | None
    note: str
    size_before: int
    size_after: int


@dataclass(frozen=True)
class Unit:
    """Tensors that are converted and journalled together."""

    id: str
    names: tuple[str, ...]
    layer: int | None = None


@dataclass
class ConvertPlan:
    """Everything `convert` needs to know, plus what a dry run prints."""

    reader: CheckpointReader
    skeleton: Skeleton
    format: Format
    config: Any
    layers: list[LayerPlan]
    units: list[Unit]
    calibrated: bool
    warnings: list[str] = field(default_factory=list)
    max_error: float | None = None  # relative weight error above which a layer is noted; None: by encoding

    def quantized_layers(self) -> QuantizedLayers:
        """The same, as formats want it for config.json."""
        out = QuantizedLayers(self.config, tied_lm_head=bool(self.skeleton.tied))
        for layer in self.layers:
            if layer.config is not None:
                out.quantized[layer.site.name] = layer.config
            else:
                out.skipped[layer.site.name] = layer.note
        return out

    def by_source(self) -> dict[str, list[LayerPlan]]:
        """Source tensor name -> the plans of the linear weights in it (several for fused experts)."""
        out: dict[str, list[LayerPlan]] = {}
        for layer in self.layers:
            out.setdefault(layer.site.source, []).append(layer)
        return out

    def size_after(self) -> int:
        """Bytes of all tensors that will be written."""
        delta = sum(p.size_after - p.size_before for p in self.layers if p.config is not None)
        return self.reader.total_bytes + delta


def matches(pattern: str, name: str) -> bool:
    """Does a user's pattern mean this module? `re:...` is a regular expression (searched); otherwise a
    glob for the whole name or for its last components ("down_proj", "layers.0.mlp.*")."""
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise UsageError(f"pattern {pattern!r} is no regular expression ({error})") from None
    dotted = f".{name}"
    return (
        fnmatch.fnmatchcase(name, pattern)
        or fnmatch.fnmatchcase(dotted, f"*.{pattern}")
        or fnmatch.fnmatchcase(f"{dotted}.", f"*.{pattern}.*")
    )


def source_dtype(reader: CheckpointReader) -> torch.dtype:
    """The dtype that holds most of the checkpoint's floating point bytes."""
    totals: dict[torch.dtype, int] = {}
    for info in reader.infos():
        if info.dtype.is_floating_point:
            totals[info.dtype] = totals.get(info.dtype, 0) + info.nbytes
    if not totals:
        raise CheckpointError(
            f"{reader.path}: holds no floating point tensor", hint="Give a model's weights."
        )
    return max(totals, key=lambda dtype: totals[dtype])


def make_plan(
    reader: CheckpointReader,
    skeleton: Skeleton,
    fmt: Format,
    options: Mapping[str, Any],
    *,
    skip: Sequence[str] = (),
    overrides: Sequence[tuple[str, Mapping[str, Any]]] = (),
    strict: bool = False,
) -> ConvertPlan:
    """Decide for every linear weight; UsageError when a pattern matches nothing, an option does not
    exist, the layout cannot express an override, or (with `strict`) a layer cannot be as asked."""
    config: Any = build_config(fmt, options)
    shapes = {info.name: info.shape for info in reader.infos()}
    unexpected = skeleton.check_complete(reader.names())
    sites = skeleton.sites(shapes)
    biases = any(not s.skip and f"{s.module}.bias" in skeleton.params for s in sites)
    config = fmt.resolve(config, source_dtype(reader), biases)
    calibrated = fmt.needs(config) is not Needs.NONE
    _check_patterns([*skip, *(p for p, _ in overrides)], sites)
    layers = []
    for site in sites:
        plan = _plan_site(reader, fmt, config, site, skip, overrides, calibrated)
        if strict and plan.config is None and plan.note not in _EXPECTED and not site.skip:
            raise UsageError(
                f"layer {site.name!r} cannot be quantized as asked: {plan.note}",
                hint="Drop --strict or --skip it.",
            )
        if strict and plan.config is not None and plan.note:
            raise UsageError(
                f"layer {site.name!r} would deviate: {plan.note}", hint="Drop --strict or --skip it."
            )
        layers.append(plan)
    if not any(p.config is not None for p in layers):
        reason = next((p.note for p in layers), "the model has no linear layers")
        raise UsageError(
            f"nothing to quantize in {reader.path}: {reason}", hint="Try another --group-size or format."
        )
    warnings = (
        [f"{len(unexpected)} tensors have no place in the model and are carried over: {unexpected[0]}"]
        if unexpected
        else []
    )
    adapted = [
        p
        for p in layers
        if (p.config is None and p.note not in _EXPECTED and not p.site.skip) or (p.config and p.note)
    ]
    for note in sorted({p.note for p in adapted}):
        same = [p.site.name for p in adapted if p.note == note]
        warnings.append(f"{same[0]}{f' and {len(same) - 1} more' if same[1:] else ''}: {note}")
    units = _units(reader, skeleton, calibrated)
    return ConvertPlan(reader, skeleton, fmt, config, layers, units, calibrated, warnings)


_SKIPPED = "skipped as asked"
_EXPECTED = {_SKIPPED}


def _check_patterns(patterns: Sequence[str], sites: Sequence[Site]) -> None:
    names = [s.name for s in sites]
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            leaves = sorted({n.rpartition(".")[2] for n in names})
            raise UsageError(
                f"pattern {pattern!r} matches no linear layer", hint=did_you_mean(pattern, leaves)
            )


def _plan_site(
    reader: CheckpointReader,
    fmt: Format,
    config: Any,
    site: Site,
    skip: Sequence[str],
    overrides: Sequence[tuple[str, Mapping[str, Any]]],
    calibrated: bool,
) -> LayerPlan:
    info = reader.info(site.source)
    size = site.shape[0] * site.shape[1] * info.dtype.itemsize

    def keep(reason: str) -> LayerPlan:
        return LayerPlan(site, None, reason, size, size)

    if any(matches(p, site.name) for p in skip):
        return keep(_SKIPPED)
    override = next((o for p, o in overrides if matches(p, site.name)), None)
    if site.skip and (override is None or site.skip != "output embedding (lm_head)"):
        return keep(site.skip)
    if calibrated and site.layer is None:
        return keep("outside the decoder layers, so there is nothing to calibrate it with")
    if not info.dtype.is_floating_point or info.dtype.itemsize == 1:
        return keep(f"its dtype is {str(info.dtype).removeprefix('torch.')}")
    own = config
    if override is not None:
        own = build_config(fmt, {**config.model_dump(), **override}, f"override for {site.name!r}: ")
        problem = fmt.check_overrides(config, own)
        if problem:
            raise UsageError(f"override for {site.name!r}: {problem}")
    fit = fmt.fit(site.shape, own)
    if fit.config is None:
        return keep(fit.note)
    after = sum(spec.nbytes for spec in fmt.checkpoint_spec(site.shape, fit.config).values())
    note = fit.note
    if fmt.experts_note and ".experts." in f".{site.module}":
        note = "; ".join(n for n in (note, fmt.experts_note) if n)
    if site.conv1d and not fmt.supports_conv1d:
        note = "; ".join(
            n for n in (note, "a Conv1D layer: quantkit reads it, the format's own loaders do not") if n
        )
    return LayerPlan(site, fit.config, note, size, after)


_LAYER_PREFIX = re.compile(r"^(.*?\.\d+)\.")


def _units(reader: CheckpointReader, skeleton: Skeleton, calibrated: bool) -> list[Unit]:
    """Natural order; one unit per decoder layer when calibrated, else runs of at most UNIT_BYTES."""
    units: list[Unit] = []
    current: list[str] = []
    size, key = 0, ""

    def flush() -> None:
        nonlocal current, size
        if current:
            layer = int(key.rpartition(":")[2]) if key.startswith("layer:") else None
            units.append(Unit(f"{len(units):05d}:{current[0]}", tuple(current), layer))
        current, size = [], 0

    layers: dict[int, list[str]] = {}
    order: list[tuple[str, str]] = []
    for name in reader.names():
        target = skeleton.resolve(name) or next(
            (t.param for t in skeleton.targets(name, reader.info(name).shape)), None
        )
        layer = skeleton.layer_index(target) if target else None
        if calibrated and layer is not None:
            if layer not in layers:
                layers[layer] = []
            layers[layer].append(name)
            continue
        match = _LAYER_PREFIX.match(name)
        order.append((match[1] if match else "", name))
    for prefix, name in order:
        nbytes = reader.info(name).nbytes
        if current and (prefix != key or size + nbytes > UNIT_BYTES):
            flush()
        key = prefix
        current.append(name)
        size += nbytes
    flush()
    for layer in sorted(layers):
        key = f"layer:{layer}"
        current = layers[layer]
        flush()
    return units
