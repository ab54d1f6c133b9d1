"""Publishing an export: a staging directory beside the destination, then one rename.

The rules are those of `quantkit.publish` for checkpoints: one writer at a time, nothing at the destination
until everything (the proof included) is done, an existing directory only with `overwrite`, and then only one
that is an export, swapped atomically.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantkit.errors import DestinationError
from quantkit.staging import (
    Lock,
    aside_path,
    disk_errors,
    disk_full,
    fsync_dir,
    remove,
    replace_directory,
    restore_aside,
)
from quantkit.untrusted import is_plain_name, show

#: The file that marks a directory as an export and says how it was made.
MANIFEST = "quantkit_export.json"


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
    check_destination(dest, overwrite=overwrite, source=source)
    staging = dest.with_name(f".{dest.name}.quantkit-export")
    with disk_errors(dest, need_bytes):
        dest.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(dest.with_name(f".{dest.name}.quantkit.lock"), dest)
        try:
            restore_aside(dest)
            check_destination(dest, overwrite=overwrite, source=source)  # again, now that nobody else writes
            remove(staging)  # what a killed export left
            free = shutil.disk_usage(dest.parent).free
            if need_bytes > free:
                raise disk_full(dest, f": about {need_bytes} bytes needed, {free} free")
            staging.mkdir()
            yield staging
            for file in staging.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            fsync_dir(staging)
            replace_directory(staging, dest)
            remove(aside_path(dest))
        finally:
            if staging.exists():
                remove(staging)
            lock.release()
