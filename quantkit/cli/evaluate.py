"""`quantkit eval`: flags in, one call of `quantkit.evaluate`, a table, JSON or a report out."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.convert import Debug, Json, TrustRemoteCode
from quantkit.cli.guard import command_line, guarded

Device = Annotated[
    str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, xpu, ...; auto: the accelerator if any.")
]
Reference = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="The unquantized model: adds KL divergence to it.")
]
Data = Annotated[str, typer.Option(help="builtin, wikitext2, c4, a text file, or a dataset id.")]
Tokens = Annotated[int | None, typer.Option(min=1, help="At most this many tokens.")]
ProtocolName = Annotated[
    str | None,
    typer.Option(help="Perplexity as another project measures it: gptq, hqq, llama.cpp, lm-eval."),
]
Window = Annotated[int | None, typer.Option(min=2, help="Tokens per window instead of the protocol's.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Windows that run at once.")]
Dtype = Annotated[
    str | None, typer.Option(help="dtype to compute in; default: as stored. On a CPU float32 is faster.")
]
ReportDir = Annotated[
    Path | None,
    typer.Option("--report", metavar="DIR", help="Write report.html, report.md and report.json there."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a report in DIR.")]
Print = Annotated[
    str, typer.Option("--print", help="What goes to the terminal: table, markdown, csv or json (= --json).")
]
MaxPplRatio = Annotated[
    float | None, typer.Option(help="Fail (exit code 1) if perplexity / reference's is larger.")
]
MaxKl = Annotated[float | None, typer.Option(help="Fail (exit code 1) if the mean KL in nats is larger.")]


@guarded()
def eval_command(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoints to evaluate, quantized or not.")],
    reference: Reference = None,
    data: Data = "builtin",
    tokens: Tokens = None,
    protocol: ProtocolName = None,
    window: Window = None,
    batch: Batch = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Tasks of lm-eval (extra `eval`).")
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(help="A directory with further lm-eval task files.")
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many examples of a task.")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure tokens/s, latency and memory.")] = False,
    speed_batches: Annotated[str, typer.Option(metavar="N,...", help="Batch sizes for --speed.")] = "1",
    speed_contexts: Annotated[str, typer.Option(metavar="N,...", help="Contexts for --speed.")] = "512",
    report: ReportDir = None,
    overwrite: Overwrite = False,
    max_ppl_ratio: MaxPplRatio = None,
    max_kl: MaxKl = None,
    cache: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where the reference's predictions are kept; `none`: nowhere."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    printed: Print = "table",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what quantization cost: perplexity, divergence, layers, checks, tasks, speed.

    [bold]Examples[/bold]

    quantkit eval ./out-awq ./out-gptq --reference ./model

    quantkit eval ./out-awq --reference ./model --speed --report ./report

    quantkit eval ./out --reference ./model --max-ppl-ratio 1.02 --json
    """
    import quantkit
    from quantkit.eval.gates import Gates
    from quantkit.progress import RichProgress

    style = output_style(printed, as_json)
    gates = Gates(max_ppl_ratio, max_kl)
    gates.check_request(reference)
    if report is not None:
        check_report_directory(report, overwrite)
    asked: dict[str, Any] = {
        "tokens": tokens,
        "protocol": protocol,
        "dtype": dtype,
        "window": window,
        "batch": batch,
        "cache": cache,
        "task_path": task_path,
        "task_limit": task_limit,
    }
    if tasks:
        asked["tasks"] = [name.strip() for name in tasks.split(",") if name.strip()]
    if speed:
        asked["speed"] = speed_plan(speed_batches, speed_contexts)
    if report is not None:
        asked["hashes"] = True
    with contextlib.redirect_stdout(sys.stderr):
        result = quantkit.evaluate(
            checkpoints,
            reference,
            data=data,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=RichProgress(sys.stderr),
            **{key: value for key, value in asked.items() if value is not None},
        )
    result.commands = [command_line(without=("--debug", "--json"))]
    show(result, report=report, overwrite=overwrite, style=style)
    gates.enforce(result)


def output_style(printed: str, as_json: bool) -> str:
    """What --print and --json ask for; UsageError for anything else."""
    from quantkit.errors import UsageError, did_you_mean

    known = ["table", "markdown", "csv", "json"]
    if printed not in known:
        raise UsageError(f"--print {printed!r} is not known", hint=did_you_mean(printed, known))
    return "json" if as_json else printed


def show(result: Any, *, report: Path | None, overwrite: bool, style: str) -> None:
    """Write the report if one is asked for, and print the result in one of the styles of --print."""
    if report is not None:
        from quantkit.eval.report import write_report

        write_report(result, report, overwrite=overwrite)
    if style == "json":
        typer.echo(json.dumps(result.to_json(), indent=2, ensure_ascii=False))
        return
    if style == "csv":
        from quantkit.eval.csv_rows import to_csv

        typer.echo(to_csv(result), nl=False)
        return
    if style == "markdown":
        from quantkit.eval.report.markdown import to_markdown

        typer.echo(to_markdown(result, []), nl=False)
        return
    from quantkit.cli.render import console
    from quantkit.eval.table import print_table

    out = console()
    print_table(result, out)
    if report is not None:
        from rich.markup import escape

        out.print(f"[green]report:[/green] {escape(str(report / 'report.html'))}", soft_wrap=True)


def check_report_directory(report: Path, overwrite: bool) -> None:
    """Refuse a report's directory before anything is measured for it."""
    from quantkit.eval.report import check_destination

    check_destination(report, overwrite)


def speed_plan(batches: str, contexts: str) -> Any:
    """A SpeedPlan from two lists of numbers as typed."""
    from quantkit.eval.speed import SpeedPlan

    return SpeedPlan(
        batches=numbers(batches, "--speed-batches"), contexts=numbers(contexts, "--speed-contexts")
    )


def numbers(text: str, flag: str) -> tuple[int, ...]:
    """ "1,4,16" -> (1, 4, 16); UsageError naming the flag."""
    from quantkit.errors import UsageError

    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise UsageError(f"{flag} {text!r} is no list of numbers", hint=f"Example: {flag} 1,8.") from None
