"""`quantkit sweep` and `quantkit allocate`: many settings of one model, and bits where they count."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.convert import Debug, Json, TrustRemoteCode
from quantkit.cli.evaluate import (
    Batch,
    Data,
    Dtype,
    MaxKl,
    MaxPplRatio,
    Print,
    ProtocolName,
    Tokens,
    Window,
    output_style,
    show,
    speed_plan,
)
from quantkit.cli.guard import command_line, guarded

Calibration = Annotated[
    str | None, typer.Option(help="Text file, .jsonl, dataset id, or `builtin` (offline; the default).")
]
Samples = Annotated[int | None, typer.Option(min=1, help="Calibration samples.")]
Seqlen = Annotated[int | None, typer.Option(min=1, help="Tokens per calibration sample.")]
Source = Annotated[str, typer.Argument(help="Directory of an unquantized checkpoint, or a hub id.")]
AnyDevice = Annotated[str | None, typer.Option(help="Where to compute; default: the accelerator if any.")]


@guarded()
def sweep_command(
    source: Source,
    formats: Annotated[
        str,
        typer.Option("--formats", metavar="SETTING,...", help="FORMAT[:BITS][:gN][:asym][:KEY=VALUE], ..."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for checkpoints and report.")],
    jobs: Annotated[int, typer.Option(min=1, help="Settings that are worked on at the same time.")] = 1,
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the choice of calibration samples.")] = None,
    skip: Annotated[
        list[str] | None, typer.Option("--skip", help="Layers to leave alone (repeatable).")
    ] = None,
    data: Data = "builtin",
    tokens: Tokens = None,
    protocol: ProtocolName = None,
    window: Window = None,
    batch: Batch = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure tokens/s, latency and memory.")] = False,
    speed_batches: Annotated[str, typer.Option(metavar="N,...", help="Batch sizes for --speed.")] = "1",
    speed_contexts: Annotated[str, typer.Option(metavar="N,...", help="Contexts for --speed.")] = "512",
    report: Annotated[
        Path | None, typer.Option("--report", metavar="DIR", help="Default: OUTPUT/report.")
    ] = None,
    max_ppl_ratio: MaxPplRatio = None,
    max_kl: MaxKl = None,
    device: AnyDevice = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    printed: Print = "table",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a model in many settings, evaluate all, and write one report.

    Run it again to go on after an interruption: what is done is skipped. Under torchrun the processes share
    the settings.

    [bold]Example[/bold]

    quantkit sweep ./model --formats awq:4,gptq:3,hqq:4:g64,nf4 -o ./sweep
    """
    from quantkit.eval.gates import Gates
    from quantkit.progress import RichProgress
    from quantkit.sweep import sweep

    style = output_style(printed, as_json)
    gates = Gates(max_ppl_ratio, max_kl)
    gates.check_request(source)
    converting: dict[str, Any] = {
        "calibration": calibration,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "skip": skip or None,
        "device": device,
        "trust_remote_code": trust_remote_code or None,
    }
    measuring: dict[str, Any] = {
        "data": data,
        "tokens": tokens,
        "protocol": protocol,
        "window": window,
        "batch": batch,
        "device": device,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code or None,
        "speed": speed_plan(speed_batches, speed_contexts) if speed else None,
    }
    progress = RichProgress(sys.stderr)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = sweep(
                source,
                formats,
                output,
                jobs=jobs,
                convert={key: value for key, value in converting.items() if value is not None},
                report=report,
                commands=[command_line(without=("--debug", "--json"))],
                progress=progress,
                **{key: value for key, value in measuring.items() if value is not None},
            )
    finally:
        progress.finish()
    if result is None:  # another rank of torchrun prints
        return
    show(result, report=None, overwrite=False, style=style)
    if style == "table":
        typer.echo(f"report: {(report or output / 'report') / 'report.html'}")
    gates.enforce(result)


@guarded()
def allocate_command(
    source: Source,
    target_bits: Annotated[
        float, typer.Option("--target-bits", help="Bits per weight of the quantized layers, scales included.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File for the overrides, one a line.")
    ] = Path("overrides.txt"),
    format: Annotated[
        str, typer.Option("--format", "-f", help="gptq or hqq: a format with several widths.")
    ] = "gptq",
    bits: Annotated[str, typer.Option(metavar="N,...", help="Widths to choose from.")] = "2,3,4,8",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any option of the format.")
    ] = None,
    group_sizes: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Group sizes to choose from (default 32, 128, the format's own)."),
    ] = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    data: Annotated[
        str | None,
        typer.Option(help="Text that sensitivity is measured on; default: built-in calibration text."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of it (default 8192).")] = None,
    workdir: Annotated[
        Path | None, typer.Option(help="Keep the uniform conversions and the measurements here.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")] = False,
    device: AnyDevice = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Choose bits and group size per layer for a size, from measured sensitivity, and write them as overrides.

    [bold]Example[/bold]

    quantkit allocate ./model --target-bits 4.25 -o overrides.txt

    quantkit convert ./model --format gptq --bits 4 --override @overrides.txt -o ./out
    """
    from quantkit.allocate import allocate
    from quantkit.cli.evaluate import numbers
    from quantkit.cli.render import console
    from quantkit.formats import get_format
    from quantkit.options import collect_options, parse_assignments
    from quantkit.progress import RichProgress

    options = collect_options(get_format(format), settings=parse_assignments(settings or [], "--set"))
    asked: dict[str, Any] = {
        "group_sizes": None if group_sizes is None else numbers(group_sizes, "--group-sizes"),
        "calibration": calibration,
        "samples": samples,
        "seqlen": seqlen,
        "data": data,
        "tokens": tokens,
        "workdir": workdir,
        "device": device,
    }
    progress = RichProgress(sys.stderr)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = allocate(
                source,
                target_bits,
                output,
                format=format,
                choices=numbers(bits, "--bits"),
                options=options,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                progress=progress,
                **{key: value for key, value in asked.items() if value is not None},
            )
    finally:
        progress.finish()
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
        return
    console().print(found.to_text(), markup=False, highlight=False, soft_wrap=True)
