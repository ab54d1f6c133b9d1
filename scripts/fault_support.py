"""What scripts/faults.py does to a process: signals, failing system calls, small disks, rivals; and how it counts.

A `Trial` is some work that replaces what is at a destination. Python and torch take seconds to start, so one
process imports everything and forks a child for each run: a kill hits real work, but not the imports before it.
System calls fail by strace's fault injection (attached to the child); full disks are real tmpfs mounts.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError

Figures = dict[str, Any]
UNEXPECTED = 99
SYSCALLS = (
    "write",
    "pwrite64",
    "fsync",
    "rename",
    "renameat2",
    "ftruncate",
    "link",
    "mkdir",
    "copy_file_range",
)


def digest(path: Path) -> str:
    """Hash of names and contents of a tree; "" if there is none."""
    if not path.exists():
        return ""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        content = file.read_bytes() if file.is_file() else b""
        total.update(f"{file.relative_to(path)}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


class Trial:
    """Work at `dest`, over the old content `old_copy`; `work` and `again` return an exit code."""

    #: Exit codes of a disturbed run that are no surprise: done, destination refused.
    fine = (0, 5)

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.chance = folder, random.Random(seed)
        self.dest, self.old_copy = folder / "t" / "model", folder / "old"
        self.output = folder / "output.txt"
        self.dest.parent.mkdir(parents=True)
        self.old = self.new = ""  # digests
        self.seconds = 0.0  # of an undisturbed run

    def work(self) -> int:
        raise NotImplementedError

    def again(self) -> int:
        """The same work after an interruption; for what cannot be resumed, simply the work."""
        return self.work()

    def whole(self, path: Path) -> bool:
        """Whether what is at `path` is complete and has the hashes that it claims."""
        raise NotImplementedError

    def kind(self) -> str:
        """ "old", "new", "lost" (nothing is there) or "mixed"."""
        return {self.old: "old", self.new: "new", "": "lost"}.get(digest(self.dest), "mixed")

    def fork(self, work: Callable[[], object], *, stop: bool = False) -> int:
        """Run `work` in a child whose output goes to a file; with `stop` it waits for SIGCONT first."""
        pid = os.fork()
        if pid == 0:
            code: object = UNEXPECTED
            try:
                fd = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(fd, 1)
                os.dup2(fd, 2)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if stop:
                    os.kill(os.getpid(), signal.SIGSTOP)
                code = work()
                sys.stdout.flush()
            except QuantkitError as error:
                code = error.exit_code
                with contextlib.suppress(OSError):
                    print(error, file=sys.stderr, flush=True)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    print(repr(error), file=sys.stderr, flush=True)
            finally:
                os._exit(code if isinstance(code, int) else 0)
        return pid

    @staticmethod
    def wait(pid: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def reset(self) -> None:
        """The old content at the destination, nothing else beside it."""
        shutil.rmtree(self.dest.parent, ignore_errors=True)
        self.dest.parent.mkdir()
        if self.old_copy.exists():
            shutil.copytree(self.old_copy, self.dest)
        self.output.write_bytes(b"")

    def time(self) -> None:
        """Measure an undisturbed run."""
        self.reset()
        began = time.perf_counter()
        assert self.wait(self.fork(self.work)) == 0, self.output.read_text()
        self.seconds = time.perf_counter() - began

    def look(self, counts: Counter[str]) -> str:
        """Classify what is at the destination."""
        kind = self.kind()
        counts[kind] += 1
        if kind in ("old", "new") and not self.whole(self.dest):
            counts["unloadable"] += 1
        return kind

    def finish(self, counts: Counter[str], **extra: object) -> None:
        """Go on, or do it again; the result must be the new content and nothing else."""
        code = self.wait(self.fork(self.again))
        same = code == 0 and self.kind() == "new" and self.whole(self.dest)
        counts["resumed to the same bytes"] += same
        counts["not resumed"] += not same
        if not same:
            print("not resumed:", code, extra, self.output.read_text()[-600:], file=sys.stderr)
        counts["leftovers"] += len([e for e in os.listdir(self.dest.parent) if e != self.dest.name])


def signals(trial: Trial, number: int, runs: int) -> Figures:
    """Send a signal at a random moment of the work."""
    counts: Counter[str] = Counter()
    while counts["runs"] < runs:
        trial.reset()
        pid = trial.fork(trial.work)
        time.sleep(trial.chance.uniform(0, 1.05 * trial.seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        code = trial.wait(pid)
        counts["runs"] += 1
        counts[f"exit {code}"] += 1
        trial.look(counts)
        text = trial.output.read_text()
        if number == signal.SIGINT and code == 130:
            counts["says how to go on"] += "interrupted" in text
        if code not in (0, 130, -number):
            print(f"signal {number}: exit {code}: {text[-500:]}", file=sys.stderr)
            counts["unexpected"] += 1
        trial.finish(counts, signal=number)
    return dict(counts)


def strace_works() -> bool:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["strace", "-o", "/dev/null", "true"], timeout=20).returncode == 0
    return False


def traced(trial: Trial, *options: str) -> int:
    """One run under strace; its exit code."""
    trial.reset()
    pid = trial.fork(trial.work, stop=True)
    os.waitpid(pid, os.WUNTRACED)
    tracer = subprocess.Popen(
        ["strace", "-q", "-p", str(pid), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text() and tracer.poll() is None:
        time.sleep(0.002)  # until it is attached
    os.kill(pid, signal.SIGCONT)
    code = trial.wait(pid)
    tracer.wait()
    return code


def count_calls(trial: Trial) -> dict[str, int]:
    """How often an undisturbed run makes each system call that changes the disk."""
    report = trial.folder / "calls.txt"
    traced(trial, "-o", str(report), "-e", "trace=" + ",".join(SYSCALLS))
    return Counter(line.partition("(")[0] for line in report.read_text().splitlines() if "(" in line)


def failing_calls(trial: Trial, every: int) -> Figures:
    """ENOSPC (from the k-th call on) and EIO (at the k-th) for every system call that changes the disk and
    every `every`-th k from 1 to the last."""
    if not strace_works():
        return {"not run": "strace cannot trace here"}
    calls = {name: count for name, count in count_calls(trial).items() if name in SYSCALLS}
    counts: Counter[str] = Counter()
    for call, total in calls.items():
        for error, lasting in (("ENOSPC", True), ("EIO", False)):
            for position in range(1, total + 1, every):
                when = f"{position}+" if lasting else str(position)
                inject = f"inject={call}:error={error}:when={when}"
                code = traced(trial, "-o", "/dev/null", "-e", f"trace={call}", "-e", inject)
                counts["runs"] += 1
                counts[f"exit {code}"] += 1
                kind = trial.look(counts)
                if code not in trial.fine or (code == 0 and kind != "new"):
                    text = trial.output.read_text()[-300:]
                    print(f"{call} {error} {position}: exit {code}, {kind}: {text}", file=sys.stderr)
                    counts["unexpected"] += 1
                trial.finish(counts, call=call, error=error, position=position)
    return {"calls": calls, "k": f"1..last, every {every}", **counts}


def full_disks(trial: Trial, sizes: int, first: float = 1.1, last: float = 4.0) -> Figures:
    """Real file systems of growing size (`first` to `last` times the old content), made larger afterwards;
    then one that is read-only."""
    counts: Counter[str] = Counter()
    home, parent = trial.dest, trial.dest.parent
    size = sum(f.stat().st_size for f in trial.old_copy.rglob("*") if f.is_file()) / 1024
    steps = [first + (last - first) * i / max(1, sizes - 1) for i in range(sizes)]
    for number, share in enumerate(steps):
        kilobytes = int(share * size) + 100
        shutil.rmtree(parent, ignore_errors=True)
        parent.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(parent)]
        if subprocess.run(command, capture_output=True).returncode:
            return {"not run": "cannot mount a tmpfs here"}
        try:
            shutil.copytree(trial.old_copy, home)
            code = trial.wait(trial.fork(trial.work))
            counts["runs"] += 1
            counts[f"exit {code}"] += 1
            trial.look(counts)
            if code not in trial.fine:
                print(f"{kilobytes} kB: exit {code}: {trial.output.read_text()[-500:]}", file=sys.stderr)
                counts["unexpected"] += 1
            grown = f"remount,size={8 * int(size) + 65536}k"
            subprocess.run(["mount", "-o", grown, str(parent)], check=True)
            trial.finish(counts, kilobytes=kilobytes)
            if number == 0:
                read_only(trial, counts)
        finally:
            subprocess.run(["umount", str(parent)], check=True)
    return dict(counts)


def read_only(trial: Trial, counts: Counter[str]) -> None:
    """On a mount that is made read-only, and writable again for the next attempt."""
    shutil.rmtree(trial.dest)
    shutil.copytree(trial.old_copy, trial.dest)
    parent = str(trial.dest.parent)
    subprocess.run(["mount", "-o", "remount,ro", parent], check=True)
    code = trial.wait(trial.fork(trial.work))
    counts["read-only runs"] += 1
    counts[f"read-only: exit {code}"] += 1
    counts["read-only: old"] += trial.kind() == "old"
    subprocess.run(["mount", "-o", "remount,rw", parent], check=True)
    after: Counter[str] = Counter()
    trial.finish(after, read_only=True)
    counts["read-only: resumed"] += after["resumed to the same bytes"]
    counts["not resumed"] += after["not resumed"]
    counts["leftovers"] += after["leftovers"]


def writers(trial: Trial, number: int, rounds: int) -> Figures:
    """Several processes that do the same work at one destination at once; then one more, alone."""
    counts: Counter[str] = Counter()
    for _ in range(rounds):
        trial.reset()
        pids = [trial.fork(trial.work) for _ in range(number)]
        codes = [trial.wait(pid) for pid in pids]
        counts["runs"] += 1
        counts.update(f"exit {code}" for code in codes)
        trial.look(counts)
        counts["nobody won"] += 0 not in codes
        counts["unexpected"] += any(code not in trial.fine for code in codes)
        trial.finish(counts, writers=number)
    return dict(counts)
