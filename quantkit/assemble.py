"""From the pieces of a conversion to the files of a checkpoint: shards, index, manifest.

Shards are put together one at a time and tensor by tensor. A piece goes as soon as all of its tensors
are in shards that are durable and journalled, so that the disk holds the checkpoint about once, and a
process killed in between goes on with the next shard.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import quantkit
from quantkit.checkpoint import INDEX, MANIFEST, natural_key
from quantkit.errors import CheckpointError, DestinationError
from quantkit.journal import Journal, Record
from quantkit.manifest import file_record, json_bytes, sealed
from quantkit.shards import (
    Handles,
    Spec,
    open_safetensors,
    plan_shards,
    sha256_file,
    shard_names,
    write_safetensors,
)
from quantkit.staging import disk_errors, fsync_dir, remove, write_durably
from quantkit.untrusted import show


class Assembler:
    """Fills the directory `out` of a staging directory from its pieces and its added files."""

    def __init__(
        self, staging: Path, dest: Path, journal: Journal, units: Iterable[Record], max_shard: int
    ) -> None:
        self._pieces, self._files, self.out = staging / "pieces", staging / "files", staging / "out"
        self._dest, self._journal = dest, journal
        units = list(units)
        self._owner = {name: record for record in units for name in record["tensors"]}
        ordered = [(n, Spec(c, tuple(s))) for record in units for n, (c, s) in record["tensors"].items()]
        self._plan = plan_shards(ordered, max_shard)
        self._handles = Handles(64)

    def shards(self, keep: Iterable[str] = ()) -> dict[str, Record]:
        """Write all shards that are not there yet; returns their records. `keep`: other names in `out`."""
        done = {r["file"]: r for r in self._journal.records if r["type"] == "shard"}
        self.out.mkdir(exist_ok=True)
        for entry in set(os.listdir(self.out)) - done.keys() - set(keep):
            remove(self.out / entry)  # what a crash left half-written
        last_use = {self._owner[name]["piece"]: i for i, shard in enumerate(self._plan) for name in shard}
        names = shard_names(len(self._plan))
        for i, (file, shard) in enumerate(zip(names, self._plan, strict=True)):
            if file in done:
                self._check_intact(self.out / file, done[file], shard)
            else:
                done[file] = self._write_shard(file, shard)
                self._journal.append(done[file])
            for piece in [p for p, use in last_use.items() if use == i]:
                self._handles.drop(self._pieces / piece)
                remove(self._pieces / piece)
        self._handles.close()
        return {file: done[file] for file in names}

    def finish(self, shards: Mapping[str, Record], added: Mapping[str, Record], provenance: Record) -> None:
        """Add the other files, the index if there are several shards, and the manifest over everything."""
        files = {file: {"sha256": r["sha256"], "size": r["size"]} for file, r in shards.items()}
        for name, record in added.items():
            files[name] = record
            (self.out / name).parent.mkdir(exist_ok=True)
            if (self._files / name).exists():  # moved already when publish() is tried again
                (self._files / name).replace(self.out / name)
        if len(shards) > 1:
            data = json_bytes(self._index(shards))
            write_durably(self.out / INDEX, data)
            files[INDEX] = file_record(data)
        manifest = {
            "quantkit_version": quantkit.__version__,
            "provenance": provenance,
            "files": {name: files[name] for name in sorted(files, key=natural_key)},
        }
        write_durably(self.out / MANIFEST, sealed(manifest))
        for folder in {(self.out / name).parent for name in files}:
            fsync_dir(folder)

    def _index(self, shards: Iterable[str]) -> dict[str, Any]:
        where = {name: file for file, shard in zip(shards, self._plan, strict=True) for name in shard}
        total = sum(spec.nbytes for shard in self._plan for spec in shard.values())
        weight_map = {name: where[name] for name in sorted(where, key=natural_key)}
        return {"metadata": {"total_size": total}, "weight_map": weight_map}

    def _write_shard(self, file: str, shard: Mapping[str, Spec]) -> Record:
        path = self.out / file
        first = self._owner[next(iter(shard))]
        record = None
        if first["tensors"].keys() == shard.keys():
            # The piece has exactly the bytes that the shard would have. A second name (not a move)
            # keeps the piece valid until the journal has the shard.
            with contextlib.suppress(OSError):
                os.link(self._pieces / first["piece"], path)
                record = {"sha256": first["sha256"], "size": first["size"]}
        if record is None:
            with disk_errors(self._dest, sum(spec.nbytes for spec in shard.values())):
                digest, size = write_safetensors(path, shard, self._tensor)
            record = {"sha256": digest, "size": size}
        fsync_dir(self.out)
        return {"type": "shard", "file": file, **record}

    def _tensor(self, name: str) -> Tensor:
        piece = self._pieces / self._owner[name]["piece"]
        try:
            tensor: Tensor = self._handles.get(piece).get_tensor(name)
        except CheckpointError as error:
            raise damaged(piece) from error
        return tensor

    @staticmethod
    def _check_intact(path: Path, record: Record, shard: Mapping[str, Spec]) -> None:
        if path.is_symlink() or not _holds(path, record, shard):
            raise damaged(path)


def is_piece(path: Path, record: Record) -> bool:
    """Whether a piece is what its journal record says: the file's hash, and the tensors in its header."""
    return _holds(path, record, {name: Spec(c, tuple(s)) for name, (c, s) in record["tensors"].items()})


def _holds(path: Path, record: Record, specs: Mapping[str, Spec]) -> bool:
    if not path.is_file() or path.is_symlink() or sha256_file(path) != record["sha256"]:
        return False
    if path.stat().st_size != record["size"]:
        return False
    try:
        handle = open_safetensors(path)
    except CheckpointError:
        return False
    found = {}
    for name in handle.keys():  # noqa: SIM118 -- not a mapping
        part = handle.get_slice(name)
        found[name] = Spec(part.get_dtype(), tuple(part.get_shape()))
    return found == dict(specs)


def damaged(path: Path) -> DestinationError:
    """The error for a staged file that is not what the journal says."""
    return DestinationError(f"{show(path)} was damaged meanwhile", hint="Start again without --resume.")
