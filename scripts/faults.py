"""What a conversion leaves behind when it is killed, interrupted, or the disk fails: counted, not argued.

Every trial converts a small checkpoint over an existing one with --overwrite, disturbs it, and then looks:
the destination must be the old checkpoint or the new one, byte for byte, with the hashes of its manifest;
a resumed run must end in the bytes of an undisturbed one and leave nothing beside it.

    python scripts/faults.py --kills 500 --json faults.json

Python and torch take seconds to start, so one process imports everything and forks a child for each run: a
kill hits a real conversion, but not the imports before it. System calls fail by strace's fault injection
(attached to the child), full disks are real tmpfs mounts; what a machine does not permit is reported as such.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_memory import make_model

import quantkit
from quantkit.cli.app import run
from quantkit.errors import QuantkitError
from quantkit.shards import sha256_file

Figures = dict[str, Any]
UNEXPECTED = 99
SYSCALLS = ("write", "pwrite64", "fsync", "rename", "renameat2", "ftruncate", "link", "mkdir", "openat")


def digest(path: Path) -> str:
    """Hash of names and contents of a tree; "" if there is none."""
    if not path.exists():
        return ""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        content = file.read_bytes() if file.is_file() else b""
        total.update(f"{file.relative_to(path)}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


def hashes_hold(path: Path) -> bool:
    """Whether every file has the sha256 that the checkpoint's manifest gives."""
    manifest = json.loads((path / "quantkit_manifest.json").read_bytes())
    return all(sha256_file(path / name) == record["sha256"] for name, record in manifest["files"].items())


class Bench:
    """A source, an old checkpoint at the destination, and the new one that a conversion must give."""

    def __init__(self, folder: Path, fmt: str, seed: int) -> None:
        self.folder, self.fmt = folder, fmt
        self.chance = random.Random(seed)
        self.source, self.dest = folder / "source", folder / "t" / "model"
        self.output = folder / "output.txt"
        self.source.mkdir()
        self.dest.parent.mkdir()
        make_model(self.source, 3, 128, 176)
        for file in self.source.iterdir():  # one number of shards for old and new
            os.utime(file, (1, 1))
        shutil.copytree(self.source, folder / "backup")
        (folder / "ids.jsonl").write_text(
            "\n".join(json.dumps({"input_ids": [(7 * i + j) % 1000 for j in range(32)]}) for i in range(4))
        )
        self.old_copy = folder / "old"
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            self.convert()  # imports what children would import each time, so that kills hit the conversion
        shutil.rmtree(self.dest)
        assert self.wait(self.fork(lambda: self.convert("fp8"))) == 0, self.output.read_text()
        shutil.move(self.dest, self.old_copy)
        assert self.wait(self.fork(self.convert)) == 0, self.output.read_text()
        began = time.perf_counter()
        self.reset()
        assert self.wait(self.fork(self.convert)) == 0, self.output.read_text()
        self.seconds = time.perf_counter() - began
        self.old, self.new = digest(self.old_copy), digest(self.dest)
        self.reset()
        assert self.wait(self.fork(self.convert)) == 0 and digest(self.dest) == self.new, "not deterministic"

    def command(self, fmt: str | None = None, *extra: str) -> list[str]:
        fmt = fmt or self.fmt
        command = ["convert", str(self.source), "--format", fmt, "-o", str(self.dest), "--overwrite"]
        if fmt == "gptq":
            command += ["--calibration", str(self.folder / "ids.jsonl"), "--samples", "4", "--seqlen", "32"]
        return [*command, "--max-shard-size", "200KB", *extra]

    def convert(self, fmt: str | None = None, *extra: str) -> int:
        return run(self.command(fmt, *extra))

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
        shutil.rmtree(self.dest.parent, ignore_errors=True)
        self.dest.parent.mkdir()
        shutil.copytree(self.old_copy, self.dest)
        self.output.write_bytes(b"")

    def look(self, counts: Counter[str]) -> str:
        """Classify what is at the destination."""
        state = digest(self.dest)
        kind = {self.old: "old", self.new: "new", "": "lost"}.get(state, "mixed")
        counts[kind] += 1
        if kind in ("old", "new") and not hashes_hold(self.dest):
            counts["unloadable"] += 1
        return kind

    def finish(self, counts: Counter[str], **extra: object) -> None:
        """Resume; the result must be the new checkpoint and nothing else."""
        code = self.wait(self.fork(lambda: self.convert(None, "--resume")))
        same = code == 0 and digest(self.dest) == self.new
        counts["resumed to the same bytes"] += same
        counts["not resumed"] += not same
        if not same:
            print("not resumed:", code, extra, self.output.read_text()[-600:], file=sys.stderr)
        counts["leftovers"] += len([e for e in os.listdir(self.dest.parent) if e != self.dest.name])


def signals(bench: Bench, number: int, runs: int) -> Figures:
    """Send a signal at a random moment of the conversion."""
    counts: Counter[str] = Counter()
    while counts["runs"] < runs:
        bench.reset()
        pid = bench.fork(bench.convert)
        time.sleep(bench.chance.uniform(0, 1.05 * bench.seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        code = bench.wait(pid)
        counts["runs"] += 1
        counts[f"exit {code}"] += 1
        bench.look(counts)
        text = bench.output.read_text()
        if number == signal.SIGINT and code == 130:
            counts["says how to resume"] += "--resume" in text and "interrupted" in text
        if code not in (0, 130, -number):
            print(f"signal {number}: exit {code}: {text[-500:]}", file=sys.stderr)
        bench.finish(counts, signal=number)
    return dict(counts)


def strace_works() -> bool:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["strace", "-o", "/dev/null", "true"], timeout=20).returncode == 0
    return False


def injected(bench: Bench, call: str, error: str, position: int, lasting: bool) -> int:
    """One conversion whose `position`-th system call `call` fails; its exit code."""
    bench.reset()
    pid = bench.fork(bench.convert, stop=True)
    os.waitpid(pid, os.WUNTRACED)
    when = f"{position}+" if lasting else str(position)
    inject = f"inject={call}:error={error}:when={when}"
    tracer = subprocess.Popen(
        ["strace", "-q", "-p", str(pid), "-o", "/dev/null", "-e", f"trace={call}", "-e", inject],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # until it is attached
        status = Path(f"/proc/{pid}/status").read_text()
        if "TracerPid:\t0\n" not in status:
            break
        time.sleep(0.005)
    os.kill(pid, signal.SIGCONT)
    code = bench.wait(pid)
    tracer.wait()
    return code


def count_calls(bench: Bench) -> dict[str, int]:
    """How often an undisturbed conversion makes each system call."""
    bench.reset()
    pid = bench.fork(bench.convert, stop=True)
    os.waitpid(pid, os.WUNTRACED)
    report = bench.folder / "calls.txt"
    calls = "trace=" + ",".join(SYSCALLS)
    tracer = subprocess.Popen(["strace", "-q", "-p", str(pid), "-o", report, "-e", calls])
    while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
        time.sleep(0.005)
    os.kill(pid, signal.SIGCONT)
    bench.wait(pid)
    tracer.wait()
    return Counter(line.partition("(")[0] for line in report.read_text().splitlines() if "(" in line)


def disk_errors(bench: Bench, runs: int) -> Figures:
    """ENOSPC (from some call on) and EIO (once) at every k-th call, spread over about `runs` trials."""
    if not strace_works():
        return {"not run": "strace cannot trace here"}
    calls = count_calls(bench)
    wanted = {name: count for name, count in calls.items() if name in SYSCALLS and name != "openat"}
    stride = max(1, -(-2 * sum(wanted.values()) // runs))
    counts: Counter[str] = Counter()
    for call, total in wanted.items():
        for error, lasting in (("ENOSPC", True), ("EIO", False)):
            for position in range(1 + bench.chance.randrange(min(stride, total)), total + 1, stride):
                code = injected(bench, call, error, position, lasting)
                counts["runs"] += 1
                counts[f"exit {code}"] += 1
                kind = bench.look(counts)
                if code not in (0, 5) or (code == 0 and kind != "new"):
                    text = bench.output.read_text()[-300:]
                    print(f"{call} {error} {position}: exit {code}, {kind}: {text}", file=sys.stderr)
                    counts["unexpected"] += 1
                bench.finish(counts, call=call, error=error, position=position)
    return {"calls": wanted, "every k-th, k =": stride, **counts}


def full_disks(bench: Bench) -> Figures:
    """Real small file systems of growing size, made larger afterwards; and one that is read-only."""
    counts: Counter[str] = Counter()
    home, parent = bench.dest, bench.folder / "t"
    size = sum(f.stat().st_size for f in bench.old_copy.rglob("*") if f.is_file()) // 1024
    for kilobytes in range(size + 150, 4 * size, max(60, size // 8)):
        shutil.rmtree(parent, ignore_errors=True)
        parent.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(parent)]
        if subprocess.run(command, capture_output=True).returncode:
            return {"not run": "cannot mount a tmpfs here"}
        try:
            shutil.copytree(bench.old_copy, home)
            code = bench.wait(bench.fork(bench.convert))
            counts["runs"] += 1
            counts[f"exit {code}"] += 1
            bench.look(counts)
            subprocess.run(["mount", "-o", "remount,size=64m", str(parent)], check=True)
            bench.finish(counts, kilobytes=kilobytes)
            if counts["read-only runs"] == 0:
                shutil.rmtree(home)
                shutil.copytree(bench.old_copy, home)
                subprocess.run(["mount", "-o", "remount,ro", str(parent)], check=True)
                code = bench.wait(bench.fork(bench.convert))
                counts["read-only runs"] += 1
                counts[f"read-only: exit {code}"] += 1
                counts["read-only: old"] += digest(home) == bench.old
        finally:
            subprocess.run(["umount", str(parent)], check=True)
    return dict(counts)


def writers(bench: Bench, number: int, rounds: int) -> Figures:
    """Several conversions to one destination at once."""
    counts: Counter[str] = Counter()
    for _ in range(rounds):
        bench.reset()
        pids = [bench.fork(bench.convert) for _ in range(number)]
        codes = [bench.wait(pid) for pid in pids]
        counts["runs"] += 1
        counts.update(f"exit {code}" for code in codes)
        bench.look(counts)
        counts["nobody won"] += 0 not in codes
        counts["leftovers"] += len(os.listdir(bench.dest.parent)) - 1
    return dict(counts)


def vanishing_source(bench: Bench, runs: int) -> Figures:
    """The source directory is removed while it is read; it comes back for the resumption."""
    counts: Counter[str] = Counter()
    for _ in range(runs):
        bench.reset()
        pid = bench.fork(bench.convert)
        time.sleep(bench.chance.uniform(0, bench.seconds))
        shutil.rmtree(bench.source)
        code = bench.wait(pid)
        counts["runs"] += 1
        counts[f"exit {code}"] += 1
        if code not in (0, 3):
            print(f"source removed: exit {code}: {bench.output.read_text()[-500:]}", file=sys.stderr)
        bench.look(counts)
        shutil.copytree(bench.folder / "backup", bench.source)
        bench.finish(counts, source="removed")
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--kills", type=int, default=500, help="SIGKILLs; a tenth of it for the other signals"
    )
    parser.add_argument("--errors", type=int, default=200, help="about how many failing system calls")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of two and of eight writers")
    parser.add_argument("--formats", nargs="+", default=["nf4", "gptq"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    figures: Figures = {"command": " ".join(["python", *sys.argv]), "quantkit": quantkit.__version__}
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        for fmt in args.formats:
            folder = Path(name) / fmt
            folder.mkdir()
            bench = Bench(folder, fmt, args.seed)
            kills, fewer = args.kills // len(args.formats), max(2, args.kills // 10 // len(args.formats))
            steps: list[tuple[str, Callable[[], Figures]]] = [
                ("SIGKILL", partial(signals, bench, signal.SIGKILL, kills)),
                ("SIGINT", partial(signals, bench, signal.SIGINT, fewer)),
                ("SIGTERM", partial(signals, bench, signal.SIGTERM, fewer)),
                ("failing system calls", partial(disk_errors, bench, args.errors // len(args.formats))),
                ("small disks", partial(full_disks, bench)),
                ("two writers", partial(writers, bench, 2, args.rounds)),
                ("eight writers", partial(writers, bench, 8, args.rounds)),
                ("source removed", partial(vanishing_source, bench, args.rounds)),
            ]
            for title, step in steps:
                start = time.perf_counter()
                result = step()
                result["seconds"] = round(time.perf_counter() - start, 1)
                figures[f"{title}, {fmt}"] = result
                print(f"{title}, {fmt}: {json.dumps(result)}", file=sys.stderr, flush=True)
            figures[f"one conversion, {fmt}, s"] = round(bench.seconds, 3)
    figures["seconds"] = round(time.perf_counter() - began, 1)
    bad = ("mixed", "lost", "unloadable", "not resumed", "leftovers", "unexpected", "nobody won")
    figures["bad"] = {
        f"{title}: {key}": value[key]
        for title, value in figures.items()
        if isinstance(value, dict)
        for key in bad
        if value.get(key)
    }
    print(json.dumps(figures, indent=1))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    sys.exit(1 if figures["bad"] else 0)


if __name__ == "__main__":
    main()
