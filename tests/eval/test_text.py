"""Where evaluation text comes from, and what is said when it does not come."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import CalibrationError, UsageError
from quantkit.eval.text import BUILTIN_TOKENS, load_text


@pytest.fixture(scope="module")
def tokenizer(tiny: Callable[..., Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny("llama"))  # one token per byte, no BOS


def test_builtin(tokenizer: Any) -> None:
    found = load_text("builtin", tokenizer, 500)
    assert found.ids.shape == (500,) and found.bos_token_id is None
    assert found.source.startswith("builtin")
    assert len(load_text("builtin", tokenizer).ids) == BUILTIN_TOKENS
    longer = load_text("builtin", tokenizer, 900)
    assert longer.ids[:500].equal(found.ids)


def test_text_file_and_limit(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("\ufeffäöü " + "words and " * 2000, encoding="utf-8")
    whole = load_text(path, tokenizer)
    assert len(whole.ids) == 7 + 20000  # three two-byte letters, no byte order mark
    for limit in (2, 100, 19999, 50000):
        assert load_text(str(path), tokenizer, limit).ids.equal(whole.ids[:limit])


def test_long_tokens_make_it_read_on(tmp_path: Path) -> None:
    class Words:
        bos_token_id = 9

        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
            ids = [len(w) % 7 for w in text.split()]
            return {"input_ids": [9, *ids, 8] if add_special_tokens else ids}

        eos_token_id = 8

        def decode(self, ids: list[int], **_: Any) -> str:
            return " ".join("x" * i for i in ids)

    path = tmp_path / "long.txt"
    path.write_text(("x" * 99 + " ") * 300)
    found = load_text(path, Words(), 200)
    assert len(found.ids) == 200 and found.bos_token_id == 9
    assert found.ids[0] == 9 and 8 not in found.ids  # a BOS, never an EOS


def test_jsonl(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two", "id": 3}) + "\n")
    assert tokenizer.decode(load_text(path, tokenizer).ids) == "one\n\ntwo"
    for line, match in (
        ("{", "line 1: not JSON"),
        ('{"t": 1}', 'no "text"'),
        ('{"text": 3}', 'no "text"'),
        ("[]", "no"),
    ):
        path.write_text(line)
        with pytest.raises(CalibrationError, match=match):
            load_text(path, tokenizer)
    path.write_text("[" * 100_000)
    with pytest.raises(CalibrationError, match="not JSON"):
        load_text(path, tokenizer)


def test_files_that_will_not_do(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"caf\xe9 " * 10)
    with pytest.raises(CalibrationError, match="not UTF-8"):
        load_text(path, tokenizer)
    path.write_text(" \n\t ")
    with pytest.raises(CalibrationError, match="is empty"):
        load_text(path, tokenizer)
    path.write_text("a")
    with pytest.raises(CalibrationError, match="1 tokens"):
        load_text(path, tokenizer)
    with pytest.raises(UsageError, match="does not exist"):
        load_text(tmp_path / "none.txt", tokenizer)
    with pytest.raises(UsageError, match="is a directory"):
        load_text(tmp_path, tokenizer)
    with pytest.raises(UsageError, match="Did you mean 'builtin'"):
        load_text("buildin", tokenizer)
    with pytest.raises(UsageError, match="at least 2"):
        load_text("builtin", tokenizer, 1)


def test_wikitext2(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Fake:
        @staticmethod
        def load_dataset(*args: Any, **kwargs: Any) -> dict[str, list[str]]:
            asked.append((args, kwargs))
            return {"text": ["", " = Title = \n", "Body ."]}

    monkeypatch.setitem(sys.modules, "datasets", Fake)
    assert tokenizer.decode(load_text("wikitext-2", tokenizer).ids) == "\n\n = Title = \n\n\nBody ."
    assert asked[0][0][1] == "wikitext-2-raw-v1" and asked[0][1] == {"split": "test"}
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="datasets package"):
        load_text("wikitext2", tokenizer)
