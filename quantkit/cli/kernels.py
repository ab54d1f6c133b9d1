"""`quantkit kernels build` and `list`: the Triton kernels as binaries, compiled without a GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.convert import Debug, Json
from quantkit.cli.guard import guarded

if TYPE_CHECKING:
    import torch

    from quantkit.encoding import Encoding
    from quantkit.kernels.aot import Request

app = typer.Typer(no_args_is_help=True, help="The GPU kernels: compile them ahead of time, list them.")

ENCODINGS = "affine-BITSgGROUP (affine-4g128), ternary, nf4, fp8-128x128, fp8-channel, fp8-tensor"


@app.command("build")
@guarded()
def build_command(
    target: Annotated[
        list[str], typer.Option("--target", "-t", help="sm_80, sm_90, gfx942, ...; repeat for several.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for binaries and manifest.json.")],
    encoding: Annotated[
        list[str] | None,
        typer.Option("--encoding", "-e", help=f"Repeat. {ENCODINGS}. Default: the common ones."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Of x: float16, bfloat16, float32; repeat. Default: the first two."),
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="N x K of the weight, as 14336x4096: decides tiles; repeat.")
    ] = None,
    rows: Annotated[str, typer.Option(help="Numbers of rows of x (M), with commas.")] = "",
    backward: Annotated[bool, typer.Option(help="Also what training needs.")] = True,
    jobs: Annotated[int, typer.Option(help="Compile in this many processes at once.", min=1)] = 1,
    overwrite: Annotated[bool, typer.Option(help="Replace what an earlier build left there.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile the kernels into binaries with a manifest (signature, grid, shared memory), without a GPU."""
    from quantkit.cli.render import console
    from quantkit.kernels import aot

    request = _request(encoding, dtype, shape, rows, backward)
    for name in target:
        aot.parse_target(name)  # before anything is compiled
    _make_room(output, overwrite)
    out = console()

    def report(entry: dict[str, Any]) -> None:
        if not as_json:
            out.print(f"[dim]{entry['file']}[/dim]  {_shared(entry)} of {entry['shared_limit']} bytes shared")

    manifest = aot.build(request, target, output, report, jobs)
    if as_json:
        typer.echo(json.dumps(manifest, indent=1))
        return
    count = len(manifest["kernels"])
    out.print(f"{count} binaries for {', '.join(dict.fromkeys(target))} in {output}")
    for line in manifest["left_out"]:
        out.print(f"left out: {line}")


@app.command("list")
@guarded()
def list_command(
    directory: Annotated[
        Path | None, typer.Argument(help="A build; without it, what `build` would compile for --target.")
    ] = None,
    target: Annotated[str, typer.Option("--target", "-t", help="For which chip to list.")] = "sm_90",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the kernels of a build, or of the family that `build` compiles."""
    from quantkit.cli.render import console, table
    from quantkit.kernels import aot

    if directory is None:
        records = aot.collect(aot.Request(), aot.parse_target(target))
        names = sorted({r.name for r in records})
        rows = [
            (n, sum(r.name == n for r in records), next(r for r in records if r.name == n)) for n in names
        ]
        if as_json:
            listed = [{"kernel": n, "variants": count, "grid": r.grid_rule} for n, count, r in rows]
            typer.echo(json.dumps(listed, indent=1))
            return
        view = table("kernel", "variants", "grid", title=f"Triton kernels for {target}", right=[1])
        for name, count, item in rows:
            view.add_row(name, str(count), item.grid_rule)
        console().print(view)
        return
    manifest = _read_manifest(directory)
    if as_json:
        typer.echo(json.dumps(manifest, indent=1))
        return
    view = table("target", "kernel", "constants", "threads", "shared", "limit", right=[3, 4, 5])
    for entry in manifest["kernels"]:
        constants = " ".join(f"{k}={v}" for k, v in entry["constants"].items())
        numbers = (entry["threads"], _shared(entry), entry["shared_limit"])
        view.add_row(entry["target"], entry["kernel"], constants, *map(str, numbers))
    console().print(view)


def _shared(entry: dict[str, Any]) -> int:
    """Bytes of shared memory that a program takes in all. (Older manifests do not know the static ones.)"""
    return int(entry["shared"]) + int(entry.get("static_shared", 0))


def _request(
    encodings: list[str] | None, dtypes: list[str] | None, shapes: list[str] | None, rows: str, backward: bool
) -> Request:
    import torch

    from quantkit.errors import UsageError, did_you_mean
    from quantkit.kernels.aot import Request

    given: dict[str, Any] = {"backward": backward}
    known: dict[str, torch.dtype] = {
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
    }
    for name in dtypes or ():
        if name not in known:
            raise UsageError(f"unknown dtype {name!r}", hint=did_you_mean(name, list(known)))
    if dtypes:
        given["dtypes"] = tuple(known[name] for name in dtypes)
    if shapes:
        found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text) for text in shapes]
        for text, match in zip(shapes, found):
            if match is None:
                raise UsageError(f"{text!r} is not a shape", hint="Write N x K as 14336x4096.")
        given["shapes"] = tuple((int(m[1]), int(m[2])) for m in found if m)
    if rows:
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", rows):
            raise UsageError(f"--rows {rows!r} is not a list of numbers", hint="Write --rows 1,16,128.")
        given["rows"] = tuple(int(text) for text in rows.split(","))
    if encodings:
        given["encodings"] = tuple(_encoding(text) for text in encodings)
    return Request(**given)


def _encoding(text: str) -> Encoding:
    from quantkit.encoding import Affine, Codebook, Float8
    from quantkit.errors import UsageError
    from quantkit.kernels.aot import WHOLE_ROW as whole

    affine = re.fullmatch(r"affine-([12348])g([1-9]\d*)", text)
    if affine:
        return Affine(int(affine[1]), int(affine[2]))
    fixed: dict[str, Encoding] = {
        "ternary": Affine(2, whole),
        "nf4": Codebook(4, 64),
        "fp8-128x128": Float8((128, 128)),
        "fp8-channel": Float8((1, whole)),
        "fp8-tensor": Float8((whole, whole)),
    }
    if text not in fixed:
        raise UsageError(f"unknown encoding {text!r}", hint=f"Known: {ENCODINGS}.")
    return fixed[text]


def _make_room(output: Path, overwrite: bool) -> None:
    """An empty or new directory; with `overwrite`, the files that an earlier manifest names are removed."""
    from quantkit.errors import DestinationError

    if output.exists() and not output.is_dir():
        raise DestinationError(f"{output} is a file", hint="Name a directory.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite or not (output / "manifest.json").is_file():
        hint = "Pass --overwrite." if (output / "manifest.json").is_file() else "Name an empty directory."
        raise DestinationError(f"{output} is not empty", hint=hint)
    for entry in _read_manifest(output)["kernels"]:
        path = output / entry["file"]
        if path.resolve().is_relative_to(output.resolve()):  # a manifest is a file like any other
            path.unlink(missing_ok=True)


def _read_manifest(directory: Path) -> dict[str, Any]:
    from quantkit.errors import CheckpointError

    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        entries = manifest["kernels"]
        assert isinstance(entries, list) and all(isinstance(e["file"], str) for e in entries)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        hint = "Build one with `quantkit kernels build`."
        raise CheckpointError(f"{path} is no kernel manifest ({type(error).__name__})", hint=hint) from error
    return dict(manifest)
