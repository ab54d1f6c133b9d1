"""The typer application: every command is declared here; the work is done elsewhere."""

from __future__ import annotations

import os
from typing import Annotated

import typer

import quantkit
from quantkit.cli import bench, guard, kernels
from quantkit.cli.commands import (
    formats_command,
    generate_command,
    inspect_command,
    verify_command,
)
from quantkit.cli.convert import convert_command
from quantkit.cli.evaluate import eval_command
from quantkit.cli.export import export_command
from quantkit.cli.sweep import allocate_command, sweep_command
from quantkit.cli.tune import tune_command

app = typer.Typer(
    name="quantkit",
    help="Quantize Hugging Face checkpoints into the formats that vLLM, SGLang, transformers, "
    "bitsandbytes, GPTQModel and hqq read.",
    epilog="Start with: quantkit convert MODEL --format awq -o OUT",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"quantkit {quantkit.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Quantize Hugging Face checkpoints."""


app.command("convert")(convert_command)
app.command("inspect")(inspect_command)
app.command("verify")(verify_command)
app.command("generate")(generate_command)
app.command("eval")(eval_command)
app.command("export")(export_command)
app.command("sweep")(sweep_command)
app.command("allocate")(allocate_command)
app.command("formats")(formats_command)
app.command("tune")(tune_command)

app.add_typer(bench.app, name="bench")
app.add_typer(kernels.app, name="kernels")


def run(argv: list[str]) -> int:
    """Run one command; returns its exit code."""
    guard.COMMAND[:] = argv
    # Tokenizers fork-safety chatter and progress bars of other libraries do not belong in our output.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    guard.announced = False
    try:
        app(args=argv, prog_name="quantkit")
    except KeyboardInterrupt:  # before the command itself began, or after it ended
        return guard.interrupted(resumable=argv[:1] == ["convert"])
    except SystemExit as leaving:
        code = leaving.code
        if code == guard.EXIT_INTERRUPTED:  # typer catches what comes while it reads the arguments
            return guard.interrupted(resumable=argv[:1] == ["convert"])
        return code if isinstance(code, int) else (0 if code is None else 1)
    return 0
