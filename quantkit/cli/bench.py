"""`quantkit bench ...`: measurements on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.convert import Debug, Json
from quantkit.cli.guard import guarded

app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")

SHAPES = ["4096x4096", "14336x4096", "4096x14336"]  # Llama-3-8B: attention output, MLP up, MLP down
ROWS = "1,2,4,8,16,32,64,128,512,4096"


@app.command("kernels")
@guarded()
def kernels_command(
    format: Annotated[
        list[str] | None,
        typer.Option("--format", "-f", help="Weight formats; repeat. Default: affine-4g128, nf4."),
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="N x K of the weight, as 4096x14336; repeat.")
    ] = None,
    rows: Annotated[str, typer.Option(help="Numbers of rows of x (M), with commas.")] = "",
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="Of x: bfloat16, float16, float32; repeat. Default: the first two, or (CPU) the last."
        ),
    ] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Time dx = dy @ W, and measure its memory, instead.")
    ] = False,
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="Who multiplies; repeat. Default: quantkit and what is installed."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, xpu, ... Default: the accelerator, if any.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for each candidate in each cell.")] = 0.1,
    budget: Annotated[
        float, typer.Option(help="Seconds after which no further weight is begun; 0: no limit.")
    ] = 0.0,
    csv: Annotated[Path | None, typer.Option(help="Write all numbers here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="The same as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table for a documentation page.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a roofline plot (needs quantkit[report]).")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time products with quantized weights against torch and every installed peer.

    Weights are cold (copies larger than the cache take turns), GPU calls are captured into graphs, and
    errors are against float64. Ratios above 1 mean that quantkit is faster. --backward times the gradient of x:
    quantkit's route, dequantizing the whole weight, and the dense product.

    [bold]Example[/bold]

    quantkit bench kernels --format nf4 --shape 4096x4096 --rows 1,8 --plot roofline.png
    """
    import torch

    from quantkit.errors import UsageError, did_you_mean
    from quantkit.kernels import bench_backward, bench_cases, bench_report
    from quantkit.kernels.bench import bench

    cases = bench_backward if backward else bench_cases
    formats = format or ["affine-4g128", "nf4"]
    candidates = candidate or list(cases.DEFAULT_CANDIDATES)
    for given, known, what in (
        (formats, bench_cases.FORMATS, "format"),
        (candidates, tuple(cases.CANDIDATES), "candidate"),
        (dtype or [], ("bfloat16", "float16", "float32"), "dtype"),
    ):
        for name in given:
            if name not in known:
                raise UsageError(f"unknown {what} {name!r}", hint=did_you_mean(name, list(known)))
    place = torch.device(device) if device else torch.accelerator.current_accelerator() or torch.device("cpu")
    on_cpu = place.type == "cpu"
    names = dtype or (["float32"] if on_cpu else ["bfloat16", "float16"])
    report = bench(
        formats,
        [_shape(s) for s in shape or (SHAPES[:1] if on_cpu else SHAPES)],
        [_positive(part) for part in (rows or ("1,8,64" if on_cpu else ROWS)).split(",")],
        device=place,
        dtypes=[getattr(torch, name) for name in names],
        candidates=candidates,
        backward=backward,
        seconds=seconds,
        budget=budget or float("inf"),
        progress=lambda text: typer.echo(text, err=True),
    )
    if csv:
        bench_report.write_csv(report, csv)
    if json_file:
        bench_report.write_json(report, json_file)
    if markdown:
        markdown.write_text(bench_report.markdown(report), encoding="utf-8")
    if plot:
        bench_report.plot_roofline(report, plot)
    if as_json:
        import json

        typer.echo(json.dumps(bench_report.to_json(report)))
        return
    _print(report)


def _print(report: object) -> None:
    from quantkit.cli.render import console, table
    from quantkit.kernels.bench import Report
    from quantkit.kernels.bench_report import table as lines_of

    assert isinstance(report, Report)
    header, lines = lines_of(report)
    out = console()
    packages = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    out.print(
        f"{report.device}, {report.threads} threads, copy {report.copy_gigabytes_per_second:.0f} GB/s; {packages}"
    )
    made = table(*header, right=range(len(header)))
    if not out.is_terminal:
        out.width = max(out.width, 14 * len(header))
    for line in lines:
        made.add_row(*line)
    out.print(made)
    for name, package in report.absent.items():
        out.print(f"not measured: {name} ({package} is not installed)")
    for note in sorted({f"{row.candidate}: {row.note}" for row in report.rows if row.note}):
        out.print(f"[yellow]failed[/yellow] {note}", markup=True)


def _shape(text: str) -> tuple[int, int]:
    from quantkit.errors import UsageError

    n, _, k = text.lower().partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) and int(k)):
        raise UsageError(f"shape {text!r} is not N x K", hint="Give out_features x in_features: 4096x14336.")
    return int(n), int(k)


def _positive(text: str) -> int:
    from quantkit.errors import UsageError

    if not text.strip().isdigit() or int(text) < 1:
        raise UsageError(f"{text!r} is no number of rows", hint="Give numbers with commas: 1,8,64.")
    return int(text)
