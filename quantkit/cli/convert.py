"""`quantkit convert`: flags in, one call of `quantkit.convert`, a table out."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.guard import guarded

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the checkpoint run its own Python code.")
]

_EXAMPLES = r"""[bold]Examples[/bold]

quantkit convert Qwen/Qwen3-0.6B --format awq -o qwen3-awq

quantkit convert ./model --format gptq --bits 3 --group-size 64 -o out --dry-run

quantkit convert ./model --format gptq -o out --override 'down_proj:bits=8' --skip 'layers.0.mlp.*'

quantkit convert ./model --format nf4 -o out --set double_quant=false

quantkit formats gptq   lists what --set and --override take for a format"""


@guarded(resumable=True)
def convert_command(
    model: Annotated[str, typer.Argument(help="Directory of a checkpoint, or a Hugging Face hub id.")],
    format: Annotated[
        str,
        typer.Option("--format", "-f", help="nf4, gptq, awq, hqq, fp8 or ternary; see `quantkit formats`."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to create (not needed with --dry-run).")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits per code, where the format has a choice.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale (block size of nf4); -1 for a whole row.")
    ] = None,
    sym: Annotated[
        bool | None, typer.Option("--sym/--asym", help="Symmetric codes, or codes with a zero point.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text file, .jsonl, dataset id, or `builtin` (offline; the default)."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration samples.")] = None,
    seqlen: Annotated[int | None, typer.Option(min=1, help="Tokens per calibration sample.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the choice of calibration samples.")] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip",
            metavar="PATTERN",
            help="Leave layers unquantized: a glob over names or their ends, or re:REGEX (repeatable).",
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            metavar="PATTERN:KEY=VALUE,...",
            help="Other options for matching layers, e.g. 'down_proj:bits=8,group_size=64' (repeatable); "
            "@FILE reads one a line.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any further option of the format (repeatable)."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1, xpu, ...")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="dtype to compute calibration in: float32, bfloat16, float16.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest weight file, e.g. 5GB.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and what it would cost; write nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted conversion.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Refuse what is warned about: odd shapes, unseen experts, large errors."
        ),
    ] = False,
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error",
            metavar="SHARE",
            help="Warn about layers whose weight error is larger; default: 2.5 times what rounding costs.",
        ),
    ] = None,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint to a quantized format, with a report of what it cost."""
    from quantkit.errors import UsageError
    from quantkit.formats import get_format
    from quantkit.options import (
        build_config,
        collect_options,
        parse_assignments,
        parse_override,
        read_overrides,
    )

    if output is None and not dry_run:
        raise UsageError("no output directory", hint="Give one with -o OUT, or use --dry-run.")
    fmt = get_format(format)
    options = collect_options(
        fmt, bits=bits, group_size=group_size, sym=sym, settings=parse_assignments(settings or [], "--set")
    )
    overrides = [parse_override(text) for text in read_overrides(override or [])]
    for pattern, changes in overrides:
        build_config(fmt, {**options, **changes}, f"--override {pattern!r}: ")
    asked: dict[str, Any] = {
        "calibration": calibration,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "revision": revision,
        "max_error": max_error,
    }
    result = _convert(
        model,
        output,
        format=fmt.name,
        options=options,
        skip=list(skip or []),
        overrides=overrides,
        dry_run=dry_run,
        resume=resume,
        overwrite=overwrite,
        strict=strict,
        trust_remote_code=trust_remote_code,
        **{key: value for key, value in asked.items() if value is not None},
    )
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2, ensure_ascii=False))
        return
    from quantkit.cli.render import print_plan, print_result

    if dry_run:
        print_plan(result)
    else:
        print_result(result)


def _convert(model: str, output: Path | None, **kwargs: Any) -> Any:
    """Call the API with progress on stderr; whatever libraries print goes there too."""
    import quantkit
    from quantkit.progress import RichProgress

    progress = RichProgress(sys.stderr)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return quantkit.convert(model, output, progress=progress, **kwargs)
    finally:
        progress.finish()


convert_command.__doc__ = f"{convert_command.__doc__}\n\n{_EXAMPLES}"
