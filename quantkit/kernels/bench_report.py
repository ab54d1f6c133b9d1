"""`quantkit bench kernels` results as CSV, JSON, Markdown and a roofline plot."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

from quantkit.errors import UsageError
from quantkit.kernels.bench import Report, Row


def write_csv(report: Report, path: Path) -> None:
    """One line per candidate and cell, derived numbers included."""
    records = report.records()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]) if records else ["format"])
        writer.writeheader()
        writer.writerows(records)


def to_json(report: Report) -> dict[str, Any]:
    """What was measured and on what; infinite times (a candidate that failed) become null."""
    rows = [
        {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        for record in report.records()
    ]
    return {
        "device": report.device,
        "versions": report.versions,
        "threads": report.threads,
        "copy_gigabytes_per_second": report.copy_gigabytes_per_second,
        "backward": report.backward,
        "absent": report.absent,
        "rows": rows,
    }


def write_json(report: Report, path: Path) -> None:
    """`to_json` as a file."""
    path.write_text(json.dumps(to_json(report), indent=1) + "\n", encoding="utf-8")


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and lines, one per cell: quantkit's time, bandwidth, TFLOP/s, error, and ratios to the others.

    A ratio is the other's time over quantkit's: above 1, quantkit is faster. Of a gradient there is also what a
    call allocates beside its result, and its share of what dequantizing the whole weight allocates.
    """
    others = list(dict.fromkeys(r.candidate for r in report.rows if r.candidate != "quantkit"))
    header = ["format", "N x K", "M", "dtype", "us", "GB/s", "of copy", "TFLOP/s", "error"]
    header += ["extra MB", "of dequantize"] if report.backward else []
    lines = []
    by_cell: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in report.rows:
        by_cell.setdefault(row.cell, {})[row.candidate] = row
    for (form, n, k, m, dtype), cell in by_cell.items():
        ours = cell.get("quantkit")
        line = [form, f"{n}x{k}", str(m), dtype]
        if ours is None or not math.isfinite(ours.microseconds):
            line += ["failed" if ours else "-"] + ["-"] * (len(header) - 5 + len(others))
            lines.append(line)
            continue
        line += [
            f"{ours.microseconds:.1f}",
            f"{ours.gigabytes_per_second:.0f}",
            f"{report.copy_share(ours):.0%}",
            f"{ours.teraflops:.1f}",
            f"{ours.error:.1e}",
        ]
        if report.backward:
            line += _memory(ours, cell.get("dequantize"))
        for name in others:
            other = cell.get(name)
            if other is None:
                line.append("-")
            elif not math.isfinite(other.microseconds):
                line.append("failed")
            else:
                line.append(f"{other.microseconds / ours.microseconds:.2f}")
        lines.append(line)
    return header + others, lines


def _memory(ours: Row, whole: Row | None) -> list[str]:
    """Megabytes beside the result, and the share of the peer's."""
    if math.isnan(ours.extra_bytes):
        return ["-", "-"]
    compared = whole is not None and whole.extra_bytes > 0
    share = f"{ours.extra_bytes / whole.extra_bytes:.0%}" if whole is not None and compared else "-"
    return [f"{ours.extra_bytes / 1e6:.1f}", share]


def markdown(report: Report) -> str:
    """The table for a page under docs/benchmarks."""
    header, lines = table(report)
    rule = ["---"] * 2 + ["---:"] * (len(header) - 2)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines]) + "\n"


def plot_roofline(report: Report, path: Path) -> None:
    """TFLOP/s over arithmetic intensity (FLOP per byte moved), one series per candidate.

    The roof is the copy bandwidth measured in the same run, and the best dense product's rate.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as missing:
        raise UsageError(
            "the roofline plot needs matplotlib", hint="Install quantkit[report], or leave out --plot."
        ) from missing
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report.rows if math.isfinite(row.microseconds)]
    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    for name in dict.fromkeys(row.candidate for row in rows):
        mine = [row for row in rows if row.candidate == name]
        intensity = [2.0 * r.m * r.n * r.k / r.bytes for r in mine]
        axes.scatter(intensity, [r.teraflops for r in mine], s=14, label=name, alpha=0.7)
    if rows:
        reach = [2.0 * r.m * r.n * r.k / r.bytes for r in rows]
        low, high = min(reach) / 2, max(reach) * 2
        peak = max(r.teraflops for r in rows)
        slope = report.copy_gigabytes_per_second / 1e3
        knee = peak / slope
        axes.plot([low, knee, max(high, knee)], [low * slope, peak, peak], color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s", title=report.device)
    axes.legend(fontsize=8)
    axes.grid(True, which="both", alpha=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
