"""`quantkit.export`: a checkpoint in, an artifact that other runtimes execute out, with a proof."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.errors import QuantkitError, UsageError, did_you_mean
from quantkit.export import decoder as decoders
from quantkit.export.proof import Proof
from quantkit.export.reference import Reference, run_reference
from quantkit.export.result import ExportResult
from quantkit.export.stage import MANIFEST, staged
from quantkit.hub import resolve_model
from quantkit.linear import QuantLinear
from quantkit.load import find_quantized, load, read_layer
from quantkit.meta_model import build_meta_model
from quantkit.progress import NullProgress, Progress

TARGETS = ("onnx", "torch", "aoti", "kernels")
#: accuracy_level of MatMulNBits: 1 is float32 arithmetic, 4 rounds activations to int8.
LEVELS = {0: 1, 1: 1, 4: 4}


def export(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: str = "onnx",
    opset: int = 23,
    atol: float | None = None,
    kv_cache: bool = True,
    accuracy_level: int = 1,
    standard: bool = False,
    keep_ops: bool = False,
    device: str = "cpu",
    targets: Sequence[str] = (),
    dtype: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Export `checkpoint` (directory or hub id) into the directory `output` and prove the result.

    Parameters
    ----------
    to: "onnx" (onnxruntime, onnxruntime-genai), "torch" (a torch.export `.pt2`), "aoti" (compiled package) or
        "kernels" (GPU binaries with manifest, C header and packed weights).
    opset, standard, accuracy_level: ONNX only. `standard` uses no operators beyond the ONNX standard;
        `accuracy_level` 4 rounds activations to int8 per block, 1 computes in float32.
    atol: largest difference of a logit from the quantkit model; None is 1e-4 of the largest logit. Where
        activations are rounded, 1e-4 is for the artifact with the rounding taken out, and the artifact as it
        is may differ by 2e-2 or twice what rounding changes, whichever is more.
    kv_cache: False exports a graph without cache inputs and outputs (ONNX only).
    keep_ops: "torch" only: keep quantkit's custom operators instead of decomposing them to aten.
    device: "aoti" only: "cpu" or "cuda", what the package is compiled for.
    targets, dtype: "kernels" only: chips ("sm_90", "gfx942", ...), and the dtype of x (the checkpoint's).

    Raises UsageError, CheckpointError, DestinationError or NumericsError (the proof failed), each in one
    line; `output` is then what it was.
    """
    started = time.perf_counter()
    progress = progress or NullProgress()
    _check_arguments(to, opset, accuracy_level, kv_cache, standard, keep_ops, device)
    _check_kernel_arguments(to, targets, dtype)
    if atol is not None and not atol >= 0:
        raise UsageError(f"--atol {atol} is not a tolerance", hint="Give a number from 0.")
    path = resolve_model(checkpoint)
    size = sum(f.stat().st_size for f in Path(path).iterdir() if f.name.endswith(".safetensors"))
    notices: list[str] = []
    level = LEVELS[accuracy_level]
    # A .pt2 is written twice: as torch does, then smaller.
    need = int(size * (2.2 if to == "torch" else 1.1))
    with staged(output, overwrite=overwrite, source=Path(path), need_bytes=need) as folder:
        if to != "kernels":  # what cannot be traced is named before weights are read
            with CheckpointReader(path) as reader:
                decoders.check_supported(build_meta_model(Path(path), reader.config, trust_remote_code)[1])
        progress.stage("loading the checkpoint")
        model = load(path, trust_remote_code=trust_remote_code)
        if to == "kernels":
            result = _kernels(
                model, folder, targets, dtype, atol, size, str(checkpoint), str(output), progress
            )
            _write_manifest(folder, result)
            result.seconds = time.perf_counter() - started
            return result
        if model.quantkit_layout is None:
            notices.append(f"{checkpoint} is not quantized: exported as it is")
        _attach_nested(path, model)
        progress.stage("running the reference")
        reference = run_reference(
            path,
            kv_cache=kv_cache,
            int8_activations=level == 4,
            int8_codebooks=level == 4 and not standard,
            atol=atol,
            trust_remote_code=trust_remote_code,
        )
        decoders.prepare(model)
        progress.stage(f"building the {to} artifact")
        if to == "onnx":
            nodes, proof = _onnx(model, folder, reference, opset, kv_cache, level, standard, progress)
        else:
            nodes, proof = _program(model, folder, reference, to, keep_ops, device, progress)
        progress.stage("publishing")
        _copy_files(path, folder)
        settings = {"target": to, "device": device, "format": model.quantkit_layout, "keep_ops": keep_ops}
        if to == "onnx":
            settings |= {"opset": opset, "accuracy_level": level, "standard": standard, "kv_cache": kv_cache}
        result = ExportResult(
            str(checkpoint),
            str(output),
            to,
            model.quantkit_layout,
            size,
            sum(f.stat().st_size for f in folder.iterdir() if f.name.startswith("model.")),
            dict(sorted(nodes.items())),
            proof,
            0.0,
            settings,
            notices,
        )
        _write_manifest(folder, result)
    result.seconds = time.perf_counter() - started
    return result


def _check_arguments(
    to: str, opset: int, level: int, kv_cache: bool, standard: bool, keep_ops: bool, device: str
) -> None:
    if to not in TARGETS:
        raise UsageError(f"unknown target {to!r}", hint=did_you_mean(to, TARGETS))
    if level not in LEVELS:
        raise UsageError(f"accuracy level {level} is not one of 0, 1 and 4", hint="4 is fast, 1 is exact.")
    _check_device(to, device)
    if to == "onnx":
        from importlib.util import find_spec

        from quantkit.export.onnx_graph import check_opset

        check_opset(opset)
        missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if find_spec(n) is None]
        if missing:
            raise UsageError(f"{', '.join(missing)} is not installed", hint="Install quantkit[onnx].")
    if not kv_cache and to != "onnx":
        raise UsageError(f"--no-kv-cache is for --to onnx, not {to}", hint="Leave it out.")
    if keep_ops and to != "torch":
        raise UsageError(f"--keep-ops is for --to torch, not {to}", hint="Leave it out.")
    if (standard or level == 4) and to != "onnx":
        raise UsageError("--standard and --accuracy-level are for --to onnx", hint="Leave them out.")


def _check_kernel_arguments(to: str, targets: Sequence[str], dtype: str | None) -> None:
    if to == "kernels":
        from quantkit.export.kernel_export import check_targets

        check_targets(targets, None)
    elif targets or dtype is not None:
        raise UsageError(f"--target and --dtype are for --to kernels, not {to}", hint="Leave them out.")


def _write_manifest(folder: Path, result: ExportResult) -> None:
    manifest = {"quantkit": quantkit.__version__, "torch": torch.__version__, **result.to_json()}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _kernels(
    model: Any,
    folder: Path,
    targets: Sequence[str],
    dtype: str | None,
    atol: float | None,
    size: int,
    checkpoint: str,
    output: str,
    progress: Progress,
) -> ExportResult:
    """Binaries, manifest, header and weights; run where a GPU of the targets is there."""
    from quantkit.export import kernel_export, kernel_proof

    chosen = kernel_export.choose_dtype(model, dtype)
    counts = kernel_export.write(
        model, folder, targets, chosen, lambda file: progress.stage(f"compiled {file}")
    )
    progress.stage("running the kernels, if a GPU of the targets is here")
    proof, notice = kernel_proof.prove(model, folder, chosen, atol)
    written = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    settings = {
        "target": "kernels",
        "targets": list(targets),
        "dtype": str(chosen),
        "format": model.quantkit_layout,
    }
    notices = [notice] if notice else []
    layout = model.quantkit_layout
    return ExportResult(
        checkpoint, output, "kernels", layout, size, written, counts, proof, 0.0, settings, notices
    )


def _check_device(to: str, device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}", hint=did_you_mean(device, ("cpu", "cuda")))
    if to == "aoti":
        from quantkit.export.program import check_compiler

        check_compiler()
    elif device != "cpu":
        raise UsageError(f"--device {device} is for --to aoti, not {to}", hint="Leave it out.")
    if device == "cuda":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if found is None or found.type != "cuda":
            raise UsageError("torch sees no CUDA device here", hint="Export on a machine with the GPU.")


def _attach_nested(path: Any, model: Any) -> None:
    """Give NF4 layers the doubly quantized scales of the file, which loading decodes to float32."""
    with CheckpointReader(path) as reader:
        found = find_quantized(reader)
        if found is None or found.layout.quant_method != "bitsandbytes":
            return
        for name in found.layers:
            module = _module(model, name)
            if module is not None:
                packed = read_layer(reader, found, name, module.shape)
                module.nested_absmax = getattr(packed, "nested", None)  # type: ignore[assignment]


def _module(model: Any, name: str) -> QuantLinear | None:
    from quantkit.experts import canonical_expert_name

    path = canonical_expert_name(name + ".weight").removesuffix(".weight")
    for candidate in (name, path, path.replace(".block_sparse_moe.", ".mlp.")):
        try:
            module = model.get_submodule(candidate)
        except AttributeError:
            continue
        if isinstance(module, QuantLinear):
            return module
    return None


def _onnx(
    model: Any,
    folder: Path,
    reference: Reference,
    opset: int,
    kv_cache: bool,
    level: int,
    standard: bool,
    progress: Progress,
) -> tuple[dict[str, int], Proof]:
    import onnx

    from quantkit.export import onnx_graph, onnx_layers
    from quantkit.export.genai import genai_config
    from quantkit.export.onnx_attention import contrib_decoder
    from quantkit.export.onnx_run import OnnxRunner

    shape = onnx_graph.CacheShape.of(model)
    contrib = not standard
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            new = onnx_layers.onnx_layer(module, level=level, contrib=contrib)
            setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], new)
    if contrib and kv_cache:
        decoder: decoders.Decoder = contrib_decoder(model)
    else:
        decoder = decoders.Decoder(model, decoders.plain_attention, use_cache=kv_cache)
    try:
        nodes = onnx_graph.to_onnx(decoder, shape, opset, folder, fused=contrib)
    except (QuantkitError, OSError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(
            f"torch.onnx cannot export {type(model).__name__}: {type(error).__name__}: {str(error)[:200]}",
            hint="Report the architecture; --debug shows the traceback.",
        ) from error
    onnx.checker.check_model(str(folder / onnx_graph.MODEL))
    if kv_cache:
        config = genai_config(model, shape, contrib=contrib, positions=decoder.takes_positions)
        (folder / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    progress.stage("proving the artifact")
    what, unrounded_error = "the ONNX model", None
    if reference.unrounded is not None:
        unrounded_error = reference.prove_unrounded(
            OnnxRunner.unrounded(folder, shape, use_cache=kv_cache), what
        )
    runner = OnnxRunner(folder, shape, use_cache=kv_cache, level=level)
    speed = runner.tokens_per_second() if kv_cache else None
    return dict(nodes), reference.prove(runner, what, unrounded_error, speed)


def _program(
    model: Any,
    folder: Path,
    reference: Reference,
    to: str,
    keep_ops: bool,
    device: str,
    progress: Progress,
) -> tuple[dict[str, int], Proof]:
    from quantkit.export import program, unrounded

    def runner(run: Any) -> program.StaticRunner:
        return program.StaticRunner(run, program.cache_shape(model), device=device)

    exported = program.trace(model, keep_ops=keep_ops, device=device)
    file, what = folder / program.MODEL, f"the {to} program"
    unrounded_error = None
    nodes = program.count_nodes(exported)
    if to == "torch":
        program.save(exported, file)
        exported = program.load_program(file)
        run = exported.module()
    if reference.unrounded is not None:
        # A package cannot be changed: there it is the program that will be compiled.
        unrounded_error = reference.prove_unrounded(runner(unrounded.program(exported)), what)
    if to == "aoti":
        progress.stage(f"compiling for {device} (minutes)")
        run = program.compile_package(exported, file)
    progress.stage("proving the artifact")
    artifact = runner(run)
    return nodes, reference.prove(artifact, what, unrounded_error, artifact.tokens_per_second())


def _copy_files(path: Any, folder: Path) -> None:
    """Tokenizer, generation config and config.json go along, so that runtimes find all in one place."""
    with CheckpointReader(path) as reader:
        for file in reader.other_files():
            target = folder / Path(file).name
            if not target.exists() and Path(file).name not in ("README.md", "quantize_config.json"):
                target.write_bytes(Path(file).read_bytes())
        config = {k: v for k, v in reader.config.items() if k != "quantization_config"}
        # Without quantization_config: the packed weights are the graph's business now.
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
