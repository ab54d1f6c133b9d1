"""What makes a publication crash-proof: the lock, durable renames, the exchange of directories.

Exports and reports use `new_directory`; checkpoints have a writer of their own, which can resume
(quantkit/publish.py). For a destination `parent/model` two siblings exist while a conversion is under way:

    parent/.model.quantkit.lock        flock(2)ed by the one writer
    parent/.model.quantkit-staging/
        state.json                     what this work is: fingerprint, version, shard size
        journal.jsonl                  one line per thing that is durable (quantkit/journal.py)
        pieces/00000.safetensors       the tensors of unit 0, ...
        files/                         config.json, tokenizer, ... as they will be published
        scratch/                       the converter's own notes (activations)
        out/                           the directory that will be renamed to the destination
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from quantkit.errors import DestinationError
from quantkit.untrusted import show

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fsync_dir(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(fd)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves either the old content or the new."""
    copy_durably(io.BytesIO(data), path)


def copy_durably(source: BinaryIO, path: Path) -> None:
    """The same with the content of an open file, a piece at a time."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:  # never through a link that somebody put there
        shutil.copyfileobj(source, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_dir(path.parent)


def remove(path: Path) -> None:
    """Remove a file, link or tree, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(dest: Path, needed: int | None = None) -> Iterator[None]:
    """Turn the operating system's refusals into one line about the destination."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(dest.parent).free
                sizes = f": {needed} bytes needed, {free} free" if needed else f": {free} bytes free"
                raise disk_full(dest, sizes) from error
            raise disk_full(dest, "") from error
        where = f" ({show(error.filename)})" if error.filename else ""
        raise DestinationError(
            f"Cannot write {show(dest)}: {show(error.strerror or error)}{where}",
            hint="Nothing at the destination was changed.",
        ) from error


def disk_full(dest: Path, sizes: str) -> DestinationError:
    """The error for a full disk or quota."""
    return DestinationError(
        f"The disk is full while writing {show(dest)}{sizes}",
        hint="Nothing at the destination was changed; free space, then resume or start again.",
    )


class Lock:
    """An exclusive lock that dies with its process; the file is removed on release."""

    def __init__(self, path: Path, dest: Path) -> None:
        self._path = path
        while True:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(self._fd, 20, 0).decode("ascii", "replace").strip()
                os.close(self._fd)
                raise DestinationError(
                    f"Another process ({show(holder) or 'unknown'}) is writing {show(dest)}",
                    hint="Wait for it, or choose another destination.",
                ) from None
            except BaseException:
                os.close(self._fd)
                raise
            with contextlib.suppress(FileNotFoundError):
                # The last holder may have removed the file between our open and our lock.
                if os.path.samestat(os.fstat(self._fd), os.stat(path)):
                    break
            os.close(self._fd)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"pid {os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Remove the file and let go; harmless when repeated."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def exchange(one: Path, two: Path) -> bool:
    """Swap two names in one atomic step; False where the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    if renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(two), ctypes.c_uint(rename_exchange)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(two))


def aside_path(dest: Path) -> Path:
    """Where `replace_directory` parks the old directory when the two cannot be exchanged."""
    return dest.with_name(f".{dest.name}.quantkit-old")


def replace_directory(new: Path, dest: Path) -> None:
    """Put `new` in the place of `dest`; the old content ends up at `new`'s name or is removed later.

    Without an atomic exchange there is a moment with nothing at `dest`; `restore_aside` heals it.
    """
    if not dest.exists():
        new.rename(dest)
    elif not exchange(new, dest):
        aside = aside_path(dest)
        remove(aside)
        dest.rename(aside)
        try:
            new.rename(dest)
        except BaseException:
            aside.rename(dest)
            raise
    fsync_dir(dest.parent)


def restore_aside(dest: Path) -> bool:
    """After a crash in the middle of `replace_directory`: put the old directory back if dest is gone."""
    aside = aside_path(dest)
    if not aside.is_dir():
        return False
    if dest.exists():
        remove(aside)
        return False
    aside.rename(dest)
    fsync_dir(dest.parent)
    return True


def fsync_tree(folder: Path) -> None:
    """Make a directory durable: every file's content, then every directory's names, innermost first."""
    for where, _, files in os.walk(folder, topdown=False):
        for name in files:
            fd = os.open(Path(where, name), os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_dir(Path(where))


@contextlib.contextmanager
def new_directory(
    dest: Path,
    check: Callable[[], None],
    *,
    kind: str,
    need_bytes: int = 0,
    finish: Callable[[Path], None] = lambda folder: None,
) -> Iterator[Path]:
    """A directory to write into; on a clean exit it becomes `dest` in one step, on an error it goes.

    Parameters
    ----------
    dest: absolute, without links. check: raises DestinationError where `dest` must not be replaced; called
        before anything is written, again under the lock, and again before the replacement.
    kind: names the staging directory `.DEST.quantkit-KIND`; what a killed process left there is removed.
    need_bytes: free space to insist on. finish: last touches, once everything is written.
    """
    check()
    staging = dest.with_name(f".{dest.name}.quantkit-{kind}")
    with disk_errors(dest, need_bytes):
        dest.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(dest.with_name(f".{dest.name}.quantkit.lock"), dest)
        try:
            restore_aside(dest)
            check()  # now that nobody else writes
            remove(staging)
            free = shutil.disk_usage(dest.parent).free
            if need_bytes > free:
                raise disk_full(dest, f": about {need_bytes} bytes needed, {free} free")
            staging.mkdir()
            yield staging
            finish(staging)
            fsync_tree(staging)
            check()  # somebody may have put something there by hand meanwhile
            replace_directory(staging, dest)
            with contextlib.suppress(OSError):  # it is published: what is left is swept by the next run
                remove(aside_path(dest))
        finally:
            with contextlib.suppress(OSError):
                remove(staging)
            lock.release()
