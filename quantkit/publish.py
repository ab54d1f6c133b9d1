"""`CheckpointWriter`: a new checkpoint appears whole, or not at all, and no finished work is lost.

Units (a decoder layer, a run of other tensors) become durable one by one in a staging directory beside
the destination. `publish` joins them into shards and renames the result into place. A process that
is killed at any moment leaves the destination as it was, or complete; `resume=True` goes on from the
last durable unit and ends in the same bytes as a run that was never interrupted.

What a resumed run trusts: the journal up to its first damaged line, and of that the longest prefix
of units whose pieces still have the journalled sha256. Later units are done again, because a
calibrated conversion derives each layer from the ones before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import quantkit
from quantkit.assemble import Assembler, Record, damaged, is_piece
from quantkit.checkpoint import CHAT_TEMPLATES, INDEX, MANIFEST
from quantkit.errors import CheckpointError, DestinationError
from quantkit.journal import Journal, is_sound
from quantkit.manifest import file_record, json_bytes
from quantkit.shards import parse_size, sha256_file, spec_of, write_safetensors
from quantkit.staging import (
    Lock,
    aside_path,
    copy_durably,
    disk_errors,
    disk_full,
    fsync_dir,
    remove,
    replace_directory,
    restore_aside,
    write_durably,
)
from quantkit.untrusted import is_plain_name, read_json, show

__all__ = ["CheckpointWriter", "parse_size"]

log = logging.getLogger(__name__)
_JOURNAL_VERSION = 2


class CheckpointWriter:
    """Writes one checkpoint; see the module's docstring and docs/architecture.md ("Disk API").

    `fingerprint` says what the output is made from (a string, or named strings so that an error can
    tell which one differs); a resumed run must have the same. `need_bytes` is an estimate of the
    output's size, checked against the free space at the start. `source`, if given, is a directory
    that the destination must not replace or contain. `provenance` goes into the manifest.
    """

    def __init__(
        self,
        dest: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        resume: bool = False,
        fingerprint: str | Mapping[str, str] = "",
        need_bytes: int | None = None,
        source: str | os.PathLike[str] | None = None,
    ) -> None:
        self.dest = Path(os.path.realpath(Path(dest).expanduser()))
        if not is_plain_name(self.dest.name.lstrip(".")):
            raise DestinationError(f"{show(self.dest)} is not a name for a new directory")
        self.provenance: dict[str, Any] = {}
        self._overwrite = overwrite
        self._max_shard = parse_size(max_shard_size)
        self._state = {
            "journal": _JOURNAL_VERSION,
            "quantkit": quantkit.__version__,
            "max_shard_size": self._max_shard,
            "fingerprint": dict(fingerprint) if isinstance(fingerprint, Mapping) else {"inputs": fingerprint},
        }
        self._staging = self.dest.with_name(f".{self.dest.name}.quantkit-staging")
        self._pieces, self._files = self._staging / "pieces", self._staging / "files"
        self._units: dict[str, Record] = {}
        self._tensors: set[str] = set()
        self._added: dict[str, Record] = {}  # files beside the shards
        self._journal: Journal | None = None
        self._lock: Lock | None = None
        self._published = False
        self._committed = False  # an earlier process got as far as renaming the result into place
        opened = False
        try:
            with disk_errors(self.dest):
                self._check_destination(Path(source) if source is not None else None)
                self.dest.parent.mkdir(parents=True, exist_ok=True)
                self._lock = Lock(self.dest.with_name(f".{self.dest.name}.quantkit.lock"), self.dest)
                self._open(resume)
                opened = True
                self._check_space(need_bytes)
        except BaseException:
            # What an earlier run left is not ours to remove when this one is refused.
            self.close() if opened else self._release()
            raise
        #: ids of the units that an interrupted run finished, in their order (with `resume` only)
        self.completed: tuple[str, ...] = tuple(self._units)
        self._resumed = self._journal is not None and bool(self._journal.records)

    # -- starting ------------------------------------------------------------------------------

    def _check_destination(self, source: Path | None) -> None:
        dest = self.dest
        if dest.exists() and not dest.is_dir():
            raise DestinationError(f"{show(dest)} is a file", hint="Choose the name of a new directory.")
        if source is not None and source.resolve().is_relative_to(dest):
            hint = "Choose another destination."
            raise DestinationError(f"{show(dest)} holds the model that is being read", hint=hint)
        if dest.is_dir() and self._overwrite:
            names = os.listdir(dest)
            if names and not any(n == "config.json" or n.endswith(".safetensors") for n in names):
                # --overwrite replaces the whole directory: never someone's home or project.
                raise DestinationError(
                    f"{show(dest)} is not a checkpoint, so it is not overwritten",
                    hint="Remove it yourself, or choose another destination.",
                )

    def _open(self, resume: bool) -> None:
        """Under the lock: heal a crash, then go on with the staging directory or start a new one."""
        if restore_aside(self.dest):
            log.warning("put %s back, which an interrupted overwrite had moved aside", self.dest)
        state = self._read_state()
        if state is not None:
            self._journal = Journal(self._staging / "journal.jsonl", is_sound)
            self._committed = self._is_committed(self._journal)
            if self._committed and not resume:
                log.info("%s was published completely; removing what its writer left", self.dest)
                self._sweep()
                self._committed = False
        # With a commit on record the destination is our own result: there is nothing to refuse.
        if self.dest.exists() and not self._overwrite and not self._committed:
            raise DestinationError(f"{show(self.dest)} exists", hint="Use --overwrite or another name.")
        if resume and state is not None:
            self._check_same_work(state)
            self._restore_units()
        else:
            if os.path.lexists(self._staging):
                log.info("removing what an interrupted run left in %s", self._staging)
            self._sweep()
            self._pieces.mkdir(parents=True)
            write_durably(self._staging / "state.json", json_bytes(self._state))
            self._journal = Journal(self._staging / "journal.jsonl")
            fsync_dir(self._staging.parent)
        remove(self._files)
        self._files.mkdir()
        self.scratch.mkdir(exist_ok=True)

    def _read_state(self) -> dict[str, Any] | None:
        """state.json of a staging directory that is there and was started properly."""
        # Links are never made by us: in a directory that others may write to they may lead anywhere.
        inside = ("state.json", "journal.jsonl", "pieces", "files", "scratch", "out")
        if any(p.is_symlink() for p in (self._staging, *(self._staging / name for name in inside))):
            return None
        try:
            state = read_json(self._staging / "state.json", self._staging)
        except CheckpointError:
            return None
        return state if isinstance(state, dict) else None

    def _check_same_work(self, state: dict[str, Any]) -> None:
        def flat(mapping: Mapping[str, Any]) -> dict[str, Any]:
            prints = mapping.get("fingerprint")
            return {**mapping, **(prints if isinstance(prints, dict) else {}), "fingerprint": None}

        then, now = flat(state), flat(self._state)
        if differing := sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k)):
            said = [f"{key} (was {_brief(then.get(key))}, is {_brief(now.get(key))})" for key in differing]
            listed = show(", ".join(said), 400)
            raise DestinationError(
                f"The interrupted run for {show(self.dest)} cannot be resumed: it had another {listed}",
                hint="Resume with the same model, options and data, or start again without --resume.",
            )

    def _restore_units(self) -> None:
        """Take over the journalled units that are intact."""
        assert self._journal is not None
        self._pieces.mkdir(exist_ok=True)
        # Once shards are being put together, pieces that are used up are gone, and cannot be made again
        # one by one: then anything damaged ends the resumption.
        whole = not self._publishing and not self._committed
        for position, record in enumerate(list(self._journal.records)):
            if record.get("type") != "unit":
                continue
            piece = self._pieces / f"{len(self._units):05d}.safetensors"
            sound = (
                record["piece"] == piece.name
                and record["unit"] not in self._units
                and self._tensors.isdisjoint(record["tensors"])
            )
            if sound and (whole or (piece.exists() and not self._committed)):
                sound = is_piece(piece, record)
            if not sound:
                if not whole:
                    raise damaged(piece)
                log.warning("%s is damaged: unit %s and later ones are redone", piece, record["unit"])
                self._journal.keep(position)
                break
            self._units[record["unit"]] = record
            self._tensors |= record["tensors"].keys()
        if whole:
            known = {record["piece"] for record in self._units.values()}
            for stray in set(os.listdir(self._pieces)) - known:
                remove(self._pieces / stray)
        log.info("resuming %s: %d units are done", self.dest, len(self._units))

    @property
    def _publishing(self) -> bool:
        """Whether some shard is complete, so that pieces may be gone."""
        return self._journal is not None and any(r.get("type") == "shard" for r in self._journal.records)

    def _is_committed(self, journal: Journal) -> bool:
        """Whether the destination is the directory that this journal's run put there."""
        commits = [r for r in journal.records if r.get("type") == "commit"]
        if not commits or not (self.dest / MANIFEST).is_file():
            return False
        return _commit_record(self.dest) in commits

    def _check_space(self, need_bytes: int | None) -> None:
        if need_bytes is not None and not self._committed:
            folders = [d for d in (self._pieces, self._staging / "out") if d.is_dir()]
            need = need_bytes - sum(file.stat().st_size for d in folders for file in d.iterdir())
            free = shutil.disk_usage(self.dest.parent).free
            if need > free:
                raise disk_full(self.dest, f": about {need} bytes needed, {free} free")

    # -- units ---------------------------------------------------------------------------------

    @property
    def scratch(self) -> Path:
        """A directory for the converter's own files; it survives an interruption, not the publication."""
        return self._staging / "scratch"

    @property
    def resumable(self) -> bool:
        """Whether a later run could go on from here: some unit is durable and nothing is published."""
        return bool(self._units) and not self._published

    def unit_report(self, unit: str) -> Any:
        """What `write_unit` was given as report for a finished unit."""
        return self._units[unit]["report"]

    def write_unit(
        self, unit: str, tensors: Mapping[str, Tensor], report: Mapping[str, Any] | None = None
    ) -> None:
        """Make a unit's tensors durable. Their order here is their order in the checkpoint."""
        journal = self._writable()
        if self._publishing or self._committed:
            raise self._misuse(f"unit {unit} comes after publication began")
        if unit in self._units:
            raise ValueError(f"unit {unit} was written already")
        if twice := next((name for name in tensors if name in self._tensors), None):
            raise self._misuse(f"tensor {twice} of unit {unit} was written by another unit")
        specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
        piece = self._pieces / f"{len(self._units):05d}.safetensors"
        temporary = piece.with_suffix(".tmp")
        with disk_errors(self.dest, sum(spec.nbytes for spec in specs.values())):
            try:
                digest, size = write_safetensors(temporary, specs, tensors.__getitem__)
                temporary.replace(piece)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            fsync_dir(self._pieces)
            layout = {name: [spec.code, list(spec.shape)] for name, spec in specs.items()}
            record = {"type": "unit", "unit": unit, "piece": piece.name, "sha256": digest, "size": size}
            journal.append({**record, "tensors": layout, "report": report})
        self._units[unit] = journal.records[-1]
        self._tensors |= specs.keys()

    def _misuse(self, what: str) -> Exception:
        """A mistake of the caller's, or else a journal that tells of work which was never done."""
        return damaged(self._staging / "journal.jsonl") if self._resumed else ValueError(what)

    # -- other files ---------------------------------------------------------------------------

    def add_json(self, name: str, content: Any) -> None:
        """Add a JSON file to the checkpoint (again: replaces it)."""
        self.add_bytes(name, json_bytes(content))

    def add_bytes(self, name: str, data: bytes) -> None:
        """Add a file to the checkpoint (again: replaces it)."""
        self._check_name(name)
        with disk_errors(self.dest, len(data)):
            (self._files / name).parent.mkdir(exist_ok=True)
            write_durably(self._files / name, data)
        self._added[name] = file_record(data)

    def _check_name(self, name: str) -> None:
        self._writable()
        folder, _, base = name.rpartition("/")
        taken = base in (MANIFEST, INDEX) or (base.startswith("model") and base.endswith(".safetensors"))
        if folder not in ("", CHAT_TEMPLATES) or not is_plain_name(base) or taken:
            raise ValueError(f"{name!r} is not a name for a file of a checkpoint")

    def copy_file(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Add a copy of a file, under its own name (inside `additional_chat_templates/` if it was)."""
        source = Path(path)
        if name is None:
            inside = source.parent.name == CHAT_TEMPLATES
            name = f"{CHAT_TEMPLATES}/{source.name}" if inside else source.name
        self._check_name(name)
        try:
            file = source.open("rb")
        except OSError as error:
            raise CheckpointError(f"{show(source)} cannot be read: {show(error.strerror)}") from None
        with file, disk_errors(self.dest):
            copied = self._files / name
            copied.parent.mkdir(exist_ok=True)
            copy_durably(file, copied)
            self._added[name] = {"sha256": sha256_file(copied), "size": copied.stat().st_size}

    # -- publication ---------------------------------------------------------------------------

    def publish(self) -> None:
        """Join the units into shards and put the checkpoint in place; the staging directory goes."""
        journal = self._writable()
        if not self._committed:
            if not self._tensors:
                raise ValueError("there is nothing to publish")
            with disk_errors(self.dest):
                units = self._units.values()
                assembler = Assembler(self._staging, self.dest, journal, units, self._max_shard)
                shards = assembler.shards(keep={name.partition("/")[0] for name in self._added})
                assembler.finish(shards, self._added, self.provenance)
                self._commit(journal, assembler.out)
        self._published = True
        try:
            self._sweep()
            remove(aside_path(self.dest))
        except OSError as error:
            log.warning("%s is complete, but %s could not be removed: %s", self.dest, self._staging, error)
        self._release()

    def _commit(self, journal: Journal, out: Path) -> None:
        """The only moment at which the destination changes."""
        if self.dest.exists() and not self._overwrite:
            hint = "Move it away and resume, or use --overwrite."
            raise DestinationError(f"{show(self.dest)} came into being meanwhile", hint=hint)
        journal.append(_commit_record(out))
        replace_directory(out, self.dest)

    # -- the end -------------------------------------------------------------------------------

    def _writable(self) -> Journal:
        if self._journal is None or self._published:
            raise ValueError("the writer is closed")
        return self._journal

    def _sweep(self) -> None:
        """Remove the staging directory: first what is large, so that until the end the commit is on
        record; then state.json, without which the rest counts for nothing."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._staging.is_dir() and not self._staging.is_symlink():
            for entry in self._staging.iterdir():
                if entry.name not in ("state.json", "journal.jsonl"):
                    remove(entry)
            (self._staging / "state.json").unlink(missing_ok=True)
        remove(self._staging)

    def _release(self) -> None:
        """Let go of the journal and the lock; harmless when repeated."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def close(self) -> None:
        """End without publishing: finished units stay for `resume=True`, otherwise nothing stays."""
        if self._lock is None:
            return
        try:
            if self.resumable:
                log.warning("%d finished units of %s are kept for --resume", len(self._units), self.dest)
            else:
                with contextlib.suppress(OSError):
                    self._sweep()
        finally:
            self._release()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _commit_record(directory: Path) -> Record:
    """What identifies the published directory, wherever it is renamed to."""
    status = directory.stat()
    manifest = sha256_file(directory / MANIFEST)
    return {"type": "commit", "device": status.st_dev, "inode": status.st_ino, "manifest": manifest}


def _brief(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) > 15 else text
