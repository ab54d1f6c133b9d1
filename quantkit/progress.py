"""Progress of a long run: one line per layer, with its error and the time left.

`Progress` is what `quantkit.convert(progress=...)` calls; `NullProgress` is its default, and
`RichProgress` is what the command line passes. Everything goes to stderr, so that stdout stays
free for `--json`.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Protocol, TextIO

from quantkit.report_types import LayerReport

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar
    from rich.progress import TaskID


class Progress(Protocol):
    """Receives what a conversion is doing. Calls come in order, from one thread."""

    def start(self, total_layers: int, title: str) -> None:
        """Work begins: `total_layers` layers will be quantized."""

    def layer(self, report: LayerReport) -> None:
        """A layer is done (or kept as it is)."""

    def stage(self, text: str) -> None:
        """A step that is not a layer begins: "reading calibration text", "publishing"."""

    def finish(self) -> None:
        """Nothing more comes; called on failure too."""


class NullProgress:
    """Says nothing."""

    def start(self, total_layers: int, title: str) -> None:
        """Ignored."""

    def layer(self, report: LayerReport) -> None:
        """Ignored."""

    def stage(self, text: str) -> None:
        """Ignored."""

    def finish(self) -> None:
        """Ignored."""


class RichProgress:
    """A bar with the last layer's error on a terminal; a plain line every few seconds elsewhere."""

    def __init__(self, stream: TextIO | None = None, *, interval: float = 5.0) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._interval = interval
        self._live = self._stream.isatty()
        self._bar: RichBar | None = None
        self._task: TaskID | None = None
        self._total = 0
        self._done = 0
        self._started = 0.0
        self._printed = 0.0

    def start(self, total_layers: int, title: str) -> None:
        """Open the bar, or print the title."""
        self.finish()
        self._total, self._done = total_layers, 0
        self._started = self._printed = time.monotonic()
        if self._live:
            self._bar = _open_bar(self._stream)
            self._task = self._bar.add_task(title, total=total_layers, detail="")
        else:
            self._line(f"{title}: {total_layers} layers")

    def layer(self, report: LayerReport) -> None:
        """Advance by one layer and show its error."""
        counts = report.action == "quantized"  # kept layers are no work and not in the total
        self._done += counts
        detail = describe(report)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=int(counts), detail=detail)
            for note in report.notes if report.action == "quantized" else ():
                self._bar.console.print(f"{report.name}: {note}", style="yellow", markup=False)
            return
        if not counts:
            return
        now = time.monotonic()
        if now - self._printed >= self._interval or self._done == self._total:
            self._printed = now
            self._line(f"[{self._done}/{self._total}] {detail}, {self._left(now)}")

    def stage(self, text: str) -> None:
        """Show what is being done between layers."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, detail=text)
        else:
            self._line(text)

    def finish(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _left(self, now: float) -> str:
        left = (now - self._started) / max(self._done, 1) * max(self._total - self._done, 0)
        return (
            f"{duration(left)} left"
            if self._done < self._total
            else f"{duration(now - self._started)} in all"
        )

    def _line(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a log on a full disk is no reason to lose the work
            print(text, file=self._stream, flush=True)


def describe(report: LayerReport) -> str:
    """One line about a finished layer."""
    if report.action == "kept":
        return f"{report.name} kept" + (f" ({report.notes[0]})" if report.notes else "")
    error = f"weight error {report.weight_error:.4f}"
    if report.output_error is not None:
        error += f", output error {report.output_error:.4f}"
    return f"{report.name} {error}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 3.2 s, 4 min 10 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def size(nbytes: float) -> str:
    """Bytes as people say them, in powers of 1000 as disks and the Hub count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def _open_bar(stream: TextIO) -> RichBar:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichBar

    bar = RichBar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=Console(file=stream),
    )
    bar.start()
    return bar
