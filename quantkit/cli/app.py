"""The typer application: every command is declared here; the work is done elsewhere."""

from __future__ import annotations

import os
from typing import Annotated

import typer

import quantkit
from quantkit.cli import guard
from quantkit.cli.commands import (
    eval_command,
    formats_command,
    generate_command,
    inspect_command,
    verify_command,
)
from quantkit.cli.convert import convert_command

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
app.command("formats")(formats_command)


def run(argv: list[str]) -> int:
    """Run one command; returns its exit code."""
    guard.COMMAND[:] = argv
    # Tokenizers fork-safety chatter and progress bars of other libraries do not belong in our output.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(args=argv, prog_name="quantkit")
    except SystemExit as leaving:
        code = leaving.code
        return code if isinstance(code, int) else (0 if code is None else 1)
    return 0
