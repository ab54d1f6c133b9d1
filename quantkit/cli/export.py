"""`quantkit export`: flags in, one call of `quantkit.export`, a summary table out."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.convert import Debug, Json, TrustRemoteCode
from quantkit.cli.guard import guarded

_EXAMPLES = r"""[bold]Examples[/bold]

quantkit export out-awq --to onnx -o out-onnx

quantkit export out-gptq --to onnx --accuracy-level 4 -o out-fast

quantkit export out-nf4 --to torch -o out-pt2

quantkit export out-gptq --to kernels -t sm_80 -t sm_90 -o out-kernels"""


@guarded()
def export_command(
    checkpoint: Annotated[str, typer.Argument(help="Directory of a quantized checkpoint, or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to create.")],
    to: Annotated[
        str, typer.Option("--to", help="onnx, torch (a .pt2), aoti (compiled) or kernels (GPU binaries).")
    ] = "onnx",
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 23,
    atol: Annotated[
        float | None, typer.Option(help="Largest difference of a logit that the proof allows.")
    ] = None,
    kv_cache: Annotated[
        bool, typer.Option("--kv-cache/--no-kv-cache", help="Cache inputs and outputs in the graph (ONNX).")
    ] = True,
    accuracy_level: Annotated[
        int, typer.Option(help="1: float32 arithmetic; 4: activations in int8, faster (ONNX).")
    ] = 1,
    standard: Annotated[
        bool, typer.Option("--standard", help="Only operators of the ONNX standard, none of onnxruntime's.")
    ] = False,
    keep_ops: Annotated[
        bool, typer.Option("--keep-ops", help="Keep quantkit's operators in the .pt2 (torch).")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda (aoti).")] = "cpu",
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="Chip: sm_80, sm_90, gfx942, ...; repeat (kernels)."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of x: float16, bfloat16, float32; default: the checkpoint's (kernels)."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUTPUT if it is an export.")
    ] = False,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Export a checkpoint to ONNX, torch.export or GPU binaries, and prove that it computes the same."""
    import quantkit
    from quantkit.progress import RichProgress

    progress = RichProgress(sys.stderr)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = quantkit.export(
                checkpoint,
                output,
                to=to,
                opset=opset,
                atol=atol,
                kv_cache=kv_cache,
                accuracy_level=accuracy_level,
                standard=standard,
                keep_ops=keep_ops,
                device=device,
                targets=target or (),
                dtype=dtype,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
    finally:
        progress.finish()
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2, ensure_ascii=False))
    else:
        _print(result)


def _print(result: Any) -> None:
    from quantkit.cli.render import _facts, _warnings, console
    from quantkit.progress import duration, size

    proof = result.proof
    kinds = sorted(result.nodes.items(), key=lambda kind: -kind[1])
    rows = [
        ("checkpoint", f"{size(result.checkpoint_bytes)} ({result.layout or 'not quantized'})"),
        (
            "artifact",
            f"{size(result.artifact_bytes)} ({result.artifact_bytes / result.checkpoint_bytes:.1%})",
        ),
        (
            "binaries" if result.target == "kernels" else "nodes",
            ", ".join(f"{count} {kind}" for kind, count in kinds[:8])
            + f"; {sum(result.nodes.values())} in all",
        ),
    ]
    if proof:
        kernels = result.target == "kernels"
        kind, over = ("outputs", "products") if kernels else ("logits", "decode steps after the prefill")
        allowed = f"allowed {proof.atol:.2g}"
        rows += [
            ("largest error", f"{proof.max_error:.2g} of {kind} up to {proof.largest_logit:.3g} ({allowed})"),
            ("relative error", f"{proof.relative_error:.2g} over {proof.steps} {over}"),
        ]
    if proof and proof.unrounded_error is not None:
        without = f"{proof.unrounded_error:.2g} with the rounding of activations taken out"
        rows.append(("", f"{without} (allowed {proof.unrounded_atol:.2g})"))
    if proof and proof.artifact_tokens_per_second and proof.source_tokens_per_second:
        speeds = (
            f"{proof.artifact_tokens_per_second:.0f} tokens/s; quantkit {proof.source_tokens_per_second:.0f}"
        )
        rows.append(("decode", speeds))
    rows.append(("time", duration(result.seconds)))
    out = console()
    out.print(_facts(rows))
    _warnings(out, result.notices)
    out.print(f"written to {result.output}", markup=False)


export_command.__doc__ = f"{export_command.__doc__}\n\n{_EXAMPLES}"
