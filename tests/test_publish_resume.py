"""CheckpointWriter interrupted by exceptions, damage and full disks. Kills: test_publish_crash.py."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from disk_support import Stop, interrupt, some_units, tree, write

from quantkit import publish
from quantkit.checkpoint import CheckpointReader
from quantkit.errors import DestinationError
from quantkit.journal import Journal
from quantkit.publish import CheckpointWriter
from quantkit.staging import remove

# -- resumption --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [3000, "5GB"])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_resumed_run_has_the_same_bytes(tmp_path: Path, after: int, limit: int | str) -> None:
    units = some_units()
    write(tmp_path / "whole", units, max_shard_size=limit, fingerprint="f")
    interrupt(tmp_path / "m", units, after, max_shard_size=limit, fingerprint="f")
    assert not (tmp_path / "m").exists()
    assert sorted(os.listdir(tmp_path)) == [".m.quantkit-staging", "whole"]
    with CheckpointWriter(tmp_path / "m", max_shard_size=limit, fingerprint="f", resume=True) as writer:
        assert writer.completed == tuple(units)[:after] and writer.resumable
        assert writer.unit_report("layer 0") == {"unit": "layer 0"}
        with pytest.raises(ValueError, match="written already"):
            writer.write_unit("layer 0", {})
    write(tmp_path / "m", units, max_shard_size=limit, fingerprint="f", resume=True)
    assert tree(tmp_path / "m") == tree(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["m", "whole"]


def test_interruption_before_the_first_unit_leaves_nothing(tmp_path: Path) -> None:
    interrupt(tmp_path / "m", {}, 0)
    assert os.listdir(tmp_path) == []


def test_keyboard_interrupt_keeps_finished_units(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "m") as writer:
        assert not writer.resumable
        writer.write_unit("a", {"w": torch.ones(3)})
        raise KeyboardInterrupt
    assert writer.resumable
    with CheckpointWriter(tmp_path / "m", resume=True) as again:
        assert again.completed == ("a",)
        again.publish()
    assert not again.resumable


def test_scratch_survives_interruption_not_publication(tmp_path: Path) -> None:
    with pytest.raises(Stop), CheckpointWriter(tmp_path / "m") as writer:
        writer.write_unit("a", {"w": torch.ones(3)})
        (writer.scratch / "activations").write_bytes(b"123")
        raise Stop
    with CheckpointWriter(tmp_path / "m", resume=True) as writer:
        assert (writer.scratch / "activations").read_bytes() == b"123"
        writer.publish()
    assert os.listdir(tmp_path) == ["m"]


def test_resume_without_anything_to_resume(tmp_path: Path) -> None:
    write(tmp_path / "m", some_units(2), resume=True)
    assert (tmp_path / "m" / "model.safetensors").exists()


def test_other_inputs_cannot_be_resumed(tmp_path: Path) -> None:
    units = some_units(2)
    prints = {"model": "a" * 64, "options": "4 bits", "calibration": "wikitext"}
    interrupt(tmp_path / "m", units, 1, fingerprint=prints)
    kept = tree(tmp_path)
    with pytest.raises(DestinationError) as caught:
        CheckpointWriter(tmp_path / "m", resume=True, fingerprint={**prints, "options": "3 bits"})
    assert "options (was 4 bits, is 3 bits)" in str(caught.value) and "calibration" not in str(caught.value)
    assert "without --resume" in str(caught.value)
    with pytest.raises(DestinationError, match="max_shard_size"):
        CheckpointWriter(tmp_path / "m", resume=True, fingerprint=prints, max_shard_size="1GB")
    with pytest.raises(DestinationError, match=r"model .was aaaaaaaaaaaa"):
        CheckpointWriter(tmp_path / "m", resume=True, fingerprint="else")
    assert tree(tmp_path) == kept  # a refusal costs nothing
    write(tmp_path / "m", units, resume=True, fingerprint=prints)


def test_dead_staging_is_swept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupt(tmp_path / "m", some_units(2), 2)
    with caplog.at_level(logging.INFO):
        write(tmp_path / "m", {"u": {"only": torch.ones(2)}})
    assert "removing what an interrupted run left" in caplog.text
    assert CheckpointReader(tmp_path / "m").names() == ["only"] and os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("damage", ["torn", "garbage", "binary", "empty"])
def test_damaged_journal(tmp_path: Path, damage: str) -> None:
    units = some_units()
    write(tmp_path / "whole", units)
    interrupt(tmp_path / "m", units, 3)
    journal = tmp_path / ".m.quantkit-staging" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    spoiled = {
        "torn": lines[2][:-9],
        "garbage": b"not json\n" + lines[2],
        "binary": b"\0" * 512,
        "empty": b"",
    }
    journal.write_bytes(b"".join([*lines[:2], spoiled[damage]]))
    with CheckpointWriter(tmp_path / "m", resume=True) as writer:
        assert writer.completed == ("layer 0", "layer 1")
    write(tmp_path / "m", units, resume=True)
    assert tree(tmp_path / "m") == tree(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_piece_is_redone_with_what_follows(tmp_path: Path, damage: str) -> None:
    units = some_units()
    write(tmp_path / "whole", units)
    interrupt(tmp_path / "m", units, 3)
    piece = tmp_path / ".m.quantkit-staging" / "pieces" / "00001.safetensors"
    data = bytearray(piece.read_bytes())
    data[-1] ^= 1
    piece.write_bytes(data if damage == "flip" else data[:-5])
    if damage == "remove":
        piece.unlink()
    with CheckpointWriter(tmp_path / "m", resume=True) as writer:
        assert writer.completed == ("layer 0",)
    write(tmp_path / "m", units, resume=True)
    assert tree(tmp_path / "m") == tree(tmp_path / "whole")


def test_damaged_shard_ends_the_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = some_units()
    with monkeypatch.context() as patch:
        patch.setattr(publish, "replace_directory", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            write(tmp_path / "m", units, max_shard_size=3000)
    shard = next((tmp_path / ".m.quantkit-staging" / "out").glob("model-00002-of-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DestinationError, match=r"model-00002.* damaged.*without --resume"):
        write(tmp_path / "m", units, max_shard_size=3000, resume=True)
    write(tmp_path / "m", units, max_shard_size=3000)
    assert os.listdir(tmp_path) == ["m"]


def test_staging_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    interrupt(tmp_path / "m", some_units(1), 1)
    (tmp_path / ".m.quantkit-staging").rename(tmp_path / "elsewhere")
    kept = tree(tmp_path / "elsewhere")
    (tmp_path / ".m.quantkit-staging").symlink_to("elsewhere")
    with CheckpointWriter(tmp_path / "m", resume=True) as writer:
        assert writer.completed == ()
    assert tree(tmp_path / "elsewhere") == kept and os.listdir(tmp_path) == ["elsewhere"]


@pytest.mark.parametrize("left", [[], ["state.json"], ["state.json", "journal.jsonl"], ["journal.jsonl"]])
def test_staging_half_removed(tmp_path: Path, left: list[str]) -> None:
    """What a writer leaves that was killed while it cleaned up, in whatever order files went."""
    units = some_units(2)
    interrupt(tmp_path / "m", units, 2)
    for entry in (tmp_path / ".m.quantkit-staging").iterdir():
        if entry.name not in left:
            remove(entry)
    write(tmp_path / "m", units, resume=True)
    write(tmp_path / "whole", units)
    assert tree(tmp_path / "m") == tree(tmp_path / "whole") and sorted(os.listdir(tmp_path)) == ["m", "whole"]


def test_journal_appends_after_damage(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j")
    for record in ({"a": 1}, {"b": 2}):
        first.append(record)
    first.close()
    with (tmp_path / "j").open("ab") as file:
        file.write(b'{"c": ' + b"x" * 5000)
    journal = Journal(tmp_path / "j")
    assert journal.records == [{"a": 1}, {"b": 2}]
    journal.append({"d": "ü\n"})
    journal.keep(2)
    journal.append({"e": 5})
    journal.close()
    assert Journal(tmp_path / "j").records == [{"a": 1}, {"b": 2}, {"e": 5}]
    assert (tmp_path / "j").read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("lines", [(0, 2), (1, 0, 2), (0, 0, 1), (2,)])
def test_journal_believes_no_line_that_was_moved(tmp_path: Path, lines: tuple[int, ...]) -> None:
    journal = Journal(tmp_path / "j")
    for i in range(3):
        journal.append({"i": i})
    journal.close()
    all_lines = (tmp_path / "j").read_bytes().splitlines(keepends=True)
    (tmp_path / "j").write_bytes(b"".join(all_lines[i] for i in lines))
    believed = [record["i"] for record in Journal(tmp_path / "j").records]
    assert believed == ([0] if lines[0] == 0 else [])


# -- full disks ----------------------------------------------------------------------------------------------


def test_space_is_checked_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match=r"disk is full.*about 1\d+ bytes needed, \d+ free"):
        CheckpointWriter(tmp_path / "m", need_bytes=10**18)
    assert os.listdir(tmp_path) == []
    interrupt(tmp_path / "m", some_units(2), 2, need_bytes=1000)
    with pytest.raises(DestinationError, match="disk is full"):
        CheckpointWriter(tmp_path / "m", need_bytes=10**18, resume=True)
    assert os.listdir(tmp_path) == [".m.quantkit-staging"]  # finished work is not thrown away


class FullDisk:
    """Fails the n-th fsync as a full disk does."""

    def __init__(self, at: int, number: int) -> None:
        self.at, self.number, self.real = at, number, os.fsync

    def __call__(self, fd: int) -> None:
        self.at -= 1
        if self.at == 0:
            raise OSError(self.number, os.strerror(self.number))
        self.real(fd)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("overwrite", [False, True])
def test_disk_full_at_any_write(
    tmp_path: Path, overwrite: bool, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = {f"u{i}": {f"w{i}.{j}": torch.randn(9 * i + 1, 7) for j in range(3)} for i in range(3)}
    write(tmp_path / "whole", units, max_shard_size=700)
    folder = tmp_path / "f"
    if overwrite:
        write(folder / "m", {"u": {"old": torch.ones(1)}})
    old = tree(folder / "m")
    failures = 0
    for at in range(1, 200):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", FullDisk(at, number))
            try:
                write(folder / "m", units, max_shard_size=700, overwrite=overwrite, resume=at % 2 == 0)
            except DestinationError as error:
                failures += 1
                words = "Input/output error" if number == errno.EIO else "disk is full"
                assert words in str(error) and str(folder / "m") in str(error) and str(error).isprintable()
            else:
                break
        if tree(folder / "m") != old:  # only the very last fsync comes after the rename
            break
    assert failures > 10
    assert tree(folder / "m") in (old, tree(tmp_path / "whole"))
    write(folder / "m", units, max_shard_size=700, overwrite=True, resume=True)
    assert tree(folder / "m") == tree(tmp_path / "whole") and os.listdir(folder) == ["m"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MB, where we may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("cannot mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk(small_disk: Path) -> None:
    write(small_disk / "m", {"u": {"old": torch.zeros(1000)}})
    old = tree(small_disk / "m")
    with pytest.raises(DestinationError, match=r"disk is full.*: 400000 bytes needed, \d+ free"):
        with CheckpointWriter(small_disk / "m", overwrite=True) as writer:
            for i in range(9):
                writer.write_unit(f"u{i}", {f"w{i}": torch.randn(100_000)})
    assert writer.resumable and tree(small_disk / "m") == old
    # Two pieces of 400 kB fit, a second copy of them does not: publishing needs room for one shard.
    with pytest.raises(DestinationError, match="disk is full"):
        with CheckpointWriter(small_disk / "m", overwrite=True, resume=True) as writer:
            assert writer.completed == ("u0", "u1")
            writer.publish()
    assert tree(small_disk / "m") == old
    # Started anew, the pieces that filled the disk are swept. Pieces that are shards need no second copy.
    smaller = {f"v{i}": {f"w{i}": torch.randn(75_000)} for i in range(3)}
    write(small_disk / "m", smaller, overwrite=True, max_shard_size=300_000)
    assert len(CheckpointReader(small_disk / "m").names()) == 3
