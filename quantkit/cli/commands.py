"""The commands besides `convert` and the evaluating ones: inspect, verify, generate, formats."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.convert import Debug, Json, TrustRemoteCode
from quantkit.cli.guard import EXIT_FAILED, guarded

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, xpu, ...")]


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


@guarded()
def inspect_command(
    checkpoint: Annotated[str, typer.Argument(help="Directory of a checkpoint, or a Hugging Face hub id.")],
    layers: Annotated[bool, typer.Option("--layers", help="List every quantized layer.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a checkpoint holds, from its headers alone: ours or not, quantized or not.

    [bold]Example[/bold]

    quantkit inspect ./out --layers
    """
    from quantkit.inspect import inspect

    report = inspect(checkpoint, revision=revision)
    if as_json:
        _print_json(report.to_json())
        return
    from quantkit.cli.render import print_inspection

    print_inspection(report, layers=layers)


@guarded()
def verify_command(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of a quantized checkpoint.")],
    against: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="The model it was made from: recompute every error.")
    ] = None,
    loader: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Compare logits with this tool's (transformers, gptqmodel, hqq, autoawq); `none` to leave out. "
            "Default: the format's owner where it is installed.",
        ),
    ] = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Re-read a checkpoint: hashes, every layer, its error against the source, the owner's logits.

    The exit code is not 0 when anything does not match.

    [bold]Examples[/bold]

    quantkit verify ./out

    quantkit verify ./out --against ./model --loader transformers
    """
    from quantkit.progress import RichProgress
    from quantkit.verify import verify

    progress = RichProgress(sys.stderr)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            report = verify(
                checkpoint,
                against=against,
                loader=loader,
                device=device,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
    finally:
        progress.finish()
    if as_json:
        _print_json(report.to_json())
    else:
        from quantkit.cli.render import print_verification

        print_verification(report)
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)


@guarded()
def generate_command(
    checkpoint: Annotated[str, typer.Argument(help="Directory of a checkpoint, or a Hugging Face hub id.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    device: Device = "cpu",
    dtype: Annotated[str | None, typer.Option(help="dtype to compute in; default: as stored.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Continue a text; tokens per second go to stderr.

    [bold]Example[/bold]

    quantkit generate ./out --prompt 'Once upon a time' --max-new-tokens 40
    """
    from quantkit.generate import generate

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    write(prompt)
    result = generate(
        checkpoint,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        on_text=write,
    )
    write("\n")
    typer.echo(
        f"{result.new_tokens} tokens in {result.seconds:.2f} s: {result.tokens_per_second:.1f} tokens/s "
        f"(loading took {result.load_seconds:.2f} s)",
        err=True,
    )


@guarded()
def formats_command(
    name: Annotated[str | None, typer.Argument(help="A format: list its options.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the formats, or the options of one format (for --set and --override).

    [bold]Example[/bold]

    quantkit formats gptq
    """
    from quantkit.cli.render import print_format, print_formats
    from quantkit.formats import FORMATS, get_format
    from quantkit.options import describe_options
    from quantkit.report_types import to_plain

    chosen = [get_format(name)] if name else [get_format(key) for key in FORMATS]
    if as_json:
        _print_json(
            {
                fmt.name: {
                    "summary": fmt.summary,
                    "loaders": list(fmt.loaders),
                    "options": to_plain(describe_options(fmt)),
                }
                for fmt in chosen
            }
        )
    elif name:
        print_format(chosen[0], describe_options(chosen[0]))
    else:
        print_formats(chosen)
