"""Checks for files that strangers wrote: what may be opened, and how much of it may be parsed.

A model directory comes from the internet. Nothing here trusts a name, a link, a length or a nesting
depth in it; every refusal is a `CheckpointError` that names the file.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError

#: Longest JSON file that is parsed. The index of a model with half a million tensors has about 60 MB.
MAX_JSON_BYTES = 256 << 20
#: Longest JSON file besides an index (Gemma's tokenizer.json has 33 MB), and longest file of any other kind
#: that is not weights. What is longer is no tokenizer, template or licence, and would only fill memory.
MAX_SIDE_JSON_BYTES = 64 << 20
MAX_SIDE_BYTES = 1 << 30
#: Real configurations nest about six levels; a bomb nests thousands and would blow the stack later,
#: in whatever walks the dictionary.
MAX_JSON_DEPTH = 64


def show(name: object, limit: int = 160) -> str:
    """`name` made safe to print on one line: no control characters, no surrogates, not endless."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(name))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def is_plain_name(name: object) -> bool:
    """Whether `name` is a visible file name without any path in it, printable and encodable."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and not name.startswith(".")
        and not any(c in name for c in "/\\\0")
        and name.isprintable()
    )


def existing_directory(path: str | os.PathLike[str]) -> Path:
    """`path` without links, if it is a directory; else a CheckpointError that says what it is."""
    given = Path(path)
    try:
        if given.is_dir():
            return given.resolve()
        what = "is a file" if given.exists() else "does not exist"
    except (OSError, ValueError) as error:  # too long a name, a NUL in it, a directory that is closed to us
        what = f"cannot be opened ({show(error)})"
    raise CheckpointError(f"{show(given)} {what}", hint="Give the directory that holds the model.")


def _in_hub_cache(target: Path, root: Path) -> bool:
    """Whether a symlink in `root` points to where huggingface_hub keeps the content of its files.

    A cached model is `models--org--name/snapshots/<commit>/file -> ../../blobs/<hash>`.
    """
    if target.parent.name != "blobs":
        return False
    if root.parent.name == "snapshots" and target.parent.parent == root.parent.parent:
        return True
    from huggingface_hub import constants  # slow to import, and needed for odd links only

    return target.is_relative_to(Path(constants.HF_HUB_CACHE).resolve())


def plain_file(path: Path, root: Path) -> os.stat_result:
    """The stat of a regular file that really lies in `root` (resolved) or in the hub's cache."""
    try:
        if path.is_symlink() or path.parent != root:
            target = path.resolve(strict=True)
            if not (target.is_relative_to(root) or _in_hub_cache(target, root)):
                raise CheckpointError(
                    f"{show(path)} is a symbolic link out of the model directory (to {show(target)})",
                    hint="Copy the file into the directory if you trust it.",
                )
        status = path.stat()
    except FileNotFoundError:
        kind = "is a dangling symbolic link" if path.is_symlink() else "is missing"
        raise CheckpointError(f"{show(path)} {kind}", hint="Download or copy the model again.") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise CheckpointError(f"{show(path)} cannot be opened: {show(error)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{show(path)} is not a regular file")
    return status


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {show(twice)!r} appears twice")
    return result


def _refuse_nan(name: str) -> float:
    if name == "NaN":  # Infinity is no JSON either, but configurations of real models have it
        raise ValueError("NaN is no number")
    return float(name)


def parse_json(data: bytes, where: object) -> Any:
    """Parse JSON from a stranger: UTF-8, no repeated keys, no NaN, no absurd depth or size."""
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_nan)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair could not be written again
    except UnicodeEncodeError:
        raise CheckpointError(f"{show(where)} holds text that is not valid Unicode") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{show(where)} is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise CheckpointError(f"{show(where)} is nested too deeply to be a model's JSON") from None
    except ValueError as error:
        raise CheckpointError(f"{show(where)} is not valid JSON: {show(error)}") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise CheckpointError(f"{show(where)} is nested too deeply to be a model's JSON")
        nested = [v for v in level if isinstance(v, dict | list)]
        level = [c for v in nested for c in (v.values() if isinstance(v, dict) else v)]
    return value


def side_file(path: Path, root: Path) -> os.stat_result:
    """`plain_file`, and no longer than a tokenizer, template or licence can be."""
    status = plain_file(path, root)
    limit = MAX_SIDE_JSON_BYTES if path.suffix.lower() == ".json" else MAX_SIDE_BYTES
    if status.st_size > limit:
        raise CheckpointError(
            f"{show(path)} has {status.st_size} bytes, too many for a file beside the weights",
            hint=f"At most {limit} are accepted; remove it if it is not needed.",
        )
    return status


def read_json(path: Path, root: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Parse the JSON file `path` of the model directory `root`, of at most `limit` bytes."""
    size = plain_file(path, root).st_size
    if size > limit:
        raise CheckpointError(f"{show(path)} has {size} bytes, too many for a model's JSON")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{show(path)} cannot be read: {show(error.strerror)}") from None
    return parse_json(data, path)
