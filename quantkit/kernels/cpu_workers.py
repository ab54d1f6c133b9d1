"""A few threads that run parts of one product at once.

`run_all(jobs)` runs the first job on the caller's thread and each of the others on a worker that waits on a
lock: a hand-over is one release and one acquire, without queues and futures (which cost 150 us more per call,
docs/adr/0035). Jobs are expected to leave Python's interpreter lock at once, as onnxruntime's `run` does.

One caller has the workers at a time; another that comes meanwhile runs its jobs one after another, which is
what the processor would make of them anyway.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

Job = tuple[Callable[..., None], *tuple[Any, ...]]


class _Worker:
    def __init__(self) -> None:
        self.job: Job | None = None
        self.error: BaseException | None = None
        self.go, self.done = threading.Lock(), threading.Lock()
        self.go.acquire()
        self.done.acquire()
        threading.Thread(target=self._loop, name="quantkit-cpu", daemon=True).start()

    def _loop(self) -> None:
        while True:
            self.go.acquire()
            assert self.job is not None
            function, *arguments = self.job
            try:
                function(*arguments)
            except BaseException as error:  # raised again by the caller
                self.error = error
            self.job = function = arguments = None  # type: ignore[assignment]  # hold nothing while waiting
            self.done.release()


_workers: list[_Worker] = []
_taken = threading.Lock()


def run_all(jobs: Sequence[Job]) -> None:
    """Run all; the first exception is raised once all have ended."""
    if len(jobs) == 1 or not _taken.acquire(blocking=False):
        for function, *arguments in jobs:
            function(*arguments)
        return
    try:
        while len(_workers) < len(jobs) - 1:
            _workers.append(_Worker())
        busy = _workers[: len(jobs) - 1]
        for worker, job in zip(busy, jobs[1:]):
            worker.job = job
            worker.go.release()
        function, *arguments = jobs[0]
        try:
            function(*arguments)
        finally:
            for worker in busy:
                worker.done.acquire()
            errors = [worker.error for worker in busy if worker.error is not None]
            for worker in busy:
                worker.error = None
        if errors:
            raise errors[0]
    finally:
        _taken.release()


def count() -> int:
    """How many workers were started."""
    return len(_workers)


def _after_fork() -> None:
    global _taken
    _workers.clear()  # a fork takes no threads along
    _taken = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
