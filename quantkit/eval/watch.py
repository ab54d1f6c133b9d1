"""How far a long measurement is, said every few seconds."""

from __future__ import annotations

import time

from quantkit.eval.perplexity import OnProgress
from quantkit.progress import Progress, duration

_INTERVAL = 5.0  # seconds


def watch(progress: Progress, what: str, *, interval: float = _INTERVAL) -> OnProgress:
    """Says `what` begins, and returns a function that tells `progress` about windows done and time left."""
    progress.stage(what)
    began = said = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= interval and done < total:
            said = now
            left = (now - began) / max(done, 1) * (total - done)
            progress.stage(f"{what}: {done}/{total} windows, {duration(left)} left")

    return on_progress
