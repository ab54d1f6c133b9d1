"""CheckpointWriter: the bytes it writes, and what it refuses. Interruptions: test_publish_resume.py."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from disk_support import all_tensors, random_tensor, raw, some_units, tree, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit import publish
from quantkit.checkpoint import INDEX, MANIFEST, CheckpointReader
from quantkit.errors import CheckpointError, DestinationError, UsageError
from quantkit.publish import CheckpointWriter, parse_size
from quantkit.shards import DTYPES, Spec, plan_shards, sha256_file, spec_of, write_safetensors

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
    with pytest.raises(DestinationError, match=r"Cannot write .*Permission denied"):
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
    assert load_file(tmp_path / "m" / "model.safetensors").keys() == all_tensors(units).keys()
    assert os.listdir(tmp_path) == ["m"]


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
