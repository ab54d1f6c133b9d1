"""The journal of a conversion: append-only JSON lines, each durable before the next step, none trusted blindly.

    {"type": "unit",   "unit": id, "piece": file, "sha256": hex, "size": bytes, "tensors": {name: [dtype, shape]},
                       "report": any}
    {"type": "shard",  "file": name, "sha256": hex, "size": bytes}
    {"type": "commit", "device": number, "inode": number, "manifest": hex}

Every line ends in a `"check"`: a hash of the line and of the check before it. So a line that was cut off,
changed, removed or moved ends what is believed, and the work after it is done again. The check is no
signature: somebody who may write here may forge one, which is why records are also checked for their form
here, and against the files that they describe where they are used.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import DestinationError
from quantkit.shards import DTYPES
from quantkit.staging import fsync_dir
from quantkit.untrusted import is_plain_name, show

Record = dict[str, Any]
#: A longer journal is none: a unit's line has some hundred bytes for each of its tensors.
_MAX_BYTES = 1 << 30


def check_of(body: Mapping[str, Any], before: str) -> str:
    """The check of a record (without its own) that follows the check `before` ("" for the first)."""
    text = json.dumps(body, sort_keys=True)
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()[:16]


def parse_line(line: bytes, before: str) -> tuple[Record, str] | None:
    """(record, check) of a journal line; None when it is torn, altered or no record."""
    if not line.endswith(b"\n"):  # cut off by a crash: its work is not known to be finished
        return None
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            return None
        check = record.pop("check", None)
        if check != check_of(record, before):
            return None
    except (ValueError, RecursionError):  # UnicodeError is a ValueError
        return None
    return record, check


def is_sound(record: Record) -> bool:
    """Whether a record has the form that its type has (see the module's docstring)."""
    kind = record.get("type")
    if kind == "unit":
        tensors = record.get("tensors")
        return (
            isinstance(record.get("unit"), str)
            and is_plain_name(record.get("piece"))
            and _has_hash(record, "sha256")
            and "report" in record
            and isinstance(tensors, dict)
            and all(_is_layout(layout) for layout in tensors.values())
        )
    if kind == "shard":
        return is_plain_name(record.get("file")) and _has_hash(record, "sha256")
    if kind == "commit":
        numbers = (record.get("device"), record.get("inode"))
        return all(type(number) is int for number in numbers) and isinstance(record.get("manifest"), str)
    return False


def _has_hash(record: Record, key: str) -> bool:
    size = record.get("size")
    return isinstance(record.get(key), str) and type(size) is int and size >= 0


def _is_layout(layout: Any) -> bool:
    return (
        isinstance(layout, list)
        and len(layout) == 2
        and layout[0] in tuple(DTYPES)
        and isinstance(layout[1], list)
        and len(layout[1]) <= 16
        and all(type(extent) is int and 0 <= extent < 1 << 48 for extent in layout[1])
    )


class Journal:
    """Append-only JSON lines, each durable before `append` returns.

    On opening, `records` are those up to the first line that is damaged or not `valid`.
    DestinationError when something else than a regular file has the journal's name: in a directory that
    others may write to, a link could lead anywhere.
    """

    def __init__(self, path: Path, valid: Callable[[Record], bool] = lambda record: True) -> None:
        self._path = path
        self.records: list[Record] = []
        self._ends = [0]  # where each record ends
        self._checks = [""]
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._fd = os.open(path, flags, 0o666)
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
                raise DestinationError(
                    f"{show(path)} is no journal of a conversion", hint="Remove it and start again."
                )
            self._load(valid)
            fsync_dir(path.parent)
        except BaseException:
            self.close()
            raise

    def _load(self, valid: Callable[[Record], bool]) -> None:
        with open(self._fd, "rb", closefd=False) as file:
            for line in file:
                parsed = parse_line(line, self._checks[-1])
                if parsed is None or not valid(parsed[0]):
                    break
                self.records.append(parsed[0])
                self._checks.append(parsed[1])
                self._ends.append(self._ends[-1] + len(line))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; on return it survives a crash."""
        body = json.loads(json.dumps(record))
        check = check_of(body, self._checks[-1])
        line = json.dumps({**body, "check": check}).encode() + b"\n"
        os.ftruncate(self._fd, self._ends[-1])  # whatever a failed append or a crash left behind
        written = 0
        while written < len(line):
            written += os.pwrite(self._fd, line[written:], self._ends[-1] + written)
        os.fsync(self._fd)
        self._ends.append(self._ends[-1] + len(line))
        self._checks.append(check)
        self.records.append(body)

    def keep(self, count: int) -> None:
        """Forget all but the first `count` records."""
        del self.records[count:], self._ends[count + 1 :], self._checks[count + 1 :]
        os.ftruncate(self._fd, self._ends[-1])
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
