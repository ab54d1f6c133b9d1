"""An evaluation as a table, for a terminal or as plain text."""

from __future__ import annotations

import io
import math
import os
from typing import TYPE_CHECKING

from rich.markup import escape

from quantkit.progress import size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from quantkit.eval.results import EvalResult, EvalRow

_WIDTH = 140  # of the plain text: names are not cut


def print_table(result: EvalResult, console: Console | None = None) -> None:
    """Print the table, the protocol and the warnings to `console` (default: stdout)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    out = console if console is not None else Console(highlight=False)
    compared = any(row.divergence is not None for row in result.rows)
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("checkpoint", overflow="fold")
    table.add_column("format")
    headings = ["bits/weight", "size MB", "perplexity"]
    headings += ["KL mean", "KL 99 %", "same top-1 %", "ppl ratio"] if compared else []
    for heading in [*headings, "tokens/s"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in zip(names_of(result), result.rows, strict=True):
        table.add_row(escape(name), row.format or "-", *_cells(row, compared))
    out.print(table)
    out.print(
        escape(f"text: {result.data}, {result.tokens} tokens; protocol: {result.protocol}; ± standard error")
    )
    if compared:
        out.print("KL in nats, from the reference's predictions to the checkpoint's.")
    for part in (_lm_eval, _checks, _tasks, _speed, _layers):
        made = part(result)
        if made is not None:
            out.print(made)
    if compared:
        from quantkit.eval.report.verdict import judge

        out.print(judge(result).headline, markup=False, style="bold", soft_wrap=True)
    for line in _advice(result):
        out.print(line, markup=False, soft_wrap=True)
    for warning in result.warnings:
        out.print(f"[yellow]warning:[/yellow] {escape(warning)}")


def to_text(result: EvalResult) -> str:
    """The same without colours."""
    from rich.console import Console

    buffer = io.StringIO()
    print_table(result, Console(file=buffer, width=_WIDTH, highlight=False, color_system=None))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).strip("\n")


def _cells(row: EvalRow, compared: bool) -> list[str]:
    ppl = row.perplexity
    cells = [f"{row.bits_per_weight:.2f}", f"{row.size / 1e6:.1f}", with_error(ppl.ppl, ppl.stderr)]
    if compared:
        kl = row.divergence
        if kl is None:
            cells += ["-", "-", "-", "-"]
        else:
            cells += [with_error(kl.kl_mean, kl.kl_stderr), f"{kl.kl_p99:.3g}", f"{100 * kl.top1:.2f}"]
            cells.append(with_error(kl.ppl_ratio, kl.ppl_ratio_stderr))
    return [*cells, f"{ppl.tokens_per_second:.0f}"]


def _table(*columns: str, left: int = 1) -> Table:
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE, pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < left else "right", overflow="fold", no_wrap=i >= left)
    return made


def _lm_eval(result: EvalResult) -> Table | None:
    if not any(row.perplexity.word_ppl is not None for row in result.rows):
        return None
    made = _table("lm-eval's figures", "word perplexity", "byte perplexity", "bits per byte")
    for name, row in zip(names_of(result), result.rows, strict=True):
        ppl = row.perplexity
        if ppl.word_ppl is not None:
            made.add_row(
                escape(name), f"{ppl.word_ppl:.6g}", f"{ppl.byte_ppl:.6g}", f"{ppl.bits_per_byte:.6g}"
            )
    return made


def _checks(result: EvalResult) -> Table | None:
    kinds = list(dict.fromkeys(check.name for row in result.rows for check in row.checks))
    if not kinds:
        return None
    made = _table("checks: accuracy %, gain in nats", *kinds)
    for name, row in zip(names_of(result), result.rows, strict=True):
        found = {check.name: check for check in row.checks}
        cells = [f"{100 * found[k].accuracy:.0f}, {found[k].gain:+.2f}" if k in found else "-" for k in kinds]
        made.add_row(escape(name), *cells)
    return made


def _tasks(result: EvalResult) -> Table | None:
    kinds = list(dict.fromkeys((t.task, t.metric) for row in result.rows for t in row.tasks))
    if not kinds:
        return None
    made = _table("tasks (lm-eval)", *(escape(f"{task} {metric}") for task, metric in kinds))
    for name, row in zip(names_of(result), result.rows, strict=True):
        found = {(t.task, t.metric): t for t in row.tasks}
        cells = [with_error(found[k].value, found[k].stderr or 0.0) if k in found else "-" for k in kinds]
        made.add_row(escape(name), *cells)
    return made


def _speed(result: EvalResult) -> Table | None:
    measured = [row for row in result.rows if row.speed is not None]
    if not measured:
        return None
    made = _table(
        "speed", "batch", "context", "prefill tok/s", "decode tok/s", "bandwidth", "first token", "peak"
    )
    for name, row in zip(names_of(result), result.rows, strict=True):
        speed = row.speed
        if speed is None:
            continue
        for point in (p for p in speed.points if p.phase == "decode"):
            fill = speed.find("prefill", point.batch, point.context)
            share = "-" if point.bandwidth_share is None else f"{100 * point.bandwidth_share:.1f} %"
            first = speed.time_to_first_token
            made.add_row(
                escape(name),
                str(point.batch),
                str(point.context),
                "-" if fill is None else number(fill.tokens_per_second),
                number(point.tokens_per_second),
                share,
                "-" if first is None else f"{1000 * first:.1f} ms",
                size(speed.peak_memory),
            )
    return made


def _layers(result: EvalResult, count: int = 3) -> Table | None:
    if not any(row.layers for row in result.rows):
        return None
    made = _table("worst layers", "layer", "output error", "cosine", left=2)
    for name, row in zip(names_of(result), result.rows, strict=True):
        for i, layer in enumerate(row.worst_layers(count)):
            made.add_row(
                escape(name) if i == 0 else "",
                escape(layer.name),
                f"{layer.relative:.4f}",
                f"{layer.cosine:.5f}",
            )
    return made


def _advice(result: EvalResult) -> list[str]:
    """What would help each checkpoint's worst layer, on lines that can be copied."""
    lines = []
    for name, row in zip(names_of(result), result.rows, strict=True):
        for layer in row.worst_layers(1):
            if layer.advice:
                lines.append(f"to improve {name}: {'   or   '.join(layer.advice)}")
    return lines


def number(value: float) -> str:
    """A rate with three digits or more, never in powers of ten: 47.5, 308, 10,490."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_error(value: float, error: float) -> str:
    """`value ± error`, both to the error's second digit."""
    if not math.isfinite(value) or not error > 0:
        return f"{value:.4g}"
    digits = min(max(1 - math.floor(math.log10(error)), 0), 8)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def names_of(result: EvalResult) -> list[str]:
    """Last components of the paths where these differ, else the whole paths; the reference is marked."""
    short = [os.path.basename(os.path.normpath(row.checkpoint)) or row.checkpoint for row in result.rows]
    names = short if len(set(short)) == len(short) else [row.checkpoint for row in result.rows]
    return [name + " (reference)" * row.is_reference for name, row in zip(names, result.rows, strict=True)]
