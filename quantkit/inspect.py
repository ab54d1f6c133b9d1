"""`quantkit.inspect`: what a checkpoint holds, from headers and config.json alone.

Works on any checkpoint that `quantkit.load` reads, whoever wrote it, and on unquantized ones. No
weight is read and no model is built.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, ConfigError
from quantkit.report_types import Report, to_plain
from quantkit.untrusted import is_plain_name, show

if TYPE_CHECKING:
    from quantkit.checkpoint import CheckpointReader, TensorInfo
    from quantkit.load import QuantizedTensors

_CODES = ("qweight", "W_q", "weight_packed", "weight")
_SHAPES = ("shape", "weight_shape")  # small tensors that state the dense shape (hqq, compressed-tensors)
_LAYOUT_BITS = {"nf4": 4, "fp8": 8, "ternary": 2}
_MAX_META = 64  # elements of a tensor that states a shape


@dataclass
class InspectedLayer(Report):
    """One quantized layer."""

    name: str
    bits: int
    options: dict[str, Any]
    weights: int  # elements of the dense weight
    size: int  # bytes of all its tensors

    @property
    def bits_per_weight(self) -> float:
        """Storage per weight, scales and zeros included."""
        return 8 * self.size / max(self.weights, 1)


@dataclass
class DtypeTotal(Report):
    """How much of a checkpoint has one dtype."""

    dtype: str
    tensors: int
    size: int


@dataclass
class InspectReport(Report):
    """What `quantkit inspect` prints."""

    path: str
    format: str | None  # quantkit's name; None when the checkpoint is not quantized
    quant_method: str | None
    options: dict[str, Any]
    architecture: str | None
    model_type: str | None
    parameters: int
    size: int  # bytes of all tensors
    quantized_size: int
    bits_per_weight: float | None  # over the quantized layers
    bits_per_weight_model: float
    layers: list[InspectedLayer] = field(default_factory=list)
    dtypes: list[DtypeTotal] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    tokenizer: list[str] = field(default_factory=list)
    chat_template: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def kinds(self) -> list[tuple[str, int]]:
        """("4 bits, group_size 128", how many layers) for every combination of options, commonest first."""
        return Counter(describe_layer(layer) for layer in self.layers).most_common()


def describe_layer(layer: InspectedLayer) -> str:
    """Width and grouping of a layer in a few words."""
    parts = [f"{layer.bits} bits"]
    for key in ("group_size", "block_size", "granularity", "weight_block_size", "strategy", "quant_type"):
        if layer.options.get(key) is not None:
            parts.append(f"{key} {layer.options[key]}")
    return ", ".join(parts)


def inspect(checkpoint: str | os.PathLike[str], *, revision: str | None = None) -> InspectReport:
    """Describe a checkpoint directory or hub model; CheckpointError when its headers are not sound."""
    from quantkit.checkpoint import CheckpointReader
    from quantkit.hub import resolve_model

    with CheckpointReader(resolve_model(checkpoint, revision)) as reader:
        return _describe(reader)


def _describe(reader: CheckpointReader) -> InspectReport:
    warnings: list[str] = []
    found, mapping = _quantized(reader, warnings)
    layers = [_layer(reader, found, name) for name in found.layers] if found else []
    ours = {tensor for tensors in found.layers.values() for tensor in tensors.values()} if found else set()
    quantized_size = sum(layer.size for layer in layers)
    weights = sum(layer.weights for layer in layers)
    dense = sum(_numel(reader.info(name)) for name in reader.names() if name not in ours)
    total = _total(reader)
    config = reader.config
    architectures = config.get("architectures")
    names = sorted(os.listdir(reader.path))
    report = InspectReport(
        path=str(reader.path),
        format=found.layout.name if found else None,
        quant_method=str(mapping["quant_method"]) if mapping else None,
        options=_options(found.config.config) if found else {},
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        model_type=config.get("model_type") if isinstance(config.get("model_type"), str) else None,
        parameters=dense + weights,
        size=total,
        quantized_size=quantized_size,
        bits_per_weight=8 * quantized_size / weights if weights else None,
        bits_per_weight_model=8 * total / max(dense + weights, 1),
        layers=layers,
        dtypes=_dtypes(reader),
        files=sorted({reader.info(name).file.name for name in reader.names()}),
        tokenizer=[
            n for n in names if n.startswith(("tokenizer", "vocab", "merges", "spiece", "sentencepiece"))
        ],
        chat_template=_has_chat_template(reader.path, names),
        provenance=_provenance(reader.path, mapping, warnings),
        warnings=warnings,
    )
    if found and not layers:
        warnings.append("config.json names a quantization, but no tensor is quantized")
    if not report.tokenizer:
        warnings.append("there is no tokenizer beside the weights")
    return report


def _quantized(
    reader: CheckpointReader, warnings: list[str]
) -> tuple[QuantizedTensors | None, Mapping[str, Any] | None]:
    """The quantized layers, or only a warning when the method is one that quantkit does not read."""
    from quantkit.formats import LAYOUTS
    from quantkit.load import find_quantized, quantization_config

    mapping = quantization_config(reader)
    if mapping is None:
        return None, None
    if mapping["quant_method"] not in LAYOUTS:
        warnings.append(f"quant_method {mapping['quant_method']!r} is not supported: sizes only")
        return None, mapping
    return find_quantized(reader), mapping


def _layer(reader: CheckpointReader, found: QuantizedTensors, name: str) -> InspectedLayer:
    tensors = found.layers[name]
    config = found.config.config_for(name)
    size = sum(reader.info(tensor).nbytes for tensor in tensors.values())
    codes = next((suffix for suffix in _CODES if suffix in tensors), None)
    if codes is None:
        raise CheckpointError(f"layer {name!r} has no codes, only {', '.join(sorted(tensors))}")
    info = reader.info(tensors[codes])
    bits = _bits(found, config, info)
    weights = _stated_weights(reader, tensors)
    if weights is None:
        weights = 8 * info.nbytes // bits
    return InspectedLayer(name, bits, _options(config), weights, size)


def _bits(found: QuantizedTensors, config: Any, codes: TensorInfo) -> int:
    if "float8" in str(codes.dtype):
        return 8
    for key in ("bits", "nbits", "num_bits"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return _LAYOUT_BITS.get(found.layout.name, 8 * codes.dtype.itemsize)


def _stated_weights(reader: CheckpointReader, tensors: Mapping[str, str]) -> int | None:
    """Elements of the dense weight where a small tensor states its shape."""
    for suffix in _SHAPES:
        if suffix in tensors and _numel(reader.info(tensors[suffix])) <= _MAX_META:
            extents = [int(extent) for extent in reader.read(tensors[suffix]).reshape(-1)]
            if len(extents) == 2 and all(0 < extent < 1 << 32 for extent in extents):
                return extents[0] * extents[1]
            raise CheckpointError(
                f"{tensors[suffix]!r} says the weight's shape is {extents}", hint="The file is damaged."
            )
    return None


def _options(config: Any) -> dict[str, Any]:
    plain = to_plain(config)
    return plain if isinstance(plain, dict) else {"config": plain}


def _numel(info: TensorInfo) -> int:
    count = 1
    for extent in info.shape:
        count *= extent
    return count


def _total(reader: CheckpointReader) -> int:
    return sum(reader.info(name).nbytes for name in reader.names())


def _dtypes(reader: CheckpointReader) -> list[DtypeTotal]:
    totals: dict[str, DtypeTotal] = {}
    for name in reader.names():
        info = reader.info(name)
        dtype = str(info.dtype).removeprefix("torch.")
        total = totals.setdefault(dtype, DtypeTotal(dtype, 0, 0))
        total.tensors += 1
        total.size += info.nbytes
    return sorted(totals.values(), key=lambda t: -t.size)


def _has_chat_template(path: Path, names: list[str]) -> bool:
    if any(name.startswith("chat_template") for name in names):
        return True
    settings = _json_file(path / "tokenizer_config.json")
    return bool(settings.get("chat_template"))


def _provenance(path: Path, mapping: Mapping[str, Any] | None, warnings: list[str]) -> dict[str, Any]:
    """Who made the files: our manifest, the model card's front matter, what other tools left."""
    from quantkit.checkpoint import MANIFEST
    from quantkit.model_card import front_matter

    result: dict[str, Any] = {}
    manifest = _json_file(path / MANIFEST)
    if manifest:
        result["quantkit_version"] = manifest.get("quantkit_version")
        stated = manifest.get("provenance")
        if isinstance(stated, dict):
            result.update({key: value for key, value in stated.items() if key != "layers"})
        warnings.extend(_size_mismatches(path, manifest))
    card = front_matter(path / "README.md")
    result.update({key: card[key] for key in ("base_model", "quantized_by", "license") if key in card})
    meta = (mapping or {}).get("meta")
    if isinstance(meta, dict) and meta.get("quantizer") and not manifest:
        result["quantizer"] = to_plain(meta["quantizer"])
    return result


def _size_mismatches(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files whose size is not what the manifest says; hashes are `verify`'s business."""
    out = []
    files = manifest.get("files")
    for name, record in files.items() if isinstance(files, dict) else ():
        want = record.get("size") if isinstance(record, dict) else None
        inside = all(is_plain_name(part) for part in str(name).split("/"))
        file = path / str(name)
        have = file.stat().st_size if inside and file.is_file() else None
        if have != want:
            out.append(
                f"{show(name)} has {have if have is not None else 'no'} bytes, the manifest says {show(want)}"
            )
    return out


def _json_file(path: Path) -> dict[str, Any]:
    """A small JSON object that may be absent; an unreadable one counts as absent here."""
    from quantkit.untrusted import read_json

    if not path.is_file():
        return {}
    try:
        value = read_json(path, path.parent.resolve())
    except (CheckpointError, ConfigError, json.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}
