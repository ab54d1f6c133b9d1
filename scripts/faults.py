"""What a conversion, an export or a report leaves behind when it is killed, interrupted, or the disk fails:
counted, not argued.

Every trial replaces an existing directory with --overwrite, is disturbed, and then looked at: the destination
must be the old content or the new, byte for byte, with the hashes of its manifest. A conversion that is resumed,
or an export or report that is made again, must end in the bytes of an undisturbed one and leave nothing beside it.

    python scripts/faults.py --kills 500 --json faults.json

How it is done, and what a machine has to permit: scripts/fault_support.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from bench_memory import make_model
from fault_support import Figures, Trial, digest, failing_calls, full_disks, signals, writers

import quantkit
from quantkit.checkpoint import EXPORT_MANIFEST, MANIFEST
from quantkit.cli.app import run
from quantkit.manifest import is_sealed
from quantkit.shards import sha256_file

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "pydoc-llama-7m"
BAD = ("mixed", "lost", "unloadable", "not resumed", "leftovers", "unexpected", "nobody won")


def hashes_hold(path: Path, manifest: str = MANIFEST) -> bool:
    """Whether the manifest and every file have the sha256 that it gives."""
    data = (path / manifest).read_bytes()
    records = json.loads(data)["files"].items()
    return is_sealed(data) and all(sha256_file(path / name) == record["sha256"] for name, record in records)


class Conversion(Trial):
    """A tiny Llama (3 layers), converted over an fp8 checkpoint."""

    def __init__(self, folder: Path, fmt: str, seed: int) -> None:
        super().__init__(folder, seed)
        self.fmt, self.source = fmt, folder / "source"
        self.source.mkdir()
        make_model(self.source, 3, 128, 176)
        for file in self.source.iterdir():  # a copy that is put back must be the same input
            os.utime(file, (1, 1))
        shutil.copytree(self.source, folder / "backup")
        (folder / "ids.jsonl").write_text(
            "\n".join(json.dumps({"input_ids": [(7 * i + j) % 1000 for j in range(32)]}) for i in range(4))
        )
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            self.work()  # imports what children would import each time, so that kills hit the conversion
        shutil.rmtree(self.dest)
        assert self.wait(self.fork(lambda: self.convert("fp8"))) == 0, self.output.read_text()
        shutil.move(self.dest, self.old_copy)
        self.time()
        self.old, self.new = digest(self.old_copy), digest(self.dest)
        self.time()
        assert digest(self.dest) == self.new, "not deterministic"

    def convert(self, fmt: str, *extra: str) -> int:
        command = ["convert", str(self.source), "--format", fmt, "-o", str(self.dest), "--overwrite"]
        if fmt == "gptq":
            command += ["--calibration", str(self.folder / "ids.jsonl"), "--samples", "4", "--seqlen", "32"]
        return run([*command, "--max-shard-size", "200KB", *extra])

    def work(self) -> int:
        return self.convert(self.fmt)

    def again(self) -> int:
        return self.convert(self.fmt, "--resume")

    def whole(self, path: Path) -> bool:
        return hashes_hold(path)


class Export(Trial):
    """`quantkit export` of an NF4 Llama over an older export. Its manifest has timings, so two exports differ:
    new is what is not the old one and has all hashes of its manifest."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, seed)
        source, self.checkpoint = folder / "source", folder / "checkpoint"
        source.mkdir()
        make_model(source, 1, 128, 176)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            quantkit.convert(source, self.checkpoint, format="nf4")
            assert self.work() == 0
        shutil.move(self.dest, self.old_copy)
        self.old = digest(self.old_copy)
        self.time()

    def work(self) -> int:
        return run(["export", str(self.checkpoint), "--to", "onnx", "-o", str(self.dest), "--overwrite"])

    def kind(self) -> str:
        found = super().kind()
        return "new" if found == "mixed" and self.whole(self.dest) else found

    def whole(self, path: Path) -> bool:
        return (path / EXPORT_MANIFEST).is_file() and hashes_hold(path, EXPORT_MANIFEST)


class ExportPublication(Export):
    """The publication of an export alone: the same files are written anew, so that thousands of moments can be
    tried without building a graph for each."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, seed)
        self.files = {f.name: f.read_bytes() for f in self.dest.iterdir()}
        self.time()
        self.new = digest(self.dest)

    def work(self) -> int:
        if not hasattr(self, "files"):
            return super().work()
        from quantkit.export.stage import staged

        with staged(self.dest, overwrite=True, source=self.checkpoint, need_bytes=1) as stage:
            for name, data in self.files.items():
                (stage / name).write_bytes(data)
        return 0

    def kind(self) -> str:
        return Trial.kind(self)


class Report(Trial):
    """`quantkit eval --report` over an older report; measured once, written in every trial."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, seed)
        self.result = quantkit.evaluate([EXAMPLE], tokens=256, window=64, cache="none", checks=False)
        self.result.commands = ["an older one"]
        assert self.work() == 0
        shutil.move(self.dest, self.old_copy)
        self.result.commands = ["the newer one"]
        self.time()
        self.old, self.new = digest(self.old_copy), digest(self.dest)

    def work(self) -> int:
        from quantkit.eval.report import write_report

        write_report(self.result, self.dest, overwrite=True)
        return 0

    def whole(self, path: Path) -> bool:
        files = ("report.html", "report.md", "report.json", "figures")
        return all((path / name).exists() for name in files)


def vanishing_source(trial: Conversion, runs: int) -> Figures:
    """The source directory is removed while it is read; it comes back for the resumption."""
    counts: Counter[str] = Counter()
    for _ in range(runs):
        trial.reset()
        pid = trial.fork(trial.work)
        time.sleep(trial.chance.uniform(0, trial.seconds))
        shutil.rmtree(trial.source)
        code = trial.wait(pid)
        counts["runs"] += 1
        counts[f"exit {code}"] += 1
        if code not in (0, 3):
            print(f"source removed: exit {code}: {trial.output.read_text()[-500:]}", file=sys.stderr)
            counts["unexpected"] += 1
        trial.look(counts)
        shutil.copytree(trial.folder / "backup", trial.source)
        trial.finish(counts, source="removed")
    return dict(counts)


Step = tuple[str, Callable[[], Figures]]


def conversion_steps(trial: Conversion, args: argparse.Namespace) -> list[Step]:
    every = args.every if trial.fmt == args.formats[0] else 5 * args.every
    kills, fewer = args.kills // len(args.formats), max(2, args.kills // 10 // len(args.formats))
    return [
        ("SIGKILL", partial(signals, trial, signal.SIGKILL, kills)),
        ("SIGINT", partial(signals, trial, signal.SIGINT, fewer)),
        ("SIGTERM", partial(signals, trial, signal.SIGTERM, fewer)),
        ("failing system calls", partial(failing_calls, trial, every)),
        ("small disks", partial(full_disks, trial, args.disks)),
        ("two writers", partial(writers, trial, 2, args.rounds)),
        ("eight writers", partial(writers, trial, 8, args.rounds)),
        ("source removed", partial(vanishing_source, trial, args.rounds)),
    ]


def publication_steps(trial: Trial, args: argparse.Namespace) -> list[Step]:
    return [
        ("SIGKILL", partial(signals, trial, signal.SIGKILL, args.kills // 5)),
        ("failing system calls", partial(failing_calls, trial, args.every)),
        ("small disks", partial(full_disks, trial, args.disks // 2, 1.0, 3.0)),
        ("two writers", partial(writers, trial, 2, args.rounds)),
        ("eight writers", partial(writers, trial, 8, args.rounds)),
    ]


def all_steps(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, Trial, list[Step]]]:
    """(name, trial, steps); a trial is prepared when it is its turn."""
    for fmt in args.formats:
        conversion = Conversion(folder / fmt, fmt, args.seed)
        yield fmt, conversion, conversion_steps(conversion, args)
    if args.kills:
        report = Report(folder / "report", args.seed)
        yield "eval --report", report, publication_steps(report, args)
        publication = ExportPublication(folder / "publication", args.seed)
        yield "export's publication", publication, publication_steps(publication, args)
    if args.exports:
        export = Export(folder / "export", args.seed)
        yield (
            "export",
            export,
            [
                ("SIGKILL", partial(signals, export, signal.SIGKILL, args.exports)),
                ("small disks", partial(full_disks, export, args.exports // 2, 1.0, 2.5)),
                ("two writers", partial(writers, export, 2, 1)),
            ],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=500, help="SIGKILLs of conversions; a tenth otherwise")
    parser.add_argument(
        "--every", type=int, default=1, help="let every k-th system call fail; 5 k after the first format"
    )
    parser.add_argument("--disks", type=int, default=20, help="sizes of small disks")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of two and of eight writers")
    parser.add_argument("--exports", type=int, default=8, help="SIGKILLs of whole exports")
    parser.add_argument("--formats", nargs="*", default=["nf4", "gptq"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    figures: Figures = {"command": " ".join(["python", *sys.argv]), "quantkit": quantkit.__version__}
    memory = Path("/dev/shm")

    def save() -> None:
        figures["seconds"] = round(time.perf_counter() - began, 1)
        rows = {
            title: value for title, value in figures.items() if isinstance(value, dict) and title != "bad"
        }
        figures["bad"] = {f"{t}: {key}": row[key] for t, row in rows.items() for key in BAD if row.get(key)}
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1))

    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        for subject, trial, steps in all_steps(Path(name), args):
            for title, step in steps:
                start = time.perf_counter()
                result = step()
                result["seconds"] = round(time.perf_counter() - start, 1)
                figures[f"{title}, {subject}"] = result
                print(f"{title}, {subject}: {json.dumps(result)}", file=sys.stderr, flush=True)
                save()  # what is measured stays when a later step is interrupted
            figures[f"one run, {subject}, s"] = round(trial.seconds, 3)
    save()
    print(json.dumps(figures, indent=1))
    sys.exit(1 if figures["bad"] else 0)


if __name__ == "__main__":
    main()
