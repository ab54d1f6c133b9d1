"""`quantkit tune`: time tiles on this accelerator and remember the faster ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.bench import SHAPES, _positive, _shape
from quantkit.cli.convert import Debug, Json
from quantkit.cli.guard import guarded


@guarded()
def tune_command(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Tune for the layers of this quantized checkpoint.")
    ] = None,
    shape: Annotated[list[str] | None, typer.Option(help="N x K of a weight, as 4096x14336; repeat.")] = None,
    format: Annotated[
        list[str] | None,
        typer.Option("--format", "-f", help="Weight formats; repeat. Default: affine-4g128."),
    ] = None,
    rows: Annotated[str, typer.Option(help="Numbers of rows of x (M), with commas.")] = "1,8,16,32,64,128",
    dtype: Annotated[str, typer.Option(help="Of x: bfloat16, float16, float32.")] = "bfloat16",
    budget: Annotated[
        float, typer.Option(help="Seconds in all; what is left then stays as shipped.")
    ] = 300.0,
    show: Annotated[bool, typer.Option("--show", help="Print what was tuned before; time nothing.")] = False,
    clear: Annotated[
        bool, typer.Option("--clear", help="Forget it: the shipped tables answer again.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time kernel tiles on this accelerator and write the faster ones to the tuning cache.

    [bold]Example[/bold]

    quantkit tune ./model-awq --rows 1,8 --budget 60
    """
    import torch

    from quantkit.errors import UsageError, did_you_mean
    from quantkit.kernels import tuned
    from quantkit.kernels.bench_cases import FORMATS

    device = torch.accelerator.current_accelerator()
    name = tuned.device_class(device) if device is not None else None
    if device is None or name is None:
        raise UsageError("there is no accelerator to tune for", hint="Run this where torch sees a GPU.")
    if clear:
        tuned.path(name).unlink(missing_ok=True)
        tuned.reload()
        typer.echo(f"the shipped tables answer on {name}")
        return
    before = tuned.read(name)
    if show:
        _print(before.entries if before else [], name, as_json)
        return
    for given, known, what in (
        (format or [], FORMATS, "format"),
        ([dtype], ("bfloat16", "float16", "float32"), "dtype"),
    ):
        for one in given:
            if one not in known:
                raise UsageError(f"unknown {what} {one!r}", hint=did_you_mean(one, list(known)))
    buckets = [_positive(part) for part in rows.split(",")]
    if min(buckets) > tuned.BUCKETS[-1]:
        raise UsageError(
            f"--rows {rows}: tiles serve up to {tuned.BUCKETS[-1]} rows", hint="Give fewer rows."
        )
    from quantkit.kernels.tune import tune

    work: list[tuple[list[str], list[tuple[int, int]]]]
    if checkpoint is not None:
        work = [([form], [size]) for form, size in _products(checkpoint)]
    else:
        work = [(format or ["affine-4g128"], [_shape(s) for s in shape or SHAPES])]
    found = []
    for formats, shapes in work:
        found += tune(
            formats, shapes, buckets, device=device, dtype=getattr(torch, dtype), seconds=budget / len(work),
            progress=lambda text: typer.echo(text, err=True),
        )  # fmt: skip
    entries = {entry.key: entry for entry in (before.entries if before else [])}
    entries |= {item.entry.key: item.entry for item in found}
    file = tuned.write(tuned.Cache(device=name, torch=torch.__version__, entries=list(entries.values())))
    _print([item.entry for item in found], name, as_json)
    if not as_json:
        typer.echo(f"written to {file}")


def _products(checkpoint: Path) -> list[tuple[str, tuple[int, int]]]:
    """(format, shape) of a checkpoint's layers, each once."""
    import quantkit
    from quantkit.encoding import Affine, Codebook, Float8
    from quantkit.errors import UsageError
    from quantkit.linear import QuantLinear

    found: dict[tuple[str, tuple[int, int]], None] = {}
    for layer in quantkit.load(checkpoint).modules():
        if not isinstance(layer, QuantLinear):
            continue
        enc = layer.encoding
        if isinstance(enc, Affine):
            form = f"affine-{enc.bits}g{min(enc.group_size, layer.shape[1])}"
        elif isinstance(enc, Codebook):
            form = "nf4"
        else:
            assert isinstance(enc, Float8)
            form = (
                "fp8-block"
                if enc.block == (128, 128)
                else "fp8-channel"
                if enc.block[0] == 1
                else "fp8-tensor"
            )
        found[form, layer.shape] = None
    if not found:
        raise UsageError(f"{checkpoint} has no quantized layers", hint="Name a quantized checkpoint.")
    return list(found)


def _print(entries: list, name: str, as_json: bool) -> None:  # type: ignore[type-arg]
    from quantkit.cli.render import console, table

    if as_json:
        typer.echo(json.dumps({"device": name, "entries": [entry.model_dump() for entry in entries]}))
        return
    view = table(
        "family", "bits", "N x K", "M", "shipped us", "tuned us", "gain", "tile",
        title=f"tiles tuned on {name}", right=[1, 2, 3, 4, 5, 6],
    )  # fmt: skip
    for e in entries:
        tile = " ".join(f"{key}={value}" for key, value in e.tile.model_dump().items())
        gain = f"{e.shipped_us / e.tuned_us - 1:.1%}"
        view.add_row(e.family, str(e.bits), f"{e.n}x{e.k}", str(e.m), f"{e.shipped_us:.1f}",
                     f"{e.tuned_us:.1f}", gain, tile)  # fmt: skip
    console().print(view)
