"""Coverage-guided fuzzing of one target with atheris (`make fuzz`).

    python tests/fuzz/fuzz.py reader --cpu-seconds 900 --log fuzz.jsonl

It ends after that many CPU seconds (not wall time: the machine may be busy with other things) and adds one
line of figures to the log. Any other argument goes to libFuzzer. The corpus in tests/fuzz/corpus/TARGET is read
only; inputs that reach new code are kept in a temporary directory. A crash is written to the current
directory (`-artifact_prefix=` changes that) and can be replayed by naming its file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["quantkit"]):
    import fuzz_targets

    import quantkit

import torch

CORPUS = Path(__file__).parent / "corpus"
#: A single input may take this long. CPU seconds, because the process may be stopped for minutes.
HANG_SECONDS = 5.0


class Budget:
    """A target that counts, stops the process when its CPU seconds are spent, and logs how it ended."""

    def __init__(self, name: str, target: Callable[[bytes], None], seconds: float, log: Path | None) -> None:
        self._name, self._target, self._seconds, self._log = name, target, seconds, log
        self._executions, self._started, self._began = 0, time.process_time(), time.time()
        self.folders: list[Path] = []  # removed at the end

    def __call__(self, data: bytes) -> None:
        self._executions += 1
        before = time.process_time()
        try:
            self._target(data)
            if (took := time.process_time() - before) > HANG_SECONDS:
                raise fuzz_targets.Finding(f"took {took:.1f} CPU seconds")
        except BaseException as error:
            self._record(f"{type(error).__name__}: {error}"[:300])
            raise
        if before - self._started >= self._seconds:
            self._record(None)
            self._remove()
            os._exit(0)  # libFuzzer has no way to be told from within that it should stop

    def _record(self, finding: str | None) -> None:
        line = {
            "target": self._name,
            "executions": self._executions,
            "cpu_seconds": round(time.process_time() - self._started, 1),
            "seconds": round(time.time() - self._began, 1),
            "finding": finding,
            "date": time.strftime("%Y-%m-%d"),
            "quantkit": quantkit.__version__,
        }
        print(json.dumps(line), flush=True)
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _remove(self) -> None:
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)


def mutate_header(data: bytes, max_size: int, seed: int) -> bytes:
    """A mutation of a safetensors file that mostly keeps the length before the header true: random ones hardly
    ever do, and then nothing behind that check would be reached."""
    length = struct.unpack("<Q", data[:8])[0] if len(data) > 8 else 0
    if not 0 < length <= len(data) - 8 or random.Random(seed).random() < 0.3:
        return bytes(atheris.Mutate(data, max_size))
    header, body = data[8 : 8 + length], data[8 + length :]
    header = bytes(atheris.Mutate(header, max(1, max_size - 8 - len(body))))
    return (struct.pack("<Q", len(header)) + header + body)[:max_size]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=sorted(fuzz_targets.TARGETS))
    parser.add_argument("--cpu-seconds", type=float, default=float("inf"))
    parser.add_argument("--log", type=Path, help="a file of JSON lines, which one line is added to")
    args, arguments = parser.parse_known_args()
    torch.set_num_threads(1)
    folder = fuzz_targets.workspace()
    budget = Budget(args.target, fuzz_targets.TARGETS[args.target](folder), args.cpu_seconds, args.log)
    budget.folders.append(folder)
    if not any(Path(a).exists() for a in arguments if not a.startswith("-")):
        new = Path(tempfile.mkdtemp(prefix=f"fuzz-{args.target}-"))
        budget.folders.append(new)
        arguments = [str(new), str(CORPUS / args.target), *arguments]
    limits = ["-timeout=1200", "-rss_limit_mb=2048", f"-max_len={fuzz_targets.MAX_BYTES}"]
    more = {"custom_mutator": mutate_header} if args.target == "reader" else {}
    dictionary = CORPUS / f"{args.target}.dict"
    if dictionary.exists():
        limits.append(f"-dict={dictionary}")
    atheris.Setup(["fuzz.py", *limits, *arguments], budget, **more)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
