"""Running `quantkit` commands on spoiled checkpoints, in this process, with everything that is promised
about a refusal checked: one line, an exit code, two seconds, 300 MB, the destination untouched."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantkit.cli.app import run

WEIGHTS = "model.safetensors"
SECONDS, MEGABYTES = 2.0, 300.0


def memory(key: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, in MB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1e3 for line in status if line.startswith(key))


def forget_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def tree_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        digest.update(f"{file.relative_to(path)}\0{file.lstat().st_mode}\0".encode())
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


def quantkit_command(*arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command run here."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Two CPU seconds and 300 MB above what is there, or an AssertionError."""
    forget_peak()
    base, start = memory("VmRSS"), time.process_time()
    yield
    seconds, peak = time.process_time() - start, memory("VmHWM") - base
    # CPU seconds, not wall time: the limit is the program's, not that of a machine shared with other tests.
    assert seconds < SECONDS, f"{seconds:.2f} s"
    assert peak < MEGABYTES, f"{peak:.0f} MB"


def check_line(line: str, words: list[str]) -> None:
    """One printable line that has the words."""
    assert "Traceback" not in line and line.isprintable() and len(line) < 2100, line
    for word in words:
        assert word in line, f"{word!r} is not in {line!r}"


def refused(*arguments: object, words: list[str], destination: Path | None = None) -> str:
    """The one line with which a command refuses; asserts every promise about it."""
    before = tree_hash(destination) if destination else ""
    siblings = [p.name for p in destination.parent.iterdir()] if destination else []
    with limited():
        code, out, err = quantkit_command(*arguments)
    assert code not in (0, 70), (code, out, err)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and err.rstrip().endswith(errors[0]), err
    assert "Traceback" not in err, err
    check_line(errors[0], words)
    if destination is not None:
        assert tree_hash(destination) == before
        # What is found in the data while work is under way keeps the finished units for --resume.
        kept = {f".{destination.name}.quantkit-staging"}
        assert {p.name for p in destination.parent.iterdir()} - kept == set(siblings) - kept
    return errors[0]


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / WEIGHTS, {"format": "pt"})


def first_tensor(path: Path, pattern: str) -> str:
    """Name of the first tensor that matches."""
    from safetensors import safe_open

    with safe_open(path / WEIGHTS, "pt") as file:
        return next(name for name in sorted(file.keys()) if re.search(pattern, name))
