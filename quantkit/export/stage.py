"""Publishing an export: a staging directory beside the destination, then one rename.

The rules are those of `quantkit.publish` for checkpoints (`quantkit.staging.new_directory` keeps them): one
writer at a time, nothing at the destination until everything (the proof included) is done and durable, an
existing directory only with `overwrite`, and then only one that is an export, swapped atomically. The
manifest MANIFEST marks a directory as an export, says how it was made, and has the sha256 of its files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantkit.checkpoint import EXPORT_MANIFEST as MANIFEST
from quantkit.errors import DestinationError
from quantkit.manifest import sealed
from quantkit.shards import sha256_file
from quantkit.staging import new_directory
from quantkit.untrusted import is_plain_name, show

__all__ = ["MANIFEST", "check_destination", "staged"]


def check_destination(dest: Path, *, overwrite: bool, source: Path) -> None:
    """DestinationError, before any work, where an export could not be published."""
    if not is_plain_name(dest.name.lstrip(".")):
        raise DestinationError(f"{show(dest)} is not a name for a new directory")
    if dest.exists() and not dest.is_dir():
        raise DestinationError(f"{show(dest)} is a file", hint="Choose the name of a new directory.")
    if source.resolve().is_relative_to(dest):
        raise DestinationError(
            f"{show(dest)} holds the checkpoint being read", hint="Choose another destination."
        )
    if dest.exists() and not overwrite:
        raise DestinationError(f"{show(dest)} exists", hint="Use --overwrite or another name.")
    if dest.is_dir() and os.listdir(dest) and not (dest / MANIFEST).is_file():
        raise DestinationError(
            f"{show(dest)} is not an export, so it is not overwritten",
            hint="Remove it yourself, or choose another destination.",
        )


@contextmanager
def staged(
    output: str | os.PathLike[str], *, overwrite: bool, source: Path, need_bytes: int
) -> Iterator[Path]:
    """A directory to write into; on a clean exit it becomes `output`, on an error it goes."""
    dest = Path(os.path.realpath(Path(output).expanduser()))
    with new_directory(
        dest,
        lambda: check_destination(dest, overwrite=overwrite, source=source),
        kind="export",
        need_bytes=need_bytes,
        finish=_seal,
    ) as folder:
        yield folder


def _seal(folder: Path) -> None:
    """Add the hashes of all files to the manifest, for `quantkit verify`."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    manifest["files"] = {
        str(file.relative_to(folder)): {"sha256": sha256_file(file), "size": file.stat().st_size}
        for file in files
    }
    (folder / MANIFEST).write_bytes(sealed(manifest))
