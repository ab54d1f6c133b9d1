"""A few threads that run pieces of one product at once.

`run_all(jobs, threads)` puts the jobs into one queue that the caller and `threads - 1` workers empty together.
A worker sleeps on a lock, so a hand-over is one release, without futures (150 us more per call, docs/adr/0035).
Waking a worker takes some 60 us, a fifth of a small product: the caller works meanwhile, and because the
jobs lie in a queue, whoever is free takes the next. The caller never waits for a worker that has taken nothing.

Jobs are expected to leave Python's interpreter lock at once, as onnxruntime's `run` does. One caller has the
workers at a time; another that comes meanwhile runs its jobs one after another, which is what the processor
would make of them anyway.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

#: A function and its argument.
Job = tuple[Callable[[Any], Any], Any]
#: How often a caller looks whether the last jobs have ended before it sleeps between looks: about 200 us.
SPINS = 400
#: Seconds between looks after that.
NAP = 5e-5
#: Lets go of the interpreter lock and of the processor, if anybody wants either, and comes back at once (0.4 us).
#: Not `time.sleep(0)`: on Linux that is a timer with 50 us of slack, 54 us a call. Windows has no such slack.
_yield: Callable[[], None] = getattr(os, "sched_yield", None) or (lambda: time.sleep(0))

_queue: deque[Job] = deque()
#: One entry per job that has ended: what it raised, or None.
_ended: list[BaseException | None] = []
#: One lock per worker; released when there are jobs.
_wake: list[threading.Lock] = []
_taken = threading.Lock()


def run_all(jobs: Sequence[Job], threads: int, own: Job | None = None) -> None:
    """Run all, in any order; the first exception is raised once all have ended.

    `own` is one more job, for the caller's thread, after its first of the others: what it does costs half,
    since the workers take more of the others meanwhile.
    """
    if threads == 1 or len(jobs) == 1 or not _taken.acquire(blocking=False):
        for function, argument in jobs:
            function(argument)
        if own is not None:
            own[0](own[1])
        return
    try:
        while len(_wake) < threads - 1:
            _start_worker()
        _ended.clear()
        _queue.extend(jobs)
        for lock in _wake[: threads - 1]:
            if lock.locked():  # else it has been woken already and not come to look yet
                lock.release()
        _drain(own)
        interrupt = _wait(len(jobs) + (own is not None))
        error = interrupt or next((error for error in _ended if error is not None), None)
        if error is not None:
            raise error
    finally:
        _taken.release()


def _wait(count: int) -> KeyboardInterrupt | None:
    """Until `count` jobs have ended, even when interrupted: they write to the caller's memory."""
    interrupt, looks = None, 0
    while len(_ended) < count:
        try:
            # First without sleeping; either lets go of the interpreter lock, which workers need to end.
            if looks < SPINS:
                _yield()
                looks += 1
            else:
                time.sleep(NAP)
        except KeyboardInterrupt as wanted:
            interrupt = wanted
    return interrupt


def _drain(own: Job | None = None) -> None:
    """Take jobs until none is left; `own` after the first."""
    while True:
        try:
            job = _queue.popleft()
        except IndexError:
            break
        _run(job)
        del job  # hold nothing while waiting
        if own is not None:
            _run(own)
            own = None
    if own is not None:
        _run(own)


def _run(job: Job) -> None:
    error: BaseException | None = None
    try:
        job[0](job[1])
    except BaseException as raised:  # raised again by the caller
        error = raised
    _ended.append(error)


def _start_worker() -> None:
    lock = threading.Lock()
    lock.acquire()

    def loop() -> None:
        while True:
            lock.acquire()
            _drain()

    threading.Thread(target=loop, name="quantkit-cpu", daemon=True).start()
    _wake.append(lock)


def count() -> int:
    """How many workers were started."""
    return len(_wake)


def _after_fork() -> None:
    """A fork takes no threads along, and another thread of the parent may have been in the middle."""
    global _taken
    _wake.clear()
    _queue.clear()
    _ended.clear()
    _taken = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
