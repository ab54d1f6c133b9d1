"""Text to evaluate on: "builtin", "wikitext2", "c4", a file or a dataset id -> token ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calibration_data import check_size, json_rows
from quantkit.errors import CalibrationError, CheckpointError, UsageError, did_you_mean

BUILTIN_TOKENS = 16384  # evaluated on the built-in text unless more are asked for
_C4 = {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "split": "validation"}
_C4_TOKENS = 256 * 2048  # what GPTQ's script takes of it
_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]*){0,2}", re.ASCII)
_CHARS_PER_TOKEN = 8  # first guess of how much text makes a token


@dataclass(frozen=True)
class EvalText:
    """`ids` int64 `[T]`, with one BOS at the start where the tokenizer adds one; `source` names the text."""

    ids: Tensor
    source: str
    bos_token_id: int | None  # None when the tokenizer adds none
    prefix_token_id: int | None = None  # BOS, else EOS: what lm-eval puts before a text
    words: int = 0  # separated by white space, as lm-eval counts them
    utf8_bytes: int = 0


def load_text(source: str | Path, tokenizer: Any, tokens: int | None = None) -> EvalText:
    """Read and tokenize a text; at most `tokens` tokens (None: 16384 of "builtin", all of the others).

    `source`: "builtin" (documentation and sources of Python's standard library, the split that neither
    the example models' training nor calibration uses), "wikitext2" (the raw test split; needs the
    `datasets` package), "c4" (the first validation file, as GPTQ reads it), a .txt or .jsonl file
    ({"text": ...} rows, joined by blank lines), or a dataset id "owner/name[:config[:split]]".
    UsageError for an unknown source; CalibrationError when the text is empty or not UTF-8.
    """
    if tokens is not None and tokens < 2:
        raise UsageError(f"{tokens} tokens are no text", hint="Ask for at least 2.")
    read, label, default = _reader(str(source))
    tokens = tokens if tokens is not None else default
    budget = tokens * _CHARS_PER_TOKEN if tokens is not None else None
    while True:
        text = read(budget)
        if not text.strip():
            raise CalibrationError(f"{label} is empty", hint="Give a file with text, or use 'builtin'.")
        found = _encode(text, tokenizer, label)
        enough = tokens is None or budget is None or len(found.ids) > tokens or len(text) < budget
        if enough:
            return _cut(found, text, tokens, tokenizer)
        budget = 2 * (budget or 0)


def texts_of(
    data: str | Path,
    tokens: int | None,
    base: str,
    paths: Sequence[str],
    compared: bool,
    trust_remote_code: bool = False,
) -> tuple[dict[str, EvalText], list[str]]:
    """(the text as the own tokenizer of `base` and of each of `paths` reads it, one object where they agree;
    warnings). UsageError where they do not and predictions are to be `compared`."""
    from quantkit.load import load_tokenizer

    own = load_text(data, load_tokenizer(base, trust_remote_code=trust_remote_code), tokens)
    texts, warnings = {base: own}, []
    for path in paths:
        if path in texts:
            continue
        texts[path] = own
        try:
            tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        except CheckpointError:
            warnings.append(f"{path} has no tokenizer: using that of {base}")
            continue
        other = load_text(data, tokenizer, tokens)
        if not torch.equal(other.ids, own.ids):
            if compared:
                raise UsageError(
                    f"{path} and {base} tokenize the text differently, so their predictions do not compare",
                    hint="Leave the reference out, or name the model it was made from.",
                )
            texts[path] = other
            warnings.append(
                f"{path} tokenizes the text differently from {base}: their perplexities are not comparable"
            )
    return texts, warnings


def _cut(found: EvalText, text: str, tokens: int | None, tokenizer: Any) -> EvalText:
    """At most `tokens` tokens, with the words and bytes of the text that they spell."""
    ids = found.ids[:tokens]
    if len(ids) < len(found.ids):
        text = tokenizer.decode(
            ids[found.bos_token_id is not None :].tolist(), clean_up_tokenization_spaces=False
        )
    return EvalText(
        ids,
        found.source,
        found.bos_token_id,
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id,
        len(re.split(r"\s+", text)),
        len(text.encode("utf-8", "replace")),
    )


def _reader(source: str) -> tuple[Callable[[int | None], str], str, int | None]:
    """(function that returns at most so many characters, name for reports, default number of tokens)."""
    if source == "builtin":
        return (
            _builtin,
            "builtin (evaluation split of Python's own documentation and sources)",
            BUILTIN_TOKENS,
        )
    path = Path(source).expanduser()
    if source.lower().replace("-", "").replace("_", "") == "wikitext2" and not path.exists():
        return _wikitext2, "wikitext2 (raw, test split)", None
    if source.lower() == "c4" and not path.exists():
        return (
            lambda limit: _dataset("allenai/c4", limit, **_C4),
            "c4 (en, first validation file)",
            _C4_TOKENS,
        )
    if not path.exists():
        if _DATASET_ID.fullmatch(source):
            repo, config, split = (*source.split(":"), "", "")[:3]
            return (
                lambda limit: _dataset(repo, limit, name=config or None, split=split or "test"),
                source,
                BUILTIN_TOKENS,
            )
        hint = did_you_mean(source, ["builtin", "wikitext2", "c4"])
        raise UsageError(
            f"evaluation text {source!r} does not exist",
            hint=f"{hint} Or give a .txt or .jsonl file, or a dataset id (owner/name:config:split).",
        )
    if path.is_dir():
        raise UsageError(f"evaluation text {source!r} is a directory", hint="Give a .txt or .jsonl file.")
    if not path.is_file():  # a pipe would be waited for
        raise UsageError(f"evaluation text {source!r} is no file", hint="Give a .txt or .jsonl file.")
    check_size(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return lambda limit: _jsonl(path, limit), path.name, None
    return lambda limit: _plain(path, limit), path.name, None


def _encode(text: str, tokenizer: Any, label: str) -> EvalText:
    """All ids of `text`, after one BOS where the tokenizer puts one; never an EOS."""
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is not None and list(tokenizer("a", verbose=False)["input_ids"])[:1] != [bos]:
        bos = None
    if bos is not None:
        ids.insert(0, bos)
    if len(ids) < 2:
        raise CalibrationError(f"{label} gives {len(ids)} tokens", hint="Give a longer text.")
    return EvalText(torch.tensor(ids, dtype=torch.int64), label, bos)


def _builtin(limit: int | None) -> str:
    from quantkit.builtin_text import BuiltinTextError, text

    try:
        return text("eval", max_chars=limit)
    except BuiltinTextError as error:
        raise CalibrationError(f"builtin text: {error}", hint="Give a text file.") from error


def _wikitext2(limit: int | None) -> str:
    rows = _load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
    return "\n\n".join(rows)[:limit]


def _dataset(repo: str, limit: int | None, **which: Any) -> str:
    """Texts of a hub dataset, joined by blank lines, until there are `limit` characters."""
    texts: list[str] = []
    size = 0
    rows = iter(_load_dataset(repo, streaming=True, **which))
    while limit is None or size <= limit:
        try:
            row = next(rows, None)
        except Exception as error:  # streaming meets the network here
            raise _unreadable(repo, error) from error
        if row is None:
            break
        value = row.get("text")
        if not isinstance(value, str):
            raise CalibrationError(f'dataset {repo}: rows have no "text"', hint="Give another dataset.")
        texts.append(value)
        size += len(value) + 2
    return "\n\n".join(texts)[:limit]


def _load_dataset(repo: str, *args: Any, **kwargs: Any) -> Any:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise UsageError(
            f"{repo} is read with the datasets package, which is not installed",
            hint="pip install datasets, give a text file, or use 'builtin'.",
        ) from None
    try:
        return load_dataset(repo, *args, **kwargs)
    except Exception as error:
        raise _unreadable(repo, error) from error


def _unreadable(repo: str, error: Exception) -> CalibrationError:
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return CalibrationError(f"dataset {repo}: {first}", hint="Give a text file, or use 'builtin'.")


def _plain(path: Path, limit: int | None) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(-1 if limit is None else limit)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text ({error.reason})", hint="Convert it to UTF-8."
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path}: {error.strerror}", hint="Check the file.") from None


def _jsonl(path: Path, limit: int | None) -> str:
    texts: list[str] = []
    size = 0
    for number, row in json_rows(path, _plain(path, None)):
        value = row.get("text") if isinstance(row, dict) else None
        if not isinstance(value, str):
            raise CalibrationError(f'{path}, line {number}: no "text"', hint='Rows must be {"text": "..."}.')
        texts.append(value)
        size += len(value) + 2
        if limit is not None and size > limit:
            break
    return "\n\n".join(texts)[:limit]
