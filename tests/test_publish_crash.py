"""CheckpointWriter killed at any moment, without an atomic exchange, and on a budget of memory and disk."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from disk_support import tree, write

from quantkit import staging
from quantkit.checkpoint import CheckpointReader
from quantkit.errors import DestinationError
from quantkit.publish import CheckpointWriter

WORKER = Path(__file__).with_name("crash_worker.py")


# -- crashes -------------------------------------------------------------------------------------------------


def crashes(folder: Path, *arguments: object) -> dict:
    command = [sys.executable, WORKER, folder, *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=500)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where fsync costs nothing: what counts here is the order of the changes."""
    folder = Path("/dev/shm") / f"quantkit-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        folder = tmp_path
    yield folder
    if folder != tmp_path:
        staging.remove(folder)


def check_random_kills(folder: Path, seed: int) -> None:
    summary = crashes(folder, "timed", 40, seed)
    assert summary["killed"] >= 20, summary
    assert not summary["bad"] and summary["mixed"] == summary["lost"] == 0, summary
    assert summary["resumed_with_units"] >= 1, summary


def test_killed_at_random_moments(quick_folder: Path) -> None:
    """SIGKILL leaves the old checkpoint or the new one, and a resumed run ends in the same bytes."""
    check_random_kills(quick_folder, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_on_disk(tmp_path: Path, seed: int) -> None:
    check_random_kills(tmp_path, seed)


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_every_change_to_the_disk(quick_folder: Path, stride: int) -> None:
    """The same, with the moments chosen: before each write, rename, link, fsync and removal in turn."""
    summary = crashes(quick_folder, "steps", stride, 2)
    assert summary["runs"] >= 120 // stride, summary
    assert not summary["bad"] and summary["mixed"] == summary["lost"] == 0, summary


def test_without_atomic_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "exchange", lambda *_: False)
    write(tmp_path / "m", {"u": {"old": torch.ones(1)}})
    write(tmp_path / "m", {"u": {"new": torch.ones(1)}}, overwrite=True)
    assert CheckpointReader(tmp_path / "m").names() == ["new"] and os.listdir(tmp_path) == ["m"]
    old = tree(tmp_path / "m")
    real = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "out":
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(DestinationError, match="Input/output"):
        write(tmp_path / "m", {"u": {"newer": torch.ones(1)}}, overwrite=True)
    assert tree(tmp_path / "m") == old
    # A crash between the two renames: the next writer puts the old one back before anything else.
    monkeypatch.undo()
    (tmp_path / "m").rename(tmp_path / ".m.quantkit-old")
    with pytest.raises(DestinationError, match="exists"):
        CheckpointWriter(tmp_path / "m")
    assert tree(tmp_path / "m") == old
    write(tmp_path / "m", {"u": {"newer": torch.ones(1)}}, overwrite=True, resume=True)
    assert CheckpointReader(tmp_path / "m").names() == ["newer"] and os.listdir(tmp_path) == ["m"]


MEMORY = """
import sys, torch
from pathlib import Path
from quantkit.publish import CheckpointWriter
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
folder = Path(sys.argv[1])
def size():
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
weight = torch.randn(1400, 1400)
with CheckpointWriter(folder / "m", max_shard_size="32MB") as writer:
    for i in range(16):
        writer.write_unit(str(i), {f"w{i}.{j}": weight[j * 700 :][:700] for j in range(2)})
    before, used, most = peak(), size(), 0
    def hook(event, args):
        global most
        most = max(most, size()) if event in ("os.remove", "os.rename") else most
    sys.addaudithook(hook)
    writer.publish()
print((peak() - before) / weight.nbytes * 2, most / used)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_publishing_needs_one_tensor_of_memory_and_one_shard_of_disk(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    memory, disk = map(float, result.stdout.split())
    assert memory < 3, "tensors' worth of memory"
    assert disk < 1 + 32 / 125 + 0.02, "times the size on disk"
