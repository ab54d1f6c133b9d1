"""What a conversion reports: plain dataclasses that the API returns and the command line prints.

`quantkit.convert` fills them, `quantkit.cli`, `quantkit.model_card` and scripts read them. Nothing
here imports torch, so a report can be built, saved and read without it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

Action = Literal["quantized", "kept"]


def to_plain(value: Any) -> Any:
    """`value` as JSON can hold it: dataclasses become dicts, NaN and Inf become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Sequence | set | frozenset):
        return [to_plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "model_dump"):  # a format's pydantic Config
        return to_plain(value.model_dump())
    return str(value)


class Report:
    """Base of the reports: `to_json()` gives plain dicts, lists, strings and numbers."""

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON-serialisable dictionary."""
        plain: dict[str, Any] = to_plain(self)
        return plain


@dataclass
class LayerReport(Report):
    """What happened to one linear weight."""

    name: str  # module name as the checkpoint spells it
    shape: tuple[int, ...]  # (out_features, in_features)
    action: Action
    options: dict[str, Any] = field(default_factory=dict)  # options actually used
    bits_per_weight: float = 0.0  # bytes on disk of all its tensors * 8 / number of weights
    weight_error: float = 0.0  # norm(W - W_hat) / norm(W)
    output_error: float | None = None  # the same for the layer's output on the calibration data
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)  # fallbacks taken, or why it was kept

    @property
    def worst(self) -> float:
        """The error by which layers are ranked: of the output where known, else of the weight."""
        return self.weight_error if self.output_error is None else self.output_error

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerReport:
        """The report that `to_json` wrote (journal, manifest)."""
        known = {f.name for f in dataclasses.fields(cls)}
        kwargs = {key: item for key, item in data.items() if key in known}
        kwargs["shape"] = tuple(kwargs.get("shape") or ())
        return cls(**kwargs)


@dataclass
class ConvertResult(Report):
    """What `quantkit.convert` did and what it cost."""

    output: str | None  # the published directory
    format: str
    options: dict[str, Any]
    layers: list[LayerReport] = field(default_factory=list)
    size_before: int = 0  # bytes of all tensors of the source
    size_after: int = 0  # bytes of all tensors written
    bits_per_weight: float = 0.0  # over the quantized layers, scales and zeros included
    bits_per_weight_model: float = 0.0  # over everything written
    peak_rss: int = 0  # bytes
    peak_device_memory: int | None = None  # bytes, None on a CPU
    seconds: float = 0.0
    calibration: dict[str, Any] | None = None  # source, samples, seqlen, seed, fingerprint
    warnings: list[str] = field(default_factory=list)
    source: str = ""  # the model as it was asked for

    @property
    def quantized(self) -> list[LayerReport]:
        """The layers that were quantized."""
        return [layer for layer in self.layers if layer.action == "quantized"]

    @property
    def kept(self) -> list[LayerReport]:
        """The linear layers that stayed as they were."""
        return [layer for layer in self.layers if layer.action == "kept"]

    def worst_layers(self, count: int = 5) -> list[LayerReport]:
        """The quantized layers with the largest error, worst first."""
        return sorted(self.quantized, key=lambda layer: -layer.worst)[:count]


@dataclass
class PlannedLayer(Report):
    """What a dry run says about one linear weight."""

    name: str
    shape: tuple[int, ...]
    action: Action
    reason: str = ""  # why it is kept, or how its options differ from what was asked
    options: dict[str, Any] = field(default_factory=dict)
    size_before: int = 0  # bytes
    size_after: int = 0


@dataclass
class PlanReport(Report):
    """What `quantkit.convert(..., dry_run=True)` found out from headers alone."""

    source: str
    output: str | None
    format: str
    options: dict[str, Any]
    layers: list[PlannedLayer] = field(default_factory=list)
    size_before: int = 0  # bytes of all tensors of the source
    size_after: int = 0  # bytes of all tensors that would be written
    bits_per_weight: float = 0.0  # over the quantized layers
    bits_per_weight_model: float = 0.0
    peak_rss: int = 0  # bytes, estimated
    peak_device_memory: int | None = None  # bytes, estimated; None on a CPU
    disk: int = 0  # bytes needed at the destination while converting
    disk_free: int | None = None
    seconds: float = 0.0  # estimated
    calibration: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def quantized(self) -> list[PlannedLayer]:
        """The layers that would be quantized."""
        return [layer for layer in self.layers if layer.action == "quantized"]

    @property
    def kept(self) -> list[PlannedLayer]:
        """The linear layers that would stay as they are."""
        return [layer for layer in self.layers if layer.action == "kept"]


def remarks(result: ConvertResult) -> list[str]:
    """What the quantized layers' notes say, alike ones (but for figures) once, and nothing that a
    warning of the result says already."""
    groups: dict[str, list[str]] = {}
    said = " ".join(result.warnings)
    for layer in result.quantized:
        for note in layer.notes:
            if note not in said:
                groups.setdefault(re.sub(r"\d+(\.\d+)?", "#", note), []).append(f"{layer.name}: {note}")
    return [
        first + (f" (and {len(rest)} more layers, alike)" if rest else "") for first, *rest in groups.values()
    ]
