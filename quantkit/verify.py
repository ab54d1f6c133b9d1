"""`quantkit.verify`: is a checkpoint what it claims to be?

1. every file has the hash that quantkit_manifest.json gives, that file included, and none is there besides;
2. headers, config.json and every quantized layer are sound, and decode to finite weights; no other tensor is
   missing, of another shape, or not finite;
3. with the source at hand: every layer's error is recomputed, and everything that is not quantized
   equals the source, one tensor at a time;
4. the library that owns the format computes the same logits as quantkit, where it is installed.

Of an export (quantkit_export.json) the first is checked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint import EXPORT_MANIFEST, MANIFEST, CheckpointReader
from quantkit.encoding import dequantize
from quantkit.errors import CheckpointError, NumericsError, UsageError
from quantkit.hub import resolve_model
from quantkit.load import QuantizedTensors, find_quantized, read_layer
from quantkit.manifest import is_sealed
from quantkit.peer_logits import check_loader, compare_logits
from quantkit.progress import NullProgress, Progress
from quantkit.report_types import LayerReport, Report
from quantkit.shards import sha256_file
from quantkit.skeleton import Site, Skeleton, Target, linear_shape
from quantkit.untrusted import existing_directory, is_plain_name, read_json, show

#: A recomputed error may differ from the recorded one by the rounding of its computation.
_SAME_ERROR = 1e-3
#: Under AWQ the channel scales are fitted, which can only lower an error, and never by much.
_SAME_FITTED_ERROR = 0.1
#: Cosine between a weight and its quantized form below which they have nothing to do with each other.
#: (The relative error would not do: ternary codes that serve the outputs may exceed 1.)
_UNRELATED = 0.2


@dataclass
class Check(Report):
    """One thing that was looked at; `ok` is None when it could not be."""

    name: str
    ok: bool | None
    detail: str


@dataclass
class VerifiedLayer(Report):
    """One quantized layer, decoded and, with a source, compared."""

    name: str
    shape: tuple[int, int]
    weight_error: float | None = None  # recomputed; None without a source
    recorded_error: float | None = None  # what the conversion reported
    problem: str = ""


@dataclass
class VerifyReport(Report):
    """What `quantkit verify` prints; `ok` is its verdict."""

    path: str
    format: str | None
    ok: bool = True
    checks: list[Check] = field(default_factory=list)
    layers: list[VerifiedLayer] = field(default_factory=list)

    def add(self, name: str, ok: bool | None, detail: str) -> None:
        """Record one check."""
        self.checks.append(Check(name, ok, detail))
        self.ok = self.ok and ok is not False


def verify(
    checkpoint: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    loader: str | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check a checkpoint, and compare it with its source and with its format's owner.

    Parameters
    ----------
    against: the model it was made from (directory or hub id).
    loader: tool whose logits are compared; None for the format's owner where it is installed,
        "none" to leave that out.

    Mismatches are reported (`ok` is False); a checkpoint that cannot be read at all raises
    CheckpointError.
    """
    progress = progress or NullProgress()
    check_loader(loader)
    path = resolve_model(checkpoint)
    if (path / EXPORT_MANIFEST).is_file() and not (path / MANIFEST).is_file():
        if against is not None:
            raise UsageError(
                f"{show(path)} is an export: only its hashes can be checked", hint="Leave out --against."
            )
        return _verify_export(existing_directory(path), VerifyReport(str(path), None), progress)
    with CheckpointReader(path) as reader:
        found = find_quantized(reader)
        report = VerifyReport(str(path), found.layout.name if found else None)
        manifest = _check_files(reader.path, MANIFEST, report, progress)
        skeleton = Skeleton(path, reader.config, trust_remote_code=trust_remote_code, weights=reader)
        source = None
        if against is not None:
            source = _Source(CheckpointReader(resolve_model(against)), trust_remote_code)
        try:
            if found:
                _check_layers(reader, skeleton, found, source, _recorded(manifest), device, report, progress)
            _check_dense(reader, skeleton, found, report, progress)
            if source is not None:
                _check_rest(reader, skeleton, found, source, report)
        finally:
            if source is not None:
                source.reader.close()
        method = found.layout.quant_method if found else None
    if loader != "none":
        progress.stage("comparing logits")
        name, ok, detail = compare_logits(path, method, loader, device, trust_remote_code)
        report.add(name, ok, detail)
    return report


# -- files ----------------------------------------------------------------------------------------


def _check_files(path: Path, name: str, report: VerifyReport, progress: Progress) -> Mapping[str, Any]:
    """Compare all hashes with the manifest `name`; returns the manifest, {} when there is none."""
    if not (path / name).is_file():
        report.add("files", None, f"no {name}: not written by quantkit")
        return {}
    manifest = read_json(path / name, path)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(r, dict) for r in files.values()):
        raise CheckpointError(f"{show(path / name)} has no list of files", hint="The file is damaged.")
    bad = []
    if not is_sealed((path / name).read_bytes()):
        bad.append(f"{name} itself has changed")
    for entry, record in files.items():
        progress.stage(f"hashing {show(entry)}")
        file = path / entry
        if not all(is_plain_name(part) for part in entry.split("/")) or not file.is_file():
            bad.append(f"{show(entry)} is missing")
        elif sha256_file(file) != record.get("sha256"):
            bad.append(f"{show(entry)} has changed")
    present = {str(p.relative_to(path)) for p in path.rglob("*") if not p.is_dir()}
    hidden = {entry for entry in present if any(part.startswith(".") for part in entry.split("/"))}
    strays = sorted(present - hidden - files.keys() - {name})
    bad += [f"{show(entry)} is not in the manifest" for entry in strays]
    more = f" (and {len(bad) - 5} more)" if len(bad) > 5 else ""
    detail = "; ".join(bad[:5]) + more if bad else f"{len(files)} files have the hashes of {name}"
    report.add("files", not bad, detail)
    return manifest


def _verify_export(path: Path, report: VerifyReport, progress: Progress) -> VerifyReport:
    """An export was compared with its checkpoint when it was made; what can change since are its files."""
    _check_files(path, EXPORT_MANIFEST, report, progress)
    return report


def _recorded(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Layer name -> the error that the conversion reported."""
    provenance = manifest.get("provenance")
    layers = provenance.get("layers") if isinstance(provenance, dict) else None
    out = {}
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, dict) and layer.get("action") == "quantized":
            error = layer.get("weight_error")
            if isinstance(layer.get("name"), str) and isinstance(error, int | float):
                out[layer["name"]] = float(error)
    return out


# -- layers ---------------------------------------------------------------------------------------


class _Source:
    """The unquantized model: which of its tensors fills which parameter."""

    def __init__(self, reader: CheckpointReader, trust_remote_code: bool) -> None:
        self.reader = reader
        if find_quantized(reader) is not None:
            raise CheckpointError(
                f"{reader.path} is itself quantized", hint="Compare with the model that was converted."
            )
        self.skeleton = Skeleton(
            reader.path, reader.config, trust_remote_code=trust_remote_code, weights=reader
        )
        shapes = {info.name: info.shape for info in reader.infos()}
        self.sites: dict[str, Site] = {site.module: site for site in self.skeleton.sites(shapes)}
        self.params: dict[str, tuple[str, Target]] = {}
        self.other: list[str] = []  # tensors that no parameter wants
        for name, shape in shapes.items():
            targets = self.skeleton.targets(name, shape)
            for target in targets:
                self.params[target.param] = (name, target)
            if not targets:
                self.other.append(name)

    def read(self, param: str) -> Tensor:
        """The source's value of a parameter."""
        name, target = self.params[param]
        return _read_target(self.reader, name, target)


def _read_target(reader: CheckpointReader, name: str, target: Target) -> Tensor:
    value = reader.read(name) if target.index is None else reader.read_index(name, target.index)
    return value if target.rows is None else value[target.rows[0] : target.rows[1]]


def _check_layers(
    reader: CheckpointReader,
    skeleton: Skeleton,
    found: QuantizedTensors,
    source: _Source | None,
    recorded: Mapping[str, float],
    device: str | torch.device,
    report: VerifyReport,
    progress: Progress,
) -> None:
    fitted = found.layout.name == "awq"
    progress.start(len(found.layers), "verifying")
    for name in found.layers:
        module = skeleton.module_for(name)
        if module is None or module not in skeleton.modules:
            report.layers.append(VerifiedLayer(name, (0, 0), problem="the model has no such layer"))
            continue
        shape = linear_shape(skeleton.modules[module])
        layer = VerifiedLayer(name, shape, recorded_error=recorded.get(name))
        try:
            dense = dequantize(read_layer(reader, found, name, shape).to(device), torch.float32)
        except (CheckpointError, NumericsError) as error:
            layer.problem = error.what
        else:
            if not bool(torch.isfinite(dense).all()):
                layer.problem = "decodes to NaN or infinite weights"
            elif source is not None:
                _compare_layer(layer, dense, source, module, fitted)
        report.layers.append(layer)
        progress.layer(
            LayerReport(
                name, shape, "quantized", weight_error=layer.weight_error or 0.0, notes=[layer.problem]
            )
            if layer.problem
            else LayerReport(name, shape, "quantized", weight_error=layer.weight_error or 0.0)
        )
    progress.finish()
    bad = [layer for layer in report.layers if layer.problem]
    detail = "; ".join(f"{layer.name}: {layer.problem}" for layer in bad[:5])
    if not bad:
        detail = f"{len(report.layers)} quantized layers decode"
        if source is not None:
            worst = max(report.layers, key=lambda layer: layer.weight_error or 0.0)
            upto = ", up to AWQ's channel scales" if fitted else ""
            detail += f" and match the source{upto}; largest error {worst.weight_error:.4f} ({worst.name})"
        if recorded:
            detail += "; errors as recorded" if source is not None else ""
    report.add("layers", not bad, detail)
    missing = recorded.keys() - found.layers.keys()
    if missing:
        report.add(
            "layers recorded", False, f"{sorted(missing)[0]} was quantized but is not in the checkpoint"
        )


def _compare_layer(layer: VerifiedLayer, dense: Tensor, source: _Source, module: str, fitted: bool) -> None:
    param = module + ".weight"
    if param not in source.params:
        layer.problem = "the source has no such layer"
        return
    weight = source.read(param).to(dense.device, torch.float32)
    if type(source.skeleton.modules[module]).__name__ == "Conv1D":
        weight = weight.t()
    if weight.shape != dense.shape:
        layer.problem = f"the source's weight has shape {list(weight.shape)}"
        return
    if fitted:
        weight = fit_channels(weight, dense)
    layer.weight_error = relative_error(weight, dense)
    if float(weight.norm()) > 0 and cosine(weight, dense) < _UNRELATED:
        layer.problem = f"error {layer.weight_error:.3f}: this is not that layer of the source"
    elif layer.recorded_error is not None:
        difference = abs(layer.weight_error - layer.recorded_error)
        allowed = _SAME_FITTED_ERROR if fitted else _SAME_ERROR
        if difference > allowed * max(layer.recorded_error, 0.01):
            layer.problem = (
                f"error {layer.weight_error:.5f}, but the conversion recorded {layer.recorded_error:.5f}"
            )


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """norm(W - W_hat) / norm(W); the norm of the difference for a weight of zeros."""
    norm = float(torch.linalg.vector_norm(weight))
    return float(torch.linalg.vector_norm(weight - approximation)) / (norm if norm > 0 else 1.0)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two weights; 0 when one of them is zero."""
    norms = float(torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return float((a * b).sum()) / norms if norms > 0 else 0.0


def fit_channels(weight: Tensor, scaled: Tensor, rounds: int = 4) -> Tensor:
    """`diag(r) weight diag(c)` closest to `scaled`: AWQ moves such scales between neighbouring layers.

    Alternating least squares over rows and columns. What the scales cancel against (a norm, another
    layer's rows) is not looked at here: comparing logits does that.
    """
    fitted = weight.clone()
    for _ in range(rounds):
        for dim in (0, 1):
            power = (fitted * fitted).sum(dim, keepdim=True)
            scale = (fitted * scaled).sum(dim, keepdim=True) / power.clamp_min(torch.finfo(power.dtype).tiny)
            fitted *= torch.where((power > 0) & (scale > 0), scale, torch.ones_like(scale))
    return fitted


def _check_dense(
    reader: CheckpointReader,
    skeleton: Skeleton,
    found: QuantizedTensors | None,
    report: VerifyReport,
    progress: Progress,
) -> None:
    """What is not quantized: all there, in the shapes that config.json promises, finite."""
    names = found.dense if found else reader.names()
    covered = [f"{skeleton.module_for(name)}.weight" for name in (found.layers if found else ())]
    progress.stage("reading the other tensors")
    try:
        carried = set(skeleton.check_complete(names, covered))
        for name in names:
            if name not in carried:
                skeleton.targets(name, reader.info(name).shape)
            reader.read(name, check_finite=True)
    except CheckpointError as error:
        report.add("tensors", False, error.what)
    else:
        report.add("tensors", True, f"{len(names)} tensors that are not quantized are whole and finite")


# -- everything else ------------------------------------------------------------------------------


def _check_rest(
    reader: CheckpointReader,
    skeleton: Skeleton,
    found: QuantizedTensors | None,
    source: _Source,
    report: VerifyReport,
) -> None:
    """What is not quantized must equal the source, and nothing of the source may be lost."""
    smoothed = found is not None and found.layout.name == "awq"
    filled = {f"{skeleton.module_for(name)}.weight" for name in (found.layers if found else ())}
    lost, changed = [], []
    for name in found.dense if found else reader.names():
        targets = skeleton.targets(name, reader.info(name).shape)
        for target in targets:
            filled.add(target.param)
            if target.param in source.params:
                same = _same(source.read(target.param), _read_target(reader, name, target))
                changed += [] if same else [name]
        if not targets:
            known = name in source.other
            changed += [] if known and _same(source.reader.read(name), reader.read(name)) else [name]
    tied = [group for group in skeleton.tied if group & filled]
    lost += [p for p in source.params if p not in filled and not any(p in group for group in tied)]
    lost += [name for name in source.other if name not in reader]
    detail = (
        f"{len(lost)} tensors of the source are missing: {lost[0]}"
        if lost
        else "no tensor of the source is lost"
    )
    report.add("completeness", not lost, detail)
    if not changed:
        report.add("unquantized tensors", True, "equal to the source's")
    elif smoothed:
        report.add("unquantized tensors", None, f"{len(changed)} hold AWQ's scales (norms, biases)")
    else:
        report.add("unquantized tensors", False, f"{len(changed)} differ from the source, e.g. {changed[0]}")


def _same(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    if ours.dtype != theirs.dtype:
        ours = ours.to(theirs.dtype)
    return bool(torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)))
