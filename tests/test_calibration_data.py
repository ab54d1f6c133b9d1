"""Calibration text in every accepted form, and everything that is refused."""

from __future__ import annotations

import json

import pytest
import torch

from quantkit.calibration_data import load_calibration
from quantkit.errors import CalibrationError
from quantkit.load import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny("llama"))


def load(source, tokenizer, samples=4, seqlen=16, seed=0):
    return load_calibration(source, tokenizer, samples=samples, seqlen=seqlen, seed=seed, vocab_size=256)


def test_builtin_is_deterministic_and_follows_the_seed(tokenizer):
    one, two, other = (load("builtin", tokenizer, seed=s) for s in (0, 0, 1))
    assert one.ids.shape == (4, 16)
    assert torch.equal(one.ids, two.ids)
    assert one.fingerprint() == two.fingerprint() != other.fingerprint()


def test_text_and_jsonl_hold_the_same_tokens(tokenizer, tmp_path):
    text = "".join(chr(32 + i * 7 % 90) for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in (text[:90], text[90:])))
    a, b = (
        load(tmp_path / "a.txt", tokenizer, samples=100),
        load(tmp_path / "a.jsonl", tokenizer, samples=100),
    )
    assert a.ids.shape == (12, 16)  # 200 // 16 whole chunks, each once
    assert torch.equal(a.ids, b.ids)
    assert len({tuple(r) for r in a.ids.tolist()}) == 12


def test_id_rows_are_taken_as_they_are(tmp_path):
    rows = torch.randint(0, 256, (5, 20))
    (tmp_path / "ids.jsonl").write_text("\n".join(json.dumps({"input_ids": r}) for r in rows.tolist()))
    assert torch.equal(load(tmp_path / "ids.jsonl", None).ids, rows[:4, :16])


@pytest.mark.parametrize(
    "name, content, text",
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n \n", "empty"),
        ("short.txt", b"ten chars.", "fewer than one sample"),
        ("latin.txt", b"caf\xe9 " * 50, "not UTF-8"),
        ("bad.jsonl", b"{not json}\n", "line 1: not JSON"),
        ("list.jsonl", b"[1, 2]\n", 'no "text"'),
        ("none.jsonl", b'{"text": "ok"}\n{"txt": 3}\n', "line 2"),
        ("number.jsonl", b'{"text": 3}\n', "no string"),
        ("ids.jsonl", b'{"input_ids": [1, 2]}\n', "fewer than --seqlen"),
        ("float.jsonl", b'{"input_ids": [1.5]}\n', "whole numbers"),
        ("vocab.jsonl", json.dumps({"input_ids": [300] * 16}).encode(), "vocabulary"),
        ("negative.jsonl", json.dumps({"input_ids": [-1] * 16}).encode(), "vocabulary"),
        ("deep.jsonl", b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_data_is_refused_in_one_line(tokenizer, tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        load(tmp_path / name, tokenizer)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["missing.txt", "."])
def test_paths_that_are_no_file(tokenizer, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalibrationError):
        load(source, tokenizer)


def test_nothing_asked_for(tokenizer):
    with pytest.raises(CalibrationError):
        load("builtin", tokenizer, samples=0)


def test_a_dataset_id_is_streamed(tokenizer, tmp_path):
    """A folder that the `datasets` package reads; a hub id differs only in where the rows come from."""
    pytest.importorskip("datasets")
    rows = [{"text": "".join(chr(32 + (i * 7 + j) % 90) for i in range(60))} for j in range(20)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "data" / "test.jsonl").write_text(json.dumps({"text": "x" * 400}))
    found = load(str(tmp_path / "data"), tokenizer, samples=8)
    assert found.ids.shape == (8, 16)
    other = load(f"{tmp_path / 'data'}::test", tokenizer, samples=4)
    assert other.ids.unique().tolist() == [ord("x")] or len(other.ids.unique()) == 1
    with pytest.raises(CalibrationError, match="nosuchsplit"):
        load(f"{tmp_path / 'data'}::nosuchsplit", tokenizer)


def test_a_dataset_id_without_the_package_says_what_to_do(tokenizer, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="needs the datasets package") as caught:
        load("somebody/some-corpus", tokenizer)
    assert "pip install datasets" in str(caught.value.hint)
