"""The report's tables as headings and cells of text, for HTML and Markdown alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.eval.report.verdict import display_names
from quantkit.eval.results import EvalResult, EvalRow, SpeedPoint
from quantkit.eval.table import number, with_error
from quantkit.progress import size
from quantkit.untrusted import show

_NARROW = "\N{NARROW NO-BREAK SPACE}"


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first column is a name, the others are numbers unless `text` says so. A second line of a
    cell is small print."""

    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    text: tuple[int, ...] = (0,)  # columns that are not numbers
    code: tuple[int, ...] = ()  # columns of flags or hashes


def summary(result: EvalResult) -> Table:
    """Everything that fits one row per checkpoint."""
    compared = any(row.divergence is not None for row in result.rows)
    headings = ["checkpoint", "format", "bits per weight", "size", "perplexity"]
    if compared:
        headings += [
            "ppl ratio",
            "KL mean",
            "KL median",
            f"KL 99{_NARROW}%",
            f"KL 99.9{_NARROW}%",
            "same top-1",
            f"RMS{_NARROW}Δp",
        ]
    rows: list[tuple[str, ...]] = []
    for name, row in zip(display_names(result), result.rows, strict=True):
        cells = [
            name + (" (reference)" if row.is_reference else ""),
            row.format or "–",
            f"{row.bits_per_weight:.2f}",
            size(row.size),
            _small(with_error(row.perplexity.ppl, row.perplexity.stderr)),
        ]
        if compared:
            cells += _divergence(row)
        rows.append(tuple(cells))
    return Table(tuple(headings), rows, (0, 1))


def _small(text: str) -> str:
    """`text` with its error as small print."""
    return text.replace(" ± ", "\n± ")


def _divergence(row: EvalRow) -> list[str]:
    found = row.divergence
    if found is None:
        return ["–"] * 7
    return [
        _small(with_error(found.ppl_ratio, found.ppl_ratio_stderr)),
        _small(with_error(found.kl_mean, found.kl_stderr)),
        f"{found.kl_median:.3g}",
        f"{found.kl_p99:.3g}",
        f"{found.kl_p999:.3g}",
        _small(with_error(100 * found.top1, 100 * found.top1_stderr).replace(" ±", " % ±")),
        f"{100 * found.rms_dp:.2f} %",
    ]


def lm_eval(result: EvalResult) -> Table | None:
    """Word and byte perplexity, where lm-eval's protocol was asked for."""
    rows = [
        (name, f"{p.word_ppl:.6g}", f"{p.byte_ppl:.6g}", f"{p.bits_per_byte:.6g}")
        for name, p in zip(display_names(result), (row.perplexity for row in result.rows), strict=True)
        if p.word_ppl is not None
    ]
    return (
        Table(("checkpoint", "word perplexity", "byte perplexity", "bits per byte"), rows) if rows else None
    )


def worst_layers(result: EvalResult, count: int = 3) -> Table | None:
    """The worst layers of every checkpoint, with advice."""
    rows: list[tuple[str, ...]] = []
    for name, row in zip(display_names(result), result.rows, strict=True):
        for layer in row.worst_layers(count):
            advice = show(layer.advice[0], 300) if layer.advice else ""
            rows.append((name, show(layer.name), f"{layer.relative:.4f}", f"{layer.cosine:.5f}", advice))
    headings = ("checkpoint", "layer", "output error", "cosine", "what would help")
    return Table(headings, rows, (0, 1, 4), (4,)) if rows else None


def checks(result: EvalResult) -> Table | None:
    """Accuracy of the built-in checks, gain as small print."""
    kinds = list(dict.fromkeys(check.name for row in result.rows for check in row.checks))
    if not kinds:
        return None
    rows: list[tuple[str, ...]] = []
    for name, row in zip(display_names(result), result.rows, strict=True):
        found = {check.name: check for check in row.checks}
        cells = [name]
        for kind in kinds:
            check = found.get(kind)
            cells.append(
                f"{100 * check.accuracy:.0f} %\ngain {check.gain:+.2f}".replace("-", "−") if check else "–"
            )
        rows.append(tuple(cells))
    return Table(("checkpoint", *kinds), rows)


def check_notes(result: EvalResult) -> list[str]:
    """What each check measures."""
    found = {c.name: c for row in result.rows for c in row.checks}
    return [
        f"{c.name}: {c.description}; {c.items} items, by chance {100 * c.chance:.0f} %"
        for c in found.values()
    ]


def tasks(result: EvalResult) -> Table | None:
    """lm-eval's metrics."""
    kinds = list(dict.fromkeys((t.task, t.metric) for row in result.rows for t in row.tasks))
    if not kinds:
        return None
    rows: list[tuple[str, ...]] = []
    for name, row in zip(display_names(result), result.rows, strict=True):
        found = {(t.task, t.metric): t for t in row.tasks}
        values = [
            _small(with_error(found[k].value, found[k].stderr or 0.0)) if k in found else "–" for k in kinds
        ]
        rows.append((name, *values))
    return Table(("checkpoint", *(show(f"{task} {metric}", 60) for task, metric in kinds)), rows)


def speed(result: EvalResult) -> Table | None:
    """Throughput, latency and memory: a row per checkpoint, batch size and context."""
    reference = next((row.speed for row in result.rows if row.is_reference), None)
    rows: list[tuple[str, ...]] = []
    for name, row in zip(display_names(result), result.rows, strict=True):
        found = row.speed
        if found is None:
            continue
        first, load = found.time_to_first_token, f"{found.load_seconds:.2f} s"
        latency = "–" if first is None else f"{1000 * first:.1f} ms"
        for point in (p for p in found.points if p.phase == "decode"):
            at = (point.batch, point.context)
            base = reference.find("decode", *at) if reference and not row.is_reference else None
            rows.append(
                (
                    name,
                    *map(str, at),
                    _rate(found.find("prefill", *at)),
                    _rate(point),
                    f"{point.tokens_per_second / base.tokens_per_second:.2f}" if base else "–",
                    "–" if point.bandwidth_share is None else f"{100 * point.bandwidth_share:.1f} %",
                    latency,
                    f"{found.peak_memory / 1e6:,.0f} MB",
                    load,
                )
            )
    headings = (
        *("checkpoint", "batch", "context", "prefill, tokens/s", "decode, tokens/s", "× original"),
        *("share of bandwidth", "first token", "peak memory", "load"),
    )
    return Table(headings, rows) if rows else None


def _rate(point: SpeedPoint | None) -> str:
    if point is None:
        return "–"
    return f"{number(point.tokens_per_second)}\n{number(point.low)} to {number(point.high)}"


def hashes(result: EvalResult) -> Table | None:
    """sha256 of every checkpoint."""
    rows = [(show(row.checkpoint), row.sha256) for row in result.rows if row.sha256]
    return Table(("checkpoint", "sha256 of weights and config.json"), rows, (0, 1), (1,)) if rows else None
