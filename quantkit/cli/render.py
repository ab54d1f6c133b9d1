"""Reports as tables on a terminal (or as plain text in a pipe)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quantkit.progress import duration, size
from quantkit.report_types import ConvertResult, PlannedLayer, PlanReport, remarks

if TYPE_CHECKING:
    from quantkit.formats.base import Format
    from quantkit.inspect import InspectReport
    from quantkit.options import OptionHelp
    from quantkit.verify import VerifyReport

_PIPE_WIDTH = 140


def console() -> Console:
    """stdout; in a pipe wide enough that names are not cut."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def table(*columns: str, title: str | None = None, right: Iterable[int] = ()) -> Table:
    """An empty table; `right` are the positions of right-aligned columns."""
    made = Table(title=title, box=box.SIMPLE, title_justify="left", title_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        number = i in set(right)
        made.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return made


def _facts(rows: Iterable[tuple[str, str]]) -> Table:
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for key, value in rows:
        made.add_row(escape(key), escape(value))
    return made


def _warnings(out: Console, warnings: Sequence[str]) -> None:
    for text in warnings:
        out.print(f"[yellow]warning:[/yellow] {escape(text)}")


# -- convert --------------------------------------------------------------------------------------


def print_result(result: ConvertResult) -> None:
    """What a conversion did and what it cost."""
    out = console()
    worst = result.worst_layers(5)
    if worst:
        rows = table("worst layers", "options", "weight error", "output error", right=(2, 3))
        for layer in worst:
            output = "" if layer.output_error is None else f"{layer.output_error:.4f}"
            rows.add_row(
                escape(layer.name), escape(_short(layer.options)), f"{layer.weight_error:.4f}", output
            )
        out.print(rows)
    ratio = f" ({result.size_after / result.size_before:.1%})" if result.size_before else ""
    facts = [
        ("size before", size(result.size_before)),
        ("size after", size(result.size_after) + ratio),
        ("bits per weight", f"{result.bits_per_weight:.3f} in quantized layers"),
        ("", f"{result.bits_per_weight_model:.3f} over the whole model"),
        ("layers", f"{len(result.quantized)} quantized, {len(result.kept)} kept{_reasons(result)}"),
        ("peak memory", size(result.peak_rss)),
    ]
    if result.peak_device_memory is not None:
        facts.append(("peak device memory", size(result.peak_device_memory)))
    facts.append(("time", duration(result.seconds)))
    out.print(_facts(facts))
    _warnings(out, [*result.warnings, *_layer_notes(result)])
    if result.output:
        out.print(f"[green]written to[/green] {escape(result.output)}", soft_wrap=True)


def _reasons(result: ConvertResult) -> str:
    """Why layers were kept, unless a warning says it already."""
    said = " ".join(result.warnings)
    reasons = sorted({layer.notes[0] for layer in result.kept if layer.notes and layer.notes[0] not in said})
    return f" ({'; '.join(reasons[:3])})" if reasons else ""


def _layer_notes(result: ConvertResult, limit: int = 5) -> list[str]:
    lines = remarks(result)
    if len(lines) > limit:
        lines = [*lines[:limit], f"{len(lines) - limit} more remarks, see --json"]
    return lines


def _short(options: dict[str, Any]) -> str:
    keys = ("bits", "group_size", "block_size", "quant_type", "granularity")
    return " ".join(f"{key}={options[key]}" for key in keys if key in options)


def print_plan(plan: PlanReport) -> None:
    """What a conversion would do."""
    out = console()
    rows = table("layers", "", "shape", "", "before", "after", "options or reason", right=(1, 4, 5))
    for name, group in _alike(plan.layers):
        layer = group[0]
        quantize = layer.action == "quantized"
        why = "; ".join(part for part in (_short(layer.options), layer.reason) if part)
        rows.add_row(
            escape(name),
            f"{len(group)} x" if group[1:] else "",
            "x".join(map(str, layer.shape)),
            "quantize" if quantize else "keep",
            size(sum(one.size_before for one in group)),
            size(sum(one.size_after for one in group)),
            escape(why),
            style=None if quantize else "dim",
        )
    out.print(rows)
    ratio = f" ({plan.size_after / plan.size_before:.1%})" if plan.size_before else ""
    disk = size(plan.disk) + (f" of {size(plan.disk_free)} free" if plan.disk_free is not None else "")
    facts = [
        ("format", f"{plan.format} {_short(plan.options)}"),
        ("layers", f"{len(plan.quantized)} to quantize, {len(plan.kept)} to keep"),
        ("size before", size(plan.size_before)),
        ("size after", size(plan.size_after) + ratio),
        ("bits per weight", f"{plan.bits_per_weight:.3f} in quantized layers"),
        ("", f"{plan.bits_per_weight_model:.3f} over the whole model"),
        ("peak memory", f"about {size(plan.peak_rss)} over that of the interpreter"),
    ]
    if plan.peak_device_memory is not None:
        facts.append(("peak device memory", f"about {size(plan.peak_device_memory)}"))
    facts += [("disk", disk), ("time", f"about {duration(plan.seconds)}")]
    if plan.calibration:
        facts.append(("calibration", ", ".join(f"{k} {v}" for k, v in plan.calibration.items())))
    out.print(_facts(facts))
    _warnings(out, plan.warnings)
    out.print("dry run: nothing was written")


def _alike(layers: Sequence[PlannedLayer]) -> list[tuple[str, list[PlannedLayer]]]:
    """Layers that differ in their number only, together: ("model.layers.*.mlp.up_proj", [...])."""
    groups: dict[tuple[Any, ...], list[PlannedLayer]] = {}
    for layer in layers:
        general = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer.name)
        key = (general, layer.shape, layer.action, layer.reason, sorted(layer.options.items(), key=str))
        groups.setdefault((*key[:4], repr(key[4])), []).append(layer)
    return [(key[0] if group[1:] else group[0].name, group) for key, group in groups.items()]


# -- inspect, verify ------------------------------------------------------------------------------


def print_inspection(report: InspectReport, *, layers: bool = False) -> None:
    """What a checkpoint holds."""
    out = console()
    name = report.format or ("not quantized" if report.quant_method is None else "unknown")
    method = f" (quant_method {report.quant_method})" if report.quant_method else ""
    facts = [
        ("checkpoint", report.path),
        ("format", f"{name}{method}"),
        ("architecture", f"{report.architecture or 'unknown'} ({report.model_type or 'no model_type'})"),
        ("parameters", f"{report.parameters:,}"),
        ("size", f"{size(report.size)} in {len(report.files)} file{'s' if report.files[1:] else ''}"),
    ]
    if report.options:
        facts.append(("options", ", ".join(f"{k}={v}" for k, v in report.options.items() if v is not None)))
    for i, (kind, count) in enumerate(report.kinds()):
        facts.append(("layers" if i == 0 else "", f"{count} x {kind}"))
    if report.bits_per_weight is not None:
        facts.append(("bits per weight", f"{report.bits_per_weight:.3f} in quantized layers"))
    facts.append(("", f"{report.bits_per_weight_model:.3f} over the whole model"))
    facts.append(("tokenizer", ", ".join(report.tokenizer) or "none"))
    facts.append(("chat template", "yes" if report.chat_template else "no"))
    for key, value in report.provenance.items():
        if key == "inputs":
            value = f"{len(value)} files, their sha256 with --json" if isinstance(value, dict) else None
        if key not in ("quantkit", "format", "options") and value not in (None, {}, []):
            facts.append((key.replace("_", " "), _plain(value)))
    out.print(_facts(facts))
    rows = table("dtype", "tensors", "size", "share", right=(1, 2, 3))
    for total in report.dtypes:
        rows.add_row(
            total.dtype, str(total.tensors), size(total.size), f"{total.size / max(report.size, 1):.1%}"
        )
    out.print(rows)
    if layers and report.layers:
        rows = table("layer", "bits", "options", "weights", "size", "bits per weight", right=(1, 3, 4, 5))
        for layer in report.layers:
            rows.add_row(
                escape(layer.name),
                str(layer.bits),
                escape(_short(layer.options)),
                f"{layer.weights:,}",
                size(layer.size),
                f"{layer.bits_per_weight:.3f}",
            )
        out.print(rows)
    _warnings(out, report.warnings)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def print_verification(report: VerifyReport) -> None:
    """Every check with its verdict, and the layers that are wrong."""
    out = console()
    signs = {True: "[green]ok[/green]", False: "[red]MISMATCH[/red]", None: "[yellow]not checked[/yellow]"}
    rows = table("check", "verdict", "detail")
    for check in report.checks:
        rows.add_row(escape(check.name), signs[check.ok], escape(check.detail))
    out.print(rows)
    compared = [layer for layer in report.layers if layer.weight_error is not None]
    if compared:
        compared.sort(key=lambda layer: -(layer.weight_error or 0.0))
        rows = table("worst layers", "error now", "error recorded", right=(1, 2))
        for layer in compared[:5]:
            recorded = "" if layer.recorded_error is None else f"{layer.recorded_error:.4f}"
            rows.add_row(escape(layer.name), f"{layer.weight_error:.4f}", recorded)
        out.print(rows)
    out.print("[green]verified[/green]" if report.ok else "[red]this checkpoint does not verify[/red]")


# -- formats --------------------------------------------------------------------------------------


def print_formats(formats: Sequence[Format]) -> None:
    """One line per format."""
    out = console()
    rows = table("format", "what it is", "read by")
    for fmt in formats:
        rows.add_row(fmt.name, escape(fmt.summary), escape(", ".join(fmt.loaders)))
    out.print(rows)
    out.print("`quantkit formats NAME` lists the options of one format.")


def print_format(fmt: Format, options: Sequence[OptionHelp]) -> None:
    """A format's options, for --set and --override."""
    out = console()
    out.print(f"[bold]{fmt.name}[/bold]: {escape(fmt.summary)}")
    out.print(f"read by {escape(', '.join(fmt.loaders))}")
    rows = table("option", "values", "default", "meaning")
    for option in options:
        rows.add_row(option.name, escape(option.values), escape(option.default), escape(option.description))
    out.print(rows)
    out.print(
        f"Use as: quantkit convert MODEL --format {fmt.name} -o OUT --set OPTION=VALUE, "
        "or --override 'PATTERN:OPTION=VALUE,...' for some layers.",
        markup=False,
    )
