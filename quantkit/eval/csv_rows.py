"""An evaluation as comma-separated values: a line per checkpoint, for spreadsheets and scripts."""

from __future__ import annotations

import csv
import io
from typing import Any

from quantkit.eval.results import EvalResult, EvalRow
from quantkit.untrusted import show


def to_csv(result: EvalResult) -> str:
    """One line per checkpoint under one line of headings; empty where nothing was measured. Units: bytes, seconds,
    nats, tokens per second; shares from 0 to 1."""
    rows = [{**_facts(result, row), **_measured(row)} for row in result.rows]
    headings = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_cell(heading) for heading in headings])
    writer.writerows([_cell(row.get(heading)) for heading in headings] for row in rows)
    return buffer.getvalue()


def _facts(result: EvalResult, row: EvalRow) -> dict[str, Any]:
    ppl = row.perplexity
    return {
        "checkpoint": row.checkpoint,
        "format": row.format or "",
        "is_reference": int(row.is_reference),
        "bits_per_weight": row.bits_per_weight,
        "size": row.size,
        "data": result.data,
        "protocol": result.protocol,
        "tokens": ppl.tokens,
        "ppl": ppl.ppl,
        "ppl_stderr": ppl.stderr,
        "word_ppl": ppl.word_ppl,
        "byte_ppl": ppl.byte_ppl,
    }


def _measured(row: EvalRow) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if row.divergence is not None:
        names = ("ppl_ratio", "ppl_ratio_stderr", "kl_mean", "kl_stderr", "kl_median", "kl_p99", "kl_p999")
        for name in (*names, "top1", "top1_stderr", "rms_dp", "rms_dp_stderr"):
            found[name] = getattr(row.divergence, name)
    for check in row.checks:
        found[check.name], found[f"{check.name}_gain"] = check.accuracy, check.gain
    for task in row.tasks:
        found[f"{task.task} {task.metric}"] = task.value
    if row.speed is not None:
        for point in row.speed.points:
            found[f"{point.phase} batch {point.batch} context {point.context}"] = point.tokens_per_second
        found["time_to_first_token"] = row.speed.time_to_first_token
        found["peak_memory"] = row.speed.peak_memory
    found["load_seconds"], found["sha256"] = row.load_seconds, row.sha256
    return found


def _cell(value: Any) -> Any:
    """Text on one line that no spreadsheet takes for a formula; numbers in full."""
    if not isinstance(value, str):
        return value
    return show(f"'{value}" if value[:1] in ("=", "+", "-", "@") else value, 400)
