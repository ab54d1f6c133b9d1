"""The report's figures, as SVG by matplotlib that takes its colours from the page (light or dark).

Matplotlib draws with placeholder colours, which become CSS variables in the page and plain colours in
files. Text stays text. Figures are narrow, so that two fit side by side on a screen and one on a phone.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.eval.divergence import QUANTILES
from quantkit.eval.report.plot_labels import label_points
from quantkit.eval.report.verdict import cost, display_names, front
from quantkit.eval.results import EvalResult, EvalRow
from quantkit.eval.table import number
from quantkit.untrusted import show

#: Placeholder -> (CSS variable, colour outside of the page). Matplotlib must never draw with these itself.
COLOURS = {
    "#010101": ("--ink", "#1f2430"),
    "#020202": ("--muted", "#6b7280"),
    "#030303": ("--grid", "#dfe3ea"),
    "#040404": ("--card", "#ffffff"),
    "#0a0001": ("--c1", "#2563eb"),
    "#0a0002": ("--c2", "#c2570c"),
    "#0a0003": ("--c3", "#047857"),
    "#0a0004": ("--c4", "#be185d"),
    "#0a0005": ("--c5", "#7c3aed"),
    "#0a0006": ("--c6", "#0e7490"),
    "#0a0007": ("--c7", "#4d7c0f"),
    "#0a0008": ("--c8", "#b91c1c"),
}
_INK, _MUTED, _GRID, _CARD, *_SERIES = COLOURS
_MARKERS = "osD^vPX*"
_WIDTH, _HEIGHT = 4.7, 3.3  # inches


@dataclass(frozen=True)
class Figure:
    """One plot: `svg` has CSS variables for colours; `caption` says how to read it."""

    id: str
    title: str
    caption: str
    svg: str
    section: str  # "quality", "layers", "speed"


def draw(result: EvalResult) -> list[Figure]:
    """All figures that the result has numbers for."""
    import matplotlib

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "quantkit",
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 8.5,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _MUTED,
        "axes.titlecolor": _INK,
        "text.color": _INK,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "xtick.labelcolor": _MUTED,
        "ytick.labelcolor": _MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _GRID,
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }
    with matplotlib.rc_context(settings):
        made = [_pareto(result), _distribution(result), _throughput(result), _memory(result), _sizes(result)]
        made = [figure for figure in made if figure is not None]
        return [*made, *_heat_maps(result)]  # type: ignore[list-item]


def plain_svg(svg: str) -> str:
    """The figure as a file of its own, with plain colours."""
    for variable, colour in COLOURS.values():
        svg = svg.replace(f"var({variable})", colour)
    return svg


def _brief(name: str, limit: int) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _new(height: float = _HEIGHT, width: float = _WIDTH) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Any, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # The size comes from the page; a file keeps its own through the viewBox.
    text = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", text)
    text = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", text)
    for placeholder, (variable, _) in COLOURS.items():
        text = text.replace(placeholder, f"var({variable})")
    text = re.sub(
        r"font: ([^;\"]*?)'DejaVu Sans'(, [^;\"]*)?", r"font: \1system-ui, 'DejaVu Sans', sans-serif", text
    )
    return text.replace("<svg ", f'<svg role="img" aria-label="{_attribute(label)}" ', 1)


def _attribute(text: str) -> str:
    from markupsafe import escape

    return str(escape(text))


def _colour(index: int) -> str:
    return _SERIES[index % len(_SERIES)]


def _candidates(result: EvalResult) -> list[tuple[int, EvalRow, str]]:
    """(number among the candidates, row, name)."""
    rows = [
        (row, name)
        for row, name in zip(result.rows, display_names(result), strict=True)
        if not row.is_reference
    ]
    return [(i, row, name) for i, (row, name) in enumerate(rows)]


# -- quality --------------------------------------------------------------------------------------


def _pareto(result: EvalResult) -> Figure | None:
    rows = [
        (i, row, name) for i, row, name in _candidates(result) if math.isfinite(cost(row)) and cost(row) > 0
    ]
    if not rows:
        return None
    compared = all(row.divergence is not None for _, row, _ in rows)
    figure, axes = _new()
    best = [row for row in front(result) if math.isfinite(cost(row)) and cost(row) > 0]
    if len(best) > 1:
        axes.step(
            [r.size / 1e6 for r in best], [cost(r) for r in best], where="post", color=_MUTED, lw=1, ls=":"
        )
    for i, row, _ in rows:
        error = row.divergence.kl_stderr if row.divergence else row.perplexity.stderr
        axes.errorbar(
            row.size / 1e6,
            cost(row),
            yerr=min(error, 0.9 * cost(row)),
            color=_colour(i),
            marker=_MARKERS[i % len(_MARKERS)],
            ms=6.5,
            mec=_CARD,
            mew=0.8,
            capsize=2,
        )
    axes.set_yscale("log")
    axes.set_xlabel("size of all tensors, MB")
    axes.set_ylabel("mean KL, nats per token" if compared else "perplexity")
    axes.margins(0.16, 0.14)
    _plain_log_ticks(axes)
    steps = [(best[0].size / 1e6, cost(best[0]))] if len(best) > 1 else []
    for row in best[1:]:
        steps += [(row.size / 1e6, steps[-1][1]), (row.size / 1e6, cost(row))]
    named = [(row.size / 1e6, cost(row), _brief(name, 28), _colour(i)) for i, row, name in rows]
    label_points(figure, axes, named, steps)
    said = "KL divergence from the original's predictions" if compared else "Perplexity"
    caption = (
        f"{said} against size; down and left is better. Dotted: no checkpoint is both smaller and closer."
    )
    return Figure("pareto", "Quality against size", caption, _svg(figure, "quality against size"), "quality")


def _plain_log_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = axes.get_ylim()
    few = math.log10(high / low) < 3 if low > 0 else True
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.tick_params(which="minor", length=0)


def _distribution(result: EvalResult) -> Figure | None:
    rows = [
        (i, row, name)
        for i, row, name in _candidates(result)
        if row.divergence and row.divergence.kl_quantiles
    ]
    if not rows:
        return None
    from matplotlib.ticker import FuncFormatter

    figure, axes = _new()
    floor = 1e-7
    for i, row, name in rows:
        assert row.divergence is not None
        points = [
            (max(kl, floor), 100 * share)
            for share, kl in zip(QUANTILES, row.divergence.kl_quantiles, strict=False)
            if math.isfinite(kl)
        ]
        axes.plot(
            [p[0] for p in points], [p[1] for p in points], color=_colour(i), lw=1.6, label=_brief(name, 24)
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(which="minor", length=0)
    shown = [
        kl
        for _, row, _ in rows
        if row.divergence
        for kl in row.divergence.kl_quantiles[2:]
        if math.isfinite(kl) and kl > floor
    ]
    if shown:
        axes.set_xlim(max(min(shown), max(shown) / 1e7) / 1.5, max(shown) * 1.5)
    axes.set_ylim(0, 101)
    axes.set_xlabel("KL of one token, nats")
    axes.set_ylabel("share of tokens below it, %")
    axes.legend(fontsize=8, loc="upper left", labelcolor=_INK, handlelength=1.2)
    caption = (
        "How the divergence is spread over tokens; further left is better. The right end is the worst token."
    )
    return Figure(
        "kl", "Where the divergence sits", caption, _svg(figure, "distribution of KL over tokens"), "quality"
    )


def _sizes(result: EvalResult) -> Figure | None:
    rows = list(zip(result.rows, display_names(result), strict=True))
    figure, axes = _new(height=max(1.3, 0.42 + 0.34 * len(rows)))
    _bars(
        axes,
        [(name, row.size / 1e6, _bar_colour(result, row), f"{row.size / 1e6:.1f} MB") for row, name in rows],
    )
    axes.set_xlabel("size of all tensors, MB")
    section = "speed" if any(row.speed for row in result.rows) else "quality"
    return Figure(
        "size", "Size", "What the tensors take on disk.", _svg(figure, "size of each checkpoint"), section
    )


def _bar_colour(result: EvalResult, row: EvalRow) -> str:
    for i, candidate, _ in _candidates(result):
        if candidate is row:
            return _colour(i)
    return _MUTED


def _bars(
    axes: Any, rows: Sequence[tuple[str, float, str, str]], spans: Sequence[tuple[float, float]] = ()
) -> None:
    """Horizontal bars, first row on top; `spans` are (low, high) whiskers."""
    places = list(range(len(rows)))[::-1]
    axes.barh(places, [row[1] for row in rows], color=[row[2] for row in rows], height=0.62)
    top = max([row[1] for row in rows] + [high for _, high in spans] + [1e-9])
    for at, (low, high) in zip(places, spans, strict=False):
        axes.plot([low, high], [at, at], color=_INK, lw=1.1)
    for place, row in zip(places, rows, strict=True):
        high = spans[len(rows) - 1 - place][1] if spans else row[1]
        axes.text(max(row[1], high) + 0.015 * top, place, row[3], va="center", fontsize=8, color=_INK)
    axes.set_yticks(places, [_brief(row[0], 24) for row in rows])
    axes.tick_params(axis="y", length=0, labelcolor=_INK)
    axes.set_xlim(0, top * 1.24)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="y", visible=False)


# -- speed ----------------------------------------------------------------------------------------


def _throughput(result: EvalResult) -> Figure | None:
    rows = [(row, name) for row, name in zip(result.rows, display_names(result), strict=True) if row.speed]
    if not rows:
        return None
    kinds = list(
        dict.fromkeys((p.phase, p.batch, p.context) for row, _ in rows if row.speed for p in row.speed.points)
    )
    kinds.sort(key=lambda kind: (kind[0] != "prefill", kind[1], kind[2]))
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(_WIDTH, (0.5 + 0.3 * len(rows)) * len(kinds) + 0.1), layout="constrained")
    for place, (phase, batch, context) in enumerate(kinds):
        axes = figure.add_subplot(len(kinds), 1, place + 1)
        bars, spans = [], []
        for row, name in rows:
            point = row.speed.find(phase, batch, context) if row.speed else None
            if point is not None:
                value = point.tokens_per_second
                bars.append((name, value, _bar_colour(result, row), number(value)))
                spans.append((point.low, point.high))
        _bars(axes, bars, spans)
        plural = "s" if batch > 1 else ""
        axes.set_title(
            f"{phase}, {batch} sequence{plural}, context {context}: tokens/s", fontsize=8.5, loc="left"
        )
    caption = "Median of the runs; the line spans the slowest and the fastest. Measured in one run, one after another."
    return Figure("speed", "Speed", caption, _svg(figure, "tokens per second"), "speed")


def _memory(result: EvalResult) -> Figure | None:
    rows = [(row, name) for row, name in zip(result.rows, display_names(result), strict=True) if row.speed]
    if not rows:
        return None
    figure, axes = _new(height=max(1.5, 0.5 + 0.36 * len(rows)))
    bars = []
    for row, name in rows:
        assert row.speed is not None
        bars.append(
            (
                name,
                row.speed.peak_memory / 1e6,
                _bar_colour(result, row),
                f"{row.speed.peak_memory / 1e6:.0f} MB",
            )
        )
    _bars(axes, bars)
    where = "on the device" if rows[0][0].speed and rows[0][0].speed.device != "cpu" else "of the process"
    axes.set_xlabel(f"peak memory {where}, MB")
    caption = "Highest memory while speed was measured" + (
        "." if "device" in where else ", Python and its libraries included."
    )
    return Figure("memory", "Memory", caption, _svg(figure, "peak memory"), "speed")


# -- layers ---------------------------------------------------------------------------------------


def _heat_maps(result: EvalResult) -> list[Figure]:
    """Per checkpoint: output error by kind of layer and depth, one colour scale for all."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    rows = [
        (i, row, name)
        for i, row, name in _candidates(result)
        if any(layer.layer is not None for layer in row.layers)
    ]
    values = [layer.relative for _, row, _ in rows for layer in row.layers if layer.relative > 0]
    if not values:
        return []
    low, high = min(values), max(values)
    norm = LogNorm(low, high if high > low else low * 1.01)
    made = []
    for i, row, name in rows:
        cells: dict[tuple[str, int], list[float]] = {}
        for layer in row.layers:
            if layer.layer is not None:
                cells.setdefault((layer.kind, layer.layer), []).append(layer.relative)
        kinds = list(dict.fromkeys(kind for kind, _ in cells))
        depth = max(number for _, number in cells) + 1
        grid = [[_mean(cells.get((kind, number))) for number in range(depth)] for kind in kinds]
        figure, axes = _new(height=0.85 + 0.27 * max(len(kinds), 2))
        mesh = axes.pcolormesh(grid, norm=norm, cmap=colormaps["viridis"], edgecolors=_CARD, linewidth=0.8)
        axes.set_yticks([k + 0.5 for k in range(len(kinds))], [show(_short(kind), 22) for kind in kinds])
        step = max(1, math.ceil(depth / 12))
        axes.set_xticks([n + 0.5 for n in range(0, depth, step)], [str(n) for n in range(0, depth, step)])
        axes.tick_params(length=0, labelsize=10)
        axes.invert_yaxis()
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel("decoder layer", fontsize=10)
        bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=14)
        bar.outline.set_visible(False)
        bar.ax.tick_params(which="both", length=0, labelsize=9.5)
        ticks = _ticks(low, high)
        bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
        bar.minorticks_off()
        made.append(Figure(f"layers-{i + 1}", name, "", _svg(figure, f"layer errors of {name}"), "layers"))
    return made


def _mean(values: list[float] | None) -> float:
    return sum(values) / len(values) if values else math.nan


def _short(kind: str) -> str:
    return kind.rpartition(".")[2] if "experts" not in kind else "experts." + kind.rpartition(".")[2]


def _ticks(low: float, high: float) -> list[float]:
    """One, two and five times powers of ten between `low` and `high`; both ends where nothing lies between."""
    found = [
        base * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for base in (1, 2, 5)
        if low <= base * 10.0**power <= high
    ]
    return found or [float(f"{low:.2g}"), float(f"{high:.2g}")]
