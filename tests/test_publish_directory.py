"""`staging.new_directory`, which publishes exports and reports: killed before every change to the disk, failing at
every system call's place, two writers, what others put there."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from crash_worker import die_at_step, digest, wait

from quantkit import staging
from quantkit.errors import DestinationError
from quantkit.export.stage import MANIFEST, check_destination, staged


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        (Path(name) / "source").mkdir()
        yield Path(name)


def publish(folder: Path, content: bytes) -> None:
    with staged(folder / "out", overwrite=True, source=folder / "source", need_bytes=1) as stage:
        (stage / "model.onnx").write_bytes(content)
        (stage / "more").mkdir()
        (stage / "more" / "data").write_bytes(content * 2)
        (stage / MANIFEST).write_text("{}")


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_before_every_change(folder: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    publish(folder, b"new")
    new = digest(folder / "out")
    publish(folder, b"old")
    old = digest(folder / "out")
    real = staging.exchange
    monkeypatch.setattr(staging, "exchange", real if exchange else lambda one, two: False)
    seen, step, killed = set(), 0, True
    while killed and step < 200:
        step += 1
        pid = os.fork()
        if pid == 0:
            die_at_step(step)
            publish(folder, b"new")
            os._exit(0)
        killed = wait(pid) == -signal.SIGKILL
        state = digest(folder / "out")
        if not exchange and not state:  # the moment without anything; the next writer puts it back
            state = digest(staging.aside_path(folder / "out"))
            assert state == old
        assert state in (old, new), step
        seen.add(state)
        publish(folder, b"old")  # a later run sweeps what the dead one left
        assert digest(folder / "out") == old
        assert sorted(p.name for p in folder.iterdir()) == ["out", "source"], step
    assert seen == {old, new} and step > 12


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_every_fsync_may_fail(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    publish(folder, b"new")
    new = digest(folder / "out")
    publish(folder, b"old")
    old = digest(folder / "out")
    real, failed, kept = os.fsync, 0, 0
    for position in range(1, 20):
        calls = itertools.count(1)
        monkeypatch.setattr(os, "fsync", partial(failing_fsync, real, calls, position, number))
        try:
            publish(folder, b"new")
        except DestinationError as error:
            failed += 1
            assert "\n" not in str(error) and str(folder / "out") in str(error)
        monkeypatch.setattr(os, "fsync", real)
        if next(calls) <= position:
            assert digest(folder / "out") == new
            break
        # The last one comes after the exchange: then the new one is there, whole.
        assert digest(folder / "out") in (old, new)
        kept += digest(folder / "out") == old
        assert sorted(p.name for p in folder.iterdir()) == ["out", "source"]
        publish(folder, b"old")
    assert failed >= 5 and kept == failed - 1


def failing_fsync(
    real: Callable[[int], None], calls: Iterator[int], position: int, number: int, fd: int
) -> None:
    if next(calls) == position:
        raise OSError(number, os.strerror(number))
    real(fd)


def test_a_second_writer_is_refused(folder: Path) -> None:
    with staged(folder / "out", overwrite=False, source=folder / "source", need_bytes=1) as stage:
        (stage / MANIFEST).write_text("{}")
        with pytest.raises(DestinationError, match=f"pid {os.getpid()}"):
            publish(folder, b"other")
    assert sorted(p.name for p in folder.iterdir()) == ["out", "source"]


def foreign(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("x")


@pytest.mark.parametrize("make", [foreign, Path.touch])
def test_what_appears_meanwhile_is_not_replaced(folder: Path, make: Callable[[Path], None]) -> None:
    with pytest.raises(DestinationError, match=r"not an export|is a file"):
        with staged(folder / "out", overwrite=True, source=folder / "source", need_bytes=1) as stage:
            (stage / MANIFEST).write_text("{}")
            make(folder / "out")
    assert (folder / "out").is_file() or (folder / "out" / "thesis.tex").exists()
    assert sorted(p.name for p in folder.iterdir()) == ["out", "source"]


def test_too_little_space_is_said_before_work(folder: Path) -> None:
    with pytest.raises(DestinationError, match="disk is full"):
        with staged(folder / "out", overwrite=True, source=folder / "source", need_bytes=1 << 60):
            raise AssertionError("work began")
    assert [p.name for p in folder.iterdir()] == ["source"]


def test_the_source_is_never_replaced(folder: Path) -> None:
    (folder / "source" / MANIFEST).write_text("{}")
    with pytest.raises(DestinationError, match="holds the checkpoint"):
        check_destination(folder / "source", overwrite=True, source=folder / "source")
