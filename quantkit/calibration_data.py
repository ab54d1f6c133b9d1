"""Calibration data: text of any of the usual kinds -> token ids `[samples, seqlen]`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import CalibrationError

#: Characters read per token wanted: enough for any tokenizer, and a bound on memory.
_CHARS_PER_TOKEN = 12
#: Longest text file, and how much of its first row is looked at to tell text from token ids.
_MAX_BYTES, _FIRST_ROW = 1 << 30, 1 << 20


@dataclass(frozen=True)
class CalibrationData:
    """`ids` is int64 `[samples, seqlen]`, without padding; `source` says where it came from."""

    ids: Tensor
    source: str
    seed: int

    def fingerprint(self) -> str:
        """sha256 of the ids: equal data, equal fingerprint."""
        return hashlib.sha256(self.ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """For reports and model cards."""
        samples, seqlen = self.ids.shape
        return {
            "source": self.source,
            "samples": int(samples),
            "seqlen": int(seqlen),
            "tokens": int(samples * seqlen),
            "seed": self.seed,
            "fingerprint": self.fingerprint(),
        }


def load_calibration(
    source: str | Path | Tensor, tokenizer: Any, *, samples: int, seqlen: int, seed: int, vocab_size: int
) -> CalibrationData:
    """Read `source`, tokenize, join all documents and cut them into chunks of `seqlen` tokens.

    `source`: "builtin" (text that every Python installation has), a text file, a jsonl file with
    `{"text": ...}` or `{"input_ids": [...]}` rows, a dataset id ("name", "name:config:split"; needs the
    `datasets` package), or a tensor of ids. `samples` chunks are drawn with `seed` without
    replacement; rows of ids are taken as they are, in order.

    CalibrationError when it is missing, empty, too short for a single chunk, or does not fit the
    model's vocabulary.
    """
    if samples < 1 or seqlen < 2:
        raise CalibrationError(
            f"{samples} samples of {seqlen} tokens are no calibration", hint="Ask for more."
        )
    if isinstance(source, Tensor):
        return _checked(source.to(torch.int64)[:samples, :seqlen], "token ids", seed, vocab_size)
    name = str(source)
    if name == "builtin":
        from quantkit.builtin_text import text

        texts: Iterator[str] = iter([text("calibration", max_chars=samples * seqlen * _CHARS_PER_TOKEN)])
        label = "builtin (documentation and sources of Python's standard library)"
    else:
        path = Path(name).expanduser()
        label = name
        check_size(path)
        if path.suffix == ".jsonl" and path.is_file():
            rows = list(_jsonl(path))
            if rows and "input_ids" in rows[0]:
                return _checked(_id_rows(path, rows, samples, seqlen), name, seed, vocab_size)
            texts = iter([_row_text(path, i, row) for i, row in enumerate(rows, 1)])
        elif path.is_file():
            texts = iter([_read_text(path)])
        elif path.exists() and not path.is_dir():  # a folder may be a dataset
            raise CalibrationError(f"{path} is not a file", hint="Give a text or jsonl file.")
        elif path.suffix in (".txt", ".jsonl", ".json", ".md"):
            raise CalibrationError(
                f"calibration file {path} does not exist", hint="Check the path, or use 'builtin'."
            )
        else:
            texts = _dataset(name)
    need = samples * seqlen
    pieces: list[Tensor] = []
    have = 0
    for one in texts:
        if not one.strip():
            continue
        ids = torch.tensor(
            tokenizer(one, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64
        )
        pieces.append(ids)
        have += len(ids)
        if have >= 4 * need:
            break
    if not pieces:
        raise CalibrationError(
            f"calibration data {name} is empty", hint="Give a file with text, or use 'builtin'."
        )
    stream = torch.cat(pieces)
    chunks = len(stream) // seqlen
    if chunks < 1:
        raise CalibrationError(
            f"calibration data {name} has {len(stream)} tokens, fewer than one sample of {seqlen}",
            hint="Give more text or a smaller --seqlen.",
        )
    all_chunks = stream[: chunks * seqlen].view(chunks, seqlen)
    order = torch.randperm(chunks, generator=torch.Generator().manual_seed(seed))[:samples]
    return _checked(all_chunks[order], label, seed, vocab_size)


def check_size(path: Path) -> None:
    """CalibrationError for a text file that is too long to be read whole."""
    if path.is_file() and path.stat().st_size > _MAX_BYTES:
        raise CalibrationError(
            f"{path} has {path.stat().st_size} bytes, too many for a text to measure or calibrate with",
            hint=f"At most {_MAX_BYTES} are read; a sample of it does.",
        )


def holds_text(path: Path) -> bool:
    """Whether the first row of a jsonl file needs a tokenizer."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return True
        with path.open(encoding="utf-8", errors="replace") as file:
            return '"input_ids"' not in file.readline(_FIRST_ROW)
    except OSError:
        return True


def _checked(ids: Tensor, source: str, seed: int, vocab_size: int) -> CalibrationData:
    if ids.dim() != 2 or ids.numel() == 0:
        raise CalibrationError(
            f"calibration ids of {source} have shape {list(ids.shape)}", hint="Expected [samples, seqlen]."
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise CalibrationError(
            f"calibration data {source} has token id {low if low < 0 else high}, the model's vocabulary {vocab_size}",
            hint="The tokenizer does not belong to this model.",
        )
    return CalibrationData(ids.contiguous(), source, seed)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start})", hint="Convert it to UTF-8."
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path}: {error.strerror}", hint="Check the file.") from None


def json_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """(line number, parsed value) of the lines of jsonl `text` that came from `path`; blank ones are skipped."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise CalibrationError(
                f"{path}, line {number}: not JSON", hint="Each line must be one JSON object."
            ) from None
        yield number, row


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    for number, row in json_rows(path, _read_text(path)):
        if not isinstance(row, dict) or not ({"text", "input_ids", "messages"} & row.keys()):
            raise CalibrationError(
                f'{path}, line {number}: no "text" or "input_ids"', hint="Add one of them."
            )
        yield row


def _row_text(path: Path, number: int, row: dict[str, Any]) -> str:
    value = row.get("text")
    if value is None and isinstance(row.get("messages"), list):
        value = "\n".join(str(m.get("content", "")) for m in row["messages"] if isinstance(m, dict))
    if not isinstance(value, str):
        raise CalibrationError(f'{path}, row {number}: "text" is no string', hint="Correct the file.")
    return value


def _id_rows(path: Path, rows: list[dict[str, Any]], samples: int, seqlen: int) -> Tensor:
    out = []
    for number, row in enumerate(rows[:samples], 1):
        ids = row.get("input_ids")
        if not isinstance(ids, list) or not all(type(i) is int and abs(i) < 1 << 62 for i in ids):
            raise CalibrationError(
                f'{path}, row {number}: "input_ids" is no list of whole numbers', hint="Correct it."
            )
        if len(ids) < seqlen:
            raise CalibrationError(
                f"{path}, row {number}: {len(ids)} token ids, fewer than --seqlen {seqlen}",
                hint="Give a smaller --seqlen.",
            )
        out.append(ids[:seqlen])
    return torch.tensor(out, dtype=torch.int64)


def _dataset(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise CalibrationError(
            f"{name!r} is no file, and reading a dataset id needs the datasets package",
            hint="pip install datasets, give a text file, or use 'builtin'.",
        ) from None
    parts = name.split(":")
    repo, config, split = (
        parts[0],
        parts[1] if len(parts) > 1 and parts[1] else None,
        parts[2] if len(parts) > 2 else "train",
    )
    try:
        rows = load_dataset(repo, config, split=split, streaming=True)
        for row in rows:
            if isinstance(row.get("text"), str):
                yield row["text"]
    except Exception as error:
        raise CalibrationError(
            f"dataset {name!r}: {error}", hint="Check the id, or use 'builtin'."
        ) from error
