"""Manifests: the sha256 of every file that was written and of every file that was read, and of itself.

A manifest's last key holds the sha256 of the manifest's own bytes, computed with that hash as zeros: so a
flipped bit is found in the manifest too, be it in a figure or in white space. It protects against damage,
not against somebody who computes the hash anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError
from quantkit.untrusted import show

Record = dict[str, Any]
_OWN = "manifest_sha256"
_OWN_LINE = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"\n}\n\Z')
_ZEROS = b"0" * 64
_PIECE = 1 << 20


def json_bytes(value: Any) -> bytes:
    """JSON as it is written to checkpoints."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def file_record(data: bytes) -> Record:
    """A file's entry in a manifest."""
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest, its own hash added."""
    data = json_bytes({**{k: v for k, v in manifest.items() if k != _OWN}, _OWN: _ZEROS.decode()})
    end = len(data) - len(b'"\n}\n')
    return data[: end - 64] + hashlib.sha256(data).hexdigest().encode() + data[end:]


def is_sealed(data: bytes) -> bool:
    """Whether a manifest's bytes are those that were hashed; False as well where it has no hash of itself."""
    found = _OWN_LINE.search(data)
    if not found:
        return False
    return (
        hashlib.sha256(data[: found.start(1)] + _ZEROS + data[found.end(1) :]).hexdigest().encode()
        == found[1]
    )


class InputHashes:
    """sha256 of files, computed in a thread while a conversion reads the same files (hashlib lets others run).

    A context manager: leaving it ends the thread, also in the middle of a file.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        self._records: dict[str, Record] = {}
        self._error: CheckpointError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="input-hashes", daemon=True)

    def records(self) -> dict[str, Record]:
        """name -> {"sha256", "size"} of all files; waits for them. CheckpointError when one is gone."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return dict(self._records)

    def __enter__(self) -> InputHashes:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        for name, path in self._files.items():
            try:
                record = self._hash(path)
            except OSError as error:
                self._error = CheckpointError(f"{show(path)} cannot be read: {show(error.strerror)}")
                return
            if record is None:
                return
            self._records[name] = record

    def _hash(self, path: Path) -> Record | None:
        digest, buffer = hashlib.sha256(), bytearray(_PIECE)
        with path.open("rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            while count := file.readinto(buffer):
                if self._stop.is_set():
                    return None
                digest.update(memoryview(buffer)[:count])
            after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            self._error = CheckpointError(
                f"{show(path)} changed while it was being read", hint="Start again."
            )
            return None
        return {"sha256": digest.hexdigest(), "size": after.st_size}
