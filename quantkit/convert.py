"""`quantkit.convert`: a Hugging Face checkpoint -> a quantized one, tensor by tensor or layer by layer.

Two flows share one writer. Formats that need no calibration stream: read a tensor, quantize it, write
it; no model is built beyond its skeleton. Calibrated formats (GPTQ, AWQ, ternary's fit) hold one decoder
layer: its inputs come from the already quantized layers before it (see `quantkit.calibration`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantkit
from quantkit.calibration_data import CalibrationData, holds_text, load_calibration
from quantkit.checkpoint import CheckpointReader
from quantkit.distributed import Workers, join_workers
from quantkit.errors import CheckpointError, NumericsError, UsageError
from quantkit.formats import get_format
from quantkit.hub import resolve_model
from quantkit.load import load_tokenizer, parse_dtype, quantization_config
from quantkit.manifest import InputHashes
from quantkit.memory import map_large_tensors, peak_device_memory, peak_rss, release_freed
from quantkit.plan import ConvertPlan, make_plan
from quantkit.progress import NullProgress, Progress
from quantkit.publish import CheckpointWriter
from quantkit.report_types import ConvertResult, LayerReport, PlanReport
from quantkit.sites import stream_unit
from quantkit.skeleton import Skeleton
from quantkit.untrusted import plain_file


def convert(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    *,
    format: str,
    options: Mapping[str, Any] | None = None,
    calibration: str | os.PathLike[str] | Tensor = "builtin",
    samples: int = 128,
    seqlen: int = 1024,
    seed: int = 0,
    skip: Sequence[str] = (),
    overrides: Sequence[tuple[str, Mapping[str, Any]]] = (),
    device: str = "auto",
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    max_error: float | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> ConvertResult | PlanReport:
    """Quantize the checkpoint `model` (directory or hub id) into the directory `output`.

    Parameters
    ----------
    format, options: one of `quantkit.formats.FORMATS` and its settings (`quantkit formats NAME`).
    calibration, samples, seqlen, seed: see `quantkit.calibration_data`; used by calibrated formats only.
        `seqlen` is cut to what the model allows.
    skip, overrides: patterns of layers to leave alone, or to give other options (globs over module
        names or their last components, or `re:...`).
    device: where quantization runs; "auto" takes the accelerator if there is one.
    dtype: of calibration's forward passes; "auto" is float32. Weights and statistics are float32 anyway.
    dry_run: only plan, from headers; returns a PlanReport.
    resume: go on where an interrupted run of the same work stopped; the result is byte-equal.
    overwrite: replace an existing checkpoint, atomically.
    max_error: relative error of a layer's weight above which it is warned about; None is 2.5 times what
        the encoding costs normally distributed weights.
    strict: refuse every deviation and every layer above `max_error`.

    Returns a ConvertResult. Raises a QuantkitError in one line for everything that a user can mend; the
    destination then is what it was.
    """
    started = time.perf_counter()
    progress = progress or NullProgress()
    fmt = get_format(format)
    path = resolve_model(model, revision)
    where = pick_device(device)
    compute = torch.float32 if dtype == "auto" else parse_dtype(dtype)
    if max_error is not None and not max_error > 0:
        raise UsageError(f"a largest error of {max_error} allows nothing", hint="Example: 0.2.")
    if output is None and not dry_run:
        raise UsageError("no output directory", hint="Give one with -o.")
    with CheckpointReader(path) as reader:
        present = quantization_config(reader)
        if present is not None:
            raise UsageError(
                f"{path} is already quantized ({present['quant_method']})",
                hint="Give the checkpoint it was made from.",
            )
        skeleton = Skeleton(path, reader.config, trust_remote_code=trust_remote_code, weights=reader)
        plan = make_plan(reader, skeleton, fmt, options or {}, skip=skip, overrides=overrides, strict=strict)
        plan.max_error = max_error
        data = (
            _calibration(plan, path, calibration, samples, seqlen, seed, trust_remote_code)
            if plan.calibrated
            else None
        )
        if dry_run:
            from quantkit.estimate import plan_report

            return plan_report(plan, str(model), output, data, where)
        assert output is not None
        print_fingerprint = _fingerprint(plan, data, compute, where)
        provenance = {
            "quantkit": quantkit.__version__,
            "source": {
                "model": str(model),
                "revision": source_revision(path, revision),
                "fingerprint": reader.fingerprint(),
            },
            "format": fmt.name,
            "options": plan.config.model_dump(mode="json"),
            "calibration": data.describe() if data else None,
            "versions": versions(),
        }
        with join_workers(where) as workers:
            result = ConvertResult(
                str(output), fmt.name, plan.config.model_dump(mode="json"), source=str(model)
            )
            result.warnings = list(plan.warnings)
            result.calibration = data.describe() if data else None
            args = {
                "max_shard_size": max_shard_size,
                "overwrite": overwrite,
                "resume": resume,
                "fingerprint": print_fingerprint,
                "need_bytes": plan.size_after(),
                "source": path,
            }
            if workers.rank == 0:
                hashes = InputHashes(reader.input_files())
                with CheckpointWriter(output, **args) as writer, hashes:  # type: ignore[arg-type]
                    _run(plan, writer, data, where, compute, workers, progress, result, strict)
                    errors = (
                        "name",
                        "action",
                        "weight_error",
                        "output_error",
                    )  # no times: resuming must not show
                    provenance["inputs"] = hashes.records()
                    provenance["layers"] = [{k: r.to_json()[k] for k in errors} for r in result.layers]
                    writer.provenance = provenance
                    _finish(plan, writer, result, started, command)
            else:
                _run(plan, None, data, where, compute, workers, NullProgress(), result, strict)
            workers.barrier()
    return result


def versions() -> dict[str, str]:
    """What of the environment decides about the numbers."""
    return {
        "quantkit": quantkit.__version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": sys.version.split()[0],
    }


def source_revision(path: Path, asked: str | None) -> str | None:
    """The commit of a model from the hub (its cache has a directory for each), else what was asked for."""
    return path.name if path.parent.name == "snapshots" else asked


def pick_device(device: str) -> torch.device:
    """ "auto" -> the accelerator if torch sees one, else the CPU; UsageError for what is not there."""
    if device == "auto":
        return (
            torch.accelerator.current_accelerator() or torch.device("cpu")
            if torch.accelerator.is_available()
            else torch.device("cpu")
        )
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"device {device!r} is not available ({str(error).splitlines()[0]})", hint="Use --device cpu."
        ) from None
    return chosen


def _calibration(
    plan: ConvertPlan, path: Path, source: Any, samples: int, seqlen: int, seed: int, trust_remote_code: bool
) -> CalibrationData:
    from quantkit.calibration import check_sequence

    ids_only = isinstance(source, Tensor) or (str(source).endswith(".jsonl") and not holds_text(Path(source)))
    tokenizer = None if ids_only else load_tokenizer(path, trust_remote_code=trust_remote_code)
    vocab = int(plan.skeleton.hf_config.get_text_config().vocab_size)
    length = check_sequence(plan.skeleton, seqlen)
    return load_calibration(source, tokenizer, samples=samples, seqlen=length, seed=seed, vocab_size=vocab)


def _fingerprint(
    plan: ConvertPlan, data: CalibrationData | None, dtype: torch.dtype, device: torch.device
) -> dict[str, str]:
    layers = [(p.site.name, p.config.model_dump(mode="json") if p.config else None) for p in plan.layers]
    return {
        "model": plan.reader.fingerprint(),
        "format": plan.format.name,
        "options": plan.config.model_dump_json(),
        "layers": hashlib.sha256(json.dumps(layers).encode()).hexdigest(),
        "calibration": data.fingerprint() if data else "none",
        "device": device.type,
        "dtype": str(dtype),
        "max_error": str(plan.max_error),
        "workers": os.environ.get("WORLD_SIZE", "1"),
        "torch": torch.__version__,
    }


def _run(
    plan: ConvertPlan,
    writer: CheckpointWriter | None,
    data: CalibrationData | None,
    device: torch.device,
    dtype: torch.dtype,
    workers: Workers,
    progress: Progress,
    result: ConvertResult,
    strict: bool,
) -> None:
    progress.start(
        sum(p.config is not None for p in plan.layers), f"{plan.format.name}: {plan.reader.path.name}"
    )
    map_large_tensors()
    completed: set[str] = set(workers.share(list(writer.completed) if writer else None))
    runner = None
    if plan.calibrated:
        from quantkit.calibrated import CalibratedLayers

        assert data is not None
        scratch = Path(workers.share(str(writer.scratch) if writer else None))
        runner = CalibratedLayers(plan, data.ids, device, dtype, scratch, workers, completed, progress)
    try:
        for unit in plan.units:
            if unit.id in completed:
                if writer:
                    reports = [LayerReport.from_json(r) for r in writer.unit_report(unit.id)["layers"]]
                    _check_strict(reports, strict)
                    result.layers.extend(reports)
                    for report in reports:
                        progress.layer(report)
                continue
            if unit.layer is not None:
                assert runner is not None
                tensors, reports = runner.convert(unit)
                for report in reports:
                    progress.layer(report)
            elif writer is None:
                continue
            else:
                tensors, reports = stream_unit(plan, unit, device, progress)
            _check_strict(reports, strict)
            if writer:
                writer.write_unit(unit.id, tensors, {"layers": [r.to_json() for r in reports]})
            result.layers.extend(reports)
            if runner is not None:
                runner.done(unit)
            del tensors
            release_freed()
    finally:
        progress.finish()


def _check_strict(reports: Sequence[LayerReport], strict: bool) -> None:
    """Under `strict` a quantized layer that something has to be said about ends the conversion."""
    for report in reports:
        if strict and report.action == "quantized" and report.notes:
            raise NumericsError(
                f"layer {report.name!r}: {report.notes[0]}", hint="Drop --strict to accept it."
            )


def _finish(
    plan: ConvertPlan,
    writer: CheckpointWriter,
    result: ConvertResult,
    started: float,
    command: str | None,
) -> None:
    """config.json, side files, model card, figures; then publish."""
    from quantkit.model_card import render_model_card

    layers = plan.quantized_layers()
    config = dict(plan.reader.config)
    config["quantization_config"] = plan.format.to_hf_config(layers)
    writer.add_json("config.json", config)
    for name, content in plan.format.extra_files(layers).items():
        writer.add_json(name, content)
    for file in plan.reader.other_files():
        writer.copy_file(file)
    quantized = [p for p in plan.layers if p.config is not None]
    weights = sum(p.site.shape[0] * p.site.shape[1] for p in quantized)
    result.size_before = plan.reader.total_bytes
    result.size_after = plan.size_after()
    result.bits_per_weight = sum(p.size_after for p in quantized) * 8 / max(1, weights)
    total = sum(math.prod(i.shape) for i in plan.reader.infos())
    result.bits_per_weight_model = result.size_after * 8 / max(1, total)
    result.peak_rss = peak_rss()
    result.peak_device_memory = peak_device_memory()
    result.seconds = time.perf_counter() - started
    source_card: Path | None = plan.reader.path / "README.md"
    try:
        plain_file(plan.reader.path / "README.md", plan.reader.path)
    except CheckpointError:  # none there, or a link to somewhere else
        source_card = None
    card = render_model_card(
        result,
        base_model=result.source,
        loaders=plan.format.readers(plan.config),
        source_card=source_card,
        command=command,
        provenance=writer.provenance,
    )
    writer.add_bytes("README.md", card.encode())
    writer.publish()
