"""CheckpointWriter: bytes, resumption, refusals, crashes."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit import publish, staging
from quantkit.checkpoint import INDEX, MANIFEST, CheckpointReader
from quantkit.errors import CheckpointError, DestinationError, UsageError
from quantkit.publish import CheckpointWriter, parse_size
from quantkit.shards import DTYPES, Spec, plan_shards, sha256_file, spec_of, write_safetensors
from quantkit.staging import Journal

WORKER = Path(__file__).with_name("crash_worker.py")


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    data = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    if dtype == torch.bool:
        data &= 1
    return data.view(dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def some_units(count: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    shapes = [(), (63,), (31, 5), (2, 3, 7), (0, 4)]
    return {
        f"layer {i}": {
            f"model.layers.{i}.{code}.{j}": random_tensor(shape, dtype)
            for code, dtype in DTYPES.items()
            for j, shape in enumerate(shapes)
        }
        for i in range(count)
    }


def write(dest: Path, units: dict[str, dict[str, torch.Tensor]], **options) -> None:
    with CheckpointWriter(dest, **options) as writer:
        for unit, tensors in units.items():
            if unit not in writer.completed:
                writer.write_unit(unit, tensors, report={"unit": unit})
        writer.add_json("config.json", {"model_type": "llama"})
        writer.publish()


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def all_tensors(units: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: tensor for unit in units.values() for name, tensor in unit.items()}


class Stop(Exception):
    """Stands for an interruption."""


def interrupt(dest: Path, units: dict[str, dict[str, torch.Tensor]], after: int, **options) -> None:
    """Write the first `after` units, then fail."""
    with pytest.raises(Stop), CheckpointWriter(dest, **options) as writer:
        for unit, tensors in list(units.items())[:after]:
            writer.write_unit(unit, tensors, report={"unit": unit})
        raise Stop


# -- the bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 777, 20_000, "5GB"])
def test_every_dtype_survives(tmp_path: Path, limit: int | str) -> None:
    units = some_units()
    write(tmp_path / "m", units, max_shard_size=limit)
    assert os.listdir(tmp_path) == ["m"]
    tensors = all_tensors(units)
    reader = CheckpointReader(tmp_path / "m")
    assert set(reader.names()) == tensors.keys()
    for name, tensor in tensors.items():
        got = reader.read(name)
        assert (got.dtype, got.shape, raw(got)) == (tensor.dtype, tensor.shape, raw(tensor))
    if limit != "5GB":
        index = json.loads((tmp_path / "m" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert list(index["weight_map"]) == reader.names()
        shards = [load_file(file) for file in reader.files]
        assert [n for s in shards for n in s if n not in tensors] == []
        for shard in shards:
            assert (
                sum(t.nbytes for t in shard.values()) <= int(limit)
                or len([t for t in shard.values() if t.nbytes]) == 1
            )
        assert reader.files[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    else:
        assert [f.name for f in reader.files] == ["model.safetensors"]
        assert not (tmp_path / "m" / INDEX).exists()


names = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=20)
specs = st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 9), max_size=3).map(tuple))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names.filter(lambda n: n != "__metadata__"), specs, max_size=12))
def test_files_are_the_librarys_bytes(tmp_path_factory: pytest.TempPathFactory, layout: dict) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    tensors = {name: random_tensor(shape, DTYPES[code]) for name, (code, shape) in layout.items()}
    digest, size = write_safetensors(
        folder / "ours", {n: spec_of(t) for n, t in tensors.items()}, tensors.__getitem__
    )
    save_file(tensors, folder / "theirs", metadata={"format": "pt"})
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()
    assert (digest, size) == (sha256_file(folder / "ours"), (folder / "ours").stat().st_size)


def test_views_and_shared_storage(tmp_path: Path) -> None:
    base = torch.randn(64, 48)
    tensors = {"t": base.t(), "row": base[3], "cols": base[:, ::5], "same": base, "again": base}
    tensors["param"] = torch.nn.Parameter(base[1:])
    write(tmp_path / "m", {"u": tensors})
    reader = CheckpointReader(tmp_path / "m")
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), tensor)


def test_a_piece_that_is_a_shard_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = {f"u{i}": {f"w{i}": torch.randn(100, 10)} for i in range(3)}
    write(tmp_path / "copied", {"all": all_tensors(units)}, max_shard_size=4000)
    written = []
    real = publish.write_safetensors
    monkeypatch.setattr(
        publish, "write_safetensors", lambda path, *a: (written.append(path), real(path, *a))[1]
    )
    monkeypatch.setattr("quantkit.assemble.write_safetensors", lambda *_: pytest.fail("copied a piece"))
    write(tmp_path / "linked", units, max_shard_size=4000)
    assert len(written) == 3
    assert tree(tmp_path / "linked") == tree(tmp_path / "copied")


def test_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = {f"u{i}": {f"w{i}": torch.randn(100, 10)} for i in range(3)}
    write(tmp_path / "linked", units, max_shard_size=4000)

    def fail(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    write(tmp_path / "copied", units, max_shard_size=4000)
    assert tree(tmp_path / "linked") == tree(tmp_path / "copied")


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 60))
def test_plan_keeps_order_and_limit(sizes: list[int], limit: int) -> None:
    tensors = [(str(i), Spec("U8", (n,))) for i, n in enumerate(sizes)]
    plan = plan_shards(tensors, limit)
    assert [item for shard in plan for item in shard.items()] == tensors
    for shard in plan:
        filled = [s.nbytes for s in shard.values() if s.nbytes]
        assert sum(filled) <= limit or len(filled) == 1


@pytest.mark.parametrize(
    "text,size",
    [
        ("5GB", 5 * 10**9),
        ("200MB", 2 * 10**8),
        ("1.5GiB", 3 << 29),
        (" 7 kb ", 7000),
        ("42", 42),
        (9, 9),
        ("2T", 2 * 10**12),
    ],
)
def test_parse_size(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "0", 0, -5, "1e9", "5 gigabytes", "nan", "1_000", "5iB", True, "9" * 99]
)
def test_parse_size_refuses(text: int | str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


# -- other files, manifest, permissions ------------------------------------------------------------------


def test_manifest_and_other_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "tokenizer.json").write_bytes(b"\x00\xff")
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}")
    with CheckpointWriter(tmp_path / "m", max_shard_size=100) as writer:
        writer.write_unit("a", {"a": torch.zeros(30)})
        writer.write_unit("b", {"b": torch.zeros(30)})
        writer.add_json("config.json", {"wrong": 1})
        writer.add_json("config.json", {"name": "ü"})
        writer.add_bytes("README.md", b"# card")
        writer.copy_file(source / "tokenizer.json")
        writer.copy_file(source / "additional_chat_templates" / "rag.jinja")
        writer.provenance = {"format": "gptq", "bits": 4}
        writer.publish()
    found = tree(tmp_path / "m")
    assert json.loads(found["config.json"]) == {"name": "ü"}
    assert found["tokenizer.json"] == b"\x00\xff"
    manifest = json.loads(found.pop(MANIFEST))
    assert manifest["provenance"] == {"format": "gptq", "bits": 4}
    assert manifest["files"].keys() == found.keys()
    assert "additional_chat_templates/rag.jinja" in found
    for name, entry in manifest["files"].items():
        assert entry == {"sha256": sha256_file(tmp_path / "m" / name), "size": len(found[name])}


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "/etc/x", "a/b", ".hidden", "a\0b", "a\nb", MANIFEST, INDEX]
)
def test_names_that_are_not_files_of_a_checkpoint(tmp_path: Path, name: str) -> None:
    with CheckpointWriter(tmp_path / "m") as writer, pytest.raises(ValueError):
        writer.add_bytes(name, b"")
    with CheckpointWriter(tmp_path / "m") as writer, pytest.raises(ValueError):
        writer.add_bytes("model-00001-of-00002.safetensors", b"")
    assert os.listdir(tmp_path) == []


def test_missing_file_to_copy(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m") as writer, pytest.raises(CheckpointError, match=r"vocab\.json"):
        writer.copy_file(tmp_path / "vocab.json")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "m", some_units(2), max_shard_size=3000)
    finally:
        os.umask(before)
    for path in [tmp_path / "m", *(tmp_path / "m").iterdir()]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path


# -- refusals ----------------------------------------------------------------------------------------------


def test_existing_destination(tmp_path: Path) -> None:
    write(tmp_path / "m", some_units(1))
    before = tree(tmp_path / "m")
    for options in ({}, {"resume": True}):
        with pytest.raises(DestinationError, match=r"exists.*--overwrite"):
            CheckpointWriter(tmp_path / "m", **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DestinationError, match="exists"):
        CheckpointWriter(tmp_path / "empty")
    assert sorted(os.listdir(tmp_path)) == ["empty", "m"] and tree(tmp_path / "m") == before


def test_destination_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(DestinationError, match="is a file"):
            CheckpointWriter(tmp_path / "m", overwrite=overwrite)
        with pytest.raises(DestinationError, match="Cannot write"):
            CheckpointWriter(tmp_path / "m" / "below", overwrite=overwrite)
    assert (tmp_path / "m").read_text() == "precious" and os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("dest", ["/", "..", "a\nb", "x" * 300])
def test_destinations_that_cannot_be(tmp_path: Path, dest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    with pytest.raises(DestinationError) as caught:
        CheckpointWriter(dest)
    assert str(caught.value).isprintable()


def test_overwrite_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(DestinationError, match="not a checkpoint"):
        CheckpointWriter(tmp_path / "home", overwrite=True)
    assert tree(tmp_path / "home") == {"thesis.tex": b"x"}


def test_overwrite_refuses_its_own_source(tmp_path: Path) -> None:
    write(tmp_path / "m", some_units(1))
    (tmp_path / "link").symlink_to("m")
    for dest in ("m", "link", "."):
        with pytest.raises(DestinationError, match="being read"):
            CheckpointWriter(tmp_path / dest, overwrite=True, source=tmp_path / "link")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_parent_not_writable(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(DestinationError, match="Permission denied"):
        CheckpointWriter(tmp_path / "closed" / "m")


def test_parent_refused_by_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(DestinationError, match="Cannot write .*Permission denied"):
        CheckpointWriter(tmp_path / "m")


def test_missing_parents_are_made_and_links_followed(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "m", some_units(1))
    (tmp_path / "link").symlink_to("a/b/m")
    write(tmp_path / "link", {"u": {"only": torch.ones(2)}}, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert CheckpointReader(tmp_path / "a" / "b" / "m").names() == ["only"]


def test_second_writer_is_refused(tmp_path: Path) -> None:
    units = some_units(2)
    with CheckpointWriter(tmp_path / "m") as writer:
        writer.write_unit("layer 0", units["layer 0"])
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(DestinationError, match=f"pid {os.getpid()}.* is writing"):
                CheckpointWriter(tmp_path / "m", **options)
        with CheckpointWriter(tmp_path / "other"):  # another destination is free
            pass
        writer.write_unit("layer 1", units["layer 1"])
        writer.publish()
    assert set(CheckpointReader_names(tmp_path / "m")) == all_tensors(units).keys()
    assert os.listdir(tmp_path) == ["m"]


def CheckpointReader_names(path: Path) -> list[str]:  # noqa: N802
    (path / "config.json").write_text("{}")
    return CheckpointReader(path).names()


def test_programming_mistakes(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m") as writer:
        with pytest.raises(ValueError, match="nothing to publish"):
            writer.publish()
        writer.write_unit("a", {"w": torch.zeros(2)})
        with pytest.raises(ValueError, match="written already"):
            writer.write_unit("a", {"v": torch.zeros(2)})
        with pytest.raises(ValueError, match="another unit"):
            writer.write_unit("b", {"w": torch.zeros(2)})
        with pytest.raises(ValueError, match="dtype"):
            writer.write_unit("b", {"v": torch.zeros(2, dtype=torch.complex64)})
        writer.publish()
        with pytest.raises(ValueError, match="closed"):
            writer.publish()
    assert list(load_file(tmp_path / "m" / "model.safetensors")) == ["w"]


def test_destination_that_appears_meanwhile(tmp_path: Path) -> None:
    units = some_units(2)
    with pytest.raises(DestinationError, match="meanwhile"), CheckpointWriter(tmp_path / "m") as writer:
        for unit, tensors in units.items():
            writer.write_unit(unit, tensors)
        write(tmp_path / "other", {"u": {"x": torch.ones(1)}})
        (tmp_path / "other").rename(tmp_path / "m")
        writer.publish()
    assert list(load_file(tmp_path / "m" / "model.safetensors")) == ["x"]
    write(tmp_path / "m", units, resume=True, overwrite=True)
    assert set(load_file(tmp_path / "m" / "model.safetensors")) == all_tensors(units).keys()


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
    with pytest.raises(DestinationError, match="model .was aaaaaaaaaaaa"):
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


def test_journal_appends_after_damage(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b'{"a": 1}\n{"b": 2}\n{"c": ' + b"x" * 5000)
    journal = Journal(tmp_path / "j")
    assert journal.records == [{"a": 1}, {"b": 2}]
    journal.append({"d": "ü\n"})
    journal.keep(2)
    journal.append({"e": 5})
    journal.close()
    assert Journal(tmp_path / "j").records == [{"a": 1}, {"b": 2}, {"e": 5}]
    assert (tmp_path / "j").read_bytes().count(b"\n") == 3


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


# -- crashes -------------------------------------------------------------------------------------------------


def crashes(folder: Path, *arguments: object) -> dict:
    command = [sys.executable, WORKER, folder, *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=500)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL leaves the old checkpoint or the new one, and a resumed run ends in the same bytes."""
    summary = crashes(tmp_path, "timed", 40, 1)
    assert summary["killed"] >= 25, summary
    assert not summary["bad"] and summary["mixed"] == summary["lost"] == 0, summary
    assert summary["resumed_with_units"] >= 5, summary


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_every_change_to_the_disk(tmp_path: Path, stride: int) -> None:
    """The same, with the moments chosen: before each write, rename, link, fsync and removal in turn."""
    shared = Path("/dev/shm")
    folder = tmp_path
    if os.access(shared, os.W_OK):  # fsync costs nothing there, and nothing is at stake but the order
        folder = shared / f"quantkit-test-{os.getpid()}-{stride}"
        folder.mkdir()
    try:
        summary = crashes(folder, "steps", stride, 2)
    finally:
        if folder != tmp_path:
            staging.remove(folder)
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
