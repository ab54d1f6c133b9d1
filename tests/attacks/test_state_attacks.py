"""Files that quantkit itself keeps between runs, tampered with: eval's cache, what sweep and allocate leave, an
export that is there already; and data files that are pipes or bombs. (Journals: tests/test_publish_resume.py.)

What can be measured again is, with a warning; nothing is followed out of the directory; nothing hangs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_support import limited, quantkit_command, refused
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.errors import CheckpointError
from quantkit.export.stage import MANIFEST, staged
from quantkit.knapsack import knapsack
from quantkit.sensitivity import Sensitivity
from quantkit.sweep import convert_once, parse_setting, read_row

# -- eval's cache of the reference's predictions -------------------------------------------------------------

Spoil = Callable[[Path], object]


def manifest(folder: Path, **changes: object) -> None:
    """Change keys of reference.json; its hashes are made to fit, as a forger would."""
    meta = json.loads((folder / "reference.json").read_text())
    for name, record in meta["files"].items():
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            record.update(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    meta.update(changes)
    (folder / "reference.json").write_text(json.dumps(meta))


def tensors(folder: Path, file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    loaded = load_file(folder / file)
    change(loaded)
    save_file(loaded, folder / file)
    manifest(folder)


def leading_out(folder: Path) -> None:
    shutil.move(folder / "head.safetensors", folder.parent.parent / "elsewhere")
    (folder / "head.safetensors").symlink_to("../../elsewhere")


def traversal(folder: Path) -> None:
    meta = json.loads((folder / "reference.json").read_text())
    manifest(folder, files={**meta["files"], "rows-/../../x": {"size": 1, "sha256": "0"}})


CACHES: dict[str, Spoil] = {
    "manifest not JSON": lambda f: (f / "reference.json").write_text("{"),
    "manifest deep": lambda f: (f / "reference.json").write_text("[" * 100_000),
    "manifest huge": lambda f: os.truncate(f / "reference.json", 20 << 30),
    "manifest a pipe": lambda f: ((f / "reference.json").unlink(), os.mkfifo(f / "reference.json")),
    "vocabulary lies": lambda f: manifest(f, vocabulary=2**40),
    "rows lie": lambda f: manifest(f, rows=2**40),
    "checks of another kind": lambda f: manifest(f, extra={"checks": {"a": [1]}}),
    "checks no list": lambda f: manifest(f, extra={"checks": 5}),
    "name outside": traversal,
    "head is a link": leading_out,
    "head missing": lambda f: (f / "head.safetensors").unlink(),
    "head NaN": lambda f: tensors(f, "head.safetensors", lambda t: t["weight"].fill_(float("nan"))),
    "head of integers": lambda f: tensors(
        f, "head.safetensors", lambda t: t.update(weight=t["weight"].to(torch.int32))
    ),
    "rows NaN": lambda f: tensors(f, "rows-00000.safetensors", lambda t: t["hidden"].fill_(float("nan"))),
    "rows short": lambda f: tensors(f, "rows-00000.safetensors", lambda t: t.update(hidden=t["hidden"][:1])),
    "rows narrow": lambda f: tensors(
        f, "rows-00000.safetensors", lambda t: t.update(hidden=t["hidden"][:, :1].contiguous())
    ),
    "rows no safetensors": lambda f: ((f / "rows-00000.safetensors").write_bytes(b"\x80pickle"), manifest(f)),
}


@pytest.fixture(scope="module")
def evaluated(tiny, tmp_path_factory) -> tuple[list[object], Path]:
    """Arguments of an evaluation whose reference is cached, and the cache."""
    folder = tmp_path_factory.mktemp("evaluated")
    quantkit.convert(tiny("llama"), folder / "out", format="nf4")
    text = folder / "text.txt"
    text.write_text("what the models are measured on " * 30)
    arguments = ["eval", folder / "out", "--reference", tiny("llama"), "--data", text, "--window", "32"]
    code, _, err = quantkit_command(*arguments, "--cache", folder / "cache")
    assert code == 0, err
    return arguments, folder / "cache"


@pytest.mark.parametrize("kind", CACHES)
def test_a_tampered_cache_is_made_again_or_refused(kind: str, evaluated, tmp_path: Path) -> None:
    arguments, good = evaluated
    cache = tmp_path / "caches" / "cache"
    shutil.copytree(good, cache)
    folder = next(p.parent for p in cache.glob("*/reference.json"))
    CACHES[kind](folder)
    code, out, err = quantkit_command(*arguments, "--cache", cache, "--json")
    assert code != 70 and "Traceback" not in err, err
    if code == 0:
        rows = json.loads(out)["rows"]
        assert all(row["perplexity"]["ppl"] > 1 for row in rows), rows
        assert all(0 <= row["divergence"]["kl_mean"] < 1 for row in rows if row["divergence"]), rows
    else:
        assert "error: " in err and any(word in err for word in ("cache", "rows-", "reference")), err


# -- sweep and allocate --------------------------------------------------------------------------------------


def test_what_a_sweep_left_is_not_followed(tiny, tmp_path: Path, progress) -> None:
    """The mark that says what a conversion was made from: a link, a pipe, a bomb, another hash."""
    stranger = tmp_path / "stranger"
    stranger.write_text("precious")
    out, setting = tmp_path / "sweep" / "nf4", parse_setting("nf4")
    out.parent.mkdir()
    mark = out.with_name(".nf4.sweep")

    def bomb() -> None:
        with mark.open("wb") as file:
            file.truncate(20 << 30)

    convert_once(str(tiny("llama")), out, setting, {}, progress)
    good = mark.read_text()
    for spoil in (
        lambda: mark.symlink_to(stranger),
        lambda: os.mkfifo(mark),
        bomb,
        lambda: mark.write_text("0" * 64),
        lambda: mark.write_bytes(b"\xff" * 64),
    ):
        mark.unlink()
        spoil()
        mark.with_name(mark.name + ".tmp").symlink_to(stranger)
        with limited():
            convert_once(str(tiny("llama")), out, setting, {}, progress)
        assert stranger.read_text() == "precious" and not mark.is_symlink() and mark.read_text() == good
        assert quantkit.verify(out, loader="none").ok


@pytest.fixture
def progress():
    from quantkit.progress import NullProgress

    return NullProgress()


ROWS: dict[str, str] = {
    "not JSON": "{",
    "deep": "[" * 100_000,
    "a list": "[]",
    "no row": '{"key": "k"}',
    "a row of text": '{"key": "k", "row": "evil"}',
    "a row of other keys": '{"key": "k", "row": {"evil": 1}}',
    "a row of other types": '{"key": "k", "row": {"path": {"a": []}, "perplexity": [1], "layers": 5}}',
    "NaN": '{"key": "k", "row": {"path": NaN}}',
}


@pytest.mark.parametrize("kind", ROWS)
def test_stored_evaluations_that_are_none(kind: str, tmp_path: Path) -> None:
    (tmp_path / "row.json").write_text(ROWS[kind])
    with limited():
        assert read_row(tmp_path / "row.json", "k") is None


SENSITIVITIES: dict[str, object] = {
    "good": {"a": {"3": 0.5, "4": 0.25}},
    "not a dictionary": [1],
    "widths missing": {"a": {"3": 0.5}},
    "text": {"a": {"3": "evil", "4": "0.1"}},
    "negative": {"a": {"3": -1.0, "4": 0.1}},
    "infinite": {"a": {"3": 1e999, "4": 0.1}},
    "a list": {"a": [1, 2]},
}


@pytest.mark.parametrize("kind", SENSITIVITIES)
def test_stored_sensitivities_are_checked(kind: str, tmp_path: Path, monkeypatch, progress) -> None:
    from quantkit.formats import get_format

    bench = Sensitivity("x", get_format("gptq"), {}, [3, 4], tmp_path, progress)
    monkeypatch.setattr(bench, "_key", lambda: "k")
    (tmp_path / "sensitivity.json").write_text(json.dumps({"key": "k", "kl": SENSITIVITIES[kind]}))
    assert bench._known() == (SENSITIVITIES[kind] if kind == "good" else {})
    (tmp_path / "sensitivity.json").write_text("[" * 100_000)
    assert bench._known() == {}
    assert knapsack([{3: 1, 4: 2}], [{3: 0.5, 4: 0.25}], 2) == [4]  # what the good ones are for


# -- data files ----------------------------------------------------------------------------------------------


def bomb(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20 << 30)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("make", [bomb, os.mkfifo, loop, Path.mkdir])
def test_data_that_is_no_file_or_far_too_long(make, suffix: str, tiny, tmp_path: Path) -> None:
    data = tmp_path / f"data{suffix}"
    make(data)
    few = ["--samples", "4", "--seqlen", "32"]
    convert = ["convert", tiny("llama"), "--format", "gptq", "-o", tmp_path / "out", *few]
    refused(*convert, "--calibration", data, words=[data.name])
    refused("eval", tiny("llama"), "--data", data, "--cache", "none", words=[data.name])
    assert not (tmp_path / "out").exists()


# -- exports -------------------------------------------------------------------------------------------------


def make_export(dest: Path, source: Path, **files: bytes) -> None:
    with staged(dest, overwrite=True, source=source, need_bytes=1) as folder:
        for name, data in {"model.onnx": b"graph", "model.onnx.data": b"weights", **files}.items():
            (folder / name).write_bytes(data)
        (folder / MANIFEST).write_text("{}")


def test_an_export_whose_files_were_changed_is_found(tmp_path: Path) -> None:
    source, dest = tmp_path / "source", tmp_path / "export"
    source.mkdir()
    make_export(dest, source)
    assert quantkit.verify(dest).ok
    for file in sorted(dest.iterdir()):
        original = file.read_bytes()
        for bit in (0, 8 * len(original) - 2):
            spoiled = bytearray(original)
            spoiled[bit // 8] ^= 1 << bit % 8
            file.write_bytes(spoiled)
            try:
                assert not quantkit.verify(dest).ok, (file, bit)
            except CheckpointError as error:
                assert file.name in str(error)
        file.write_bytes(original)
    assert quantkit.verify(dest).ok
    (dest / "model.onnx.data").unlink()
    (dest / "model.onnx.data").symlink_to("../outside")  # where an ONNX file's external data may lie
    code, out, err = quantkit_command("verify", dest)
    assert code not in (0, 70) and "model.onnx.data is missing" in out + err, (out, err)


def test_overwriting_an_export_follows_no_link(tmp_path: Path) -> None:
    source, dest, stranger = tmp_path / "source", tmp_path / "export", tmp_path / "stranger"
    source.mkdir()
    stranger.mkdir()
    (stranger / "precious").write_text("x")
    make_export(dest, source)
    (dest / "model.onnx.data").unlink()
    (dest / "model.onnx.data").symlink_to(stranger / "precious")
    (dest / "more").symlink_to(stranger)
    tmp_path.joinpath(".export.quantkit-export").symlink_to(stranger)  # as if a killed export had left it
    make_export(dest, source)
    assert (stranger / "precious").read_text() == "x"
    assert sorted(p.name for p in dest.iterdir()) == ["model.onnx", "model.onnx.data", MANIFEST]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "source", "stranger"]


def test_artifacts_beside_the_weights_are_not_carried_along(tiny, tmp_path: Path) -> None:
    """An ONNX model with external data elsewhere, a .pt2, a library, a genai_config.json that names it."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny("llama"), source)
    planted = [
        "model.onnx",
        "model.onnx.data",
        "model.onnx_data",
        "model.pt2",
        "evil.so",
        "genai_config.json",
    ]
    planted += ["quantkit_export.json", "engine.plan"]
    for name in planted:
        (source / name).write_bytes(b"evil")
    quantkit.convert(source, out, format="nf4")
    assert not {p.name for p in out.iterdir()} & set(planted)
    from quantkit.checkpoint import CheckpointReader

    with CheckpointReader(source) as reader:  # what an export takes along
        assert not {p.name for p in reader.other_files()} & set(planted)
