"""An evaluation as a table, for a terminal or as plain text."""

from __future__ import annotations

import io
import math
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from quantkit.eval.compare import EvalResult, EvalRow

_WIDTH = 140  # of the plain text: names are not cut


def print_table(result: EvalResult, console: Console | None = None) -> None:
    """Print the table, the protocol and the warnings to `console` (default: stdout)."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    out = console if console is not None else Console(highlight=False)
    compared = any(row.divergence is not None for row in result.rows)
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("checkpoint", overflow="fold")
    table.add_column("format")
    headings = ["bits/weight", "size MB", "perplexity"]
    headings += ["KL mean", "KL 99 %", "same top-1 %"] if compared else []
    for heading in [*headings, "tokens/s"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in zip(_names(result), result.rows, strict=True):
        table.add_row(escape(name), row.format or "-", *_cells(row, compared))
    out.print(table)
    out.print(
        escape(f"text: {result.data}, {result.tokens} tokens; protocol: {result.protocol}; ± standard error")
    )
    if compared:
        out.print("KL in nats, from the reference's predictions to the checkpoint's.")
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
            cells += ["-", "-", "-"]
        else:
            cells += [with_error(kl.kl_mean, kl.kl_stderr), f"{kl.kl_p99:.3g}", f"{100 * kl.top1:.2f}"]
    return [*cells, f"{ppl.tokens_per_second:.0f}"]


def with_error(value: float, error: float) -> str:
    """`value ± error`, both to the error's second digit."""
    if not math.isfinite(value) or not error > 0:
        return f"{value:.4g}"
    digits = min(max(1 - math.floor(math.log10(error)), 0), 8)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _names(result: EvalResult) -> list[str]:
    """Last components of the paths where these differ, else the whole paths; the reference is marked."""
    short = [os.path.basename(os.path.normpath(row.checkpoint)) or row.checkpoint for row in result.rows]
    names = short if len(set(short)) == len(short) else [row.checkpoint for row in result.rows]
    return [name + " (reference)" * row.is_reference for name, row in zip(names, result.rows, strict=True)]
