"""Names beside the points of a plot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any


def label_points(
    figure: Any,
    axes: Any,
    points: Sequence[tuple[float, float, str, str]],
    steps: Sequence[tuple[float, float]],
) -> None:
    """Names beside their points, each where it covers least of what is there already (`steps`: corners of a line)."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else None
    if renderer is None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        renderer = FigureCanvasAgg(figure).get_renderer()
    taken = [axes.transData.transform((x, y)) for x, y, _, _ in points]
    line = _along([axes.transData.transform(corner) for corner in steps])
    boxes: list[Any] = []
    frame = axes.get_window_extent(renderer)
    places = ((7, 5), (7, -9), (-7, 5), (-7, -9), (0, 9), (0, -14), (7, 16), (-7, 16), (7, -20), (-7, -20))
    for x, y, name, colour in points:
        best: tuple[float, Any] | None = None
        for dx, dy in places:
            side = "left" if dx > 0 else "right" if dx < 0 else "center"
            text = axes.annotate(
                name,
                (x, y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=side,
                color=colour,
                fontsize=8.5,
                fontweight="bold",
            )
            box = text.get_window_extent(renderer)
            overlap = sum(_overlap(box, other) for other in boxes)
            overlap += 60 * sum(
                box.x0 - 5 < px < box.x1 + 5 and box.y0 - 4 < py < box.y1 + 4 for px, py in taken
            )
            overlap += 8 * sum(box.x0 < px < box.x1 and box.y0 < py < box.y1 for px, py in line)
            outside = max(0, frame.x0 - box.x0) + max(0, box.x1 - frame.x1) + max(0, frame.y0 - box.y0)
            score = overlap + 20 * outside + 0.1 * (abs(dx) + abs(dy))
            if best is None or score < best[0]:
                if best is not None:
                    best[1].remove()
                best = (score, text)
            else:
                text.remove()
        assert best is not None
        boxes.append(best[1].get_window_extent(renderer))


def _along(corners: Sequence[Any], step: float = 4.0) -> list[tuple[float, float]]:
    """Points every `step` pixels on a line through `corners`."""
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        count = max(1, int(math.hypot(x1 - x0, y1 - y0) / step))
        found += [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count)]
    return found


def _overlap(a: Any, b: Any) -> float:
    return max(0.0, min(a.x1, b.x1) - max(a.x0, b.x0)) * max(0.0, min(a.y1, b.y1) - max(a.y0, b.y0))
