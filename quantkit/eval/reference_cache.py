"""The reference's predictions on disk: run it once, free it, compare any number of checkpoints with them.

A logit row of a large vocabulary costs hundreds of kilobytes; the hidden state that it is computed from
costs a few. So the hidden states that enter the output embedding are kept, in the reference's own dtype,
with that embedding beside them: multiplying them again gives the reference's logits (to the rounding of a
matrix product of another shape). A model whose logits are not `head(hidden)`, nor its soft-capped form
(Gemma 2), falls back to log-probabilities as 16-bit codes over at most 40 nats below the likeliest token, whose
rounding is at most 40 / 65534 / 2 = 0.0003 nats. ADR 0040 has the measured errors of both.

    DIR/<key>/reference.json           what it was made from, sizes and sha256 of the other files
             head.safetensors          weight [V, H], bias [V]        (form "hidden")
             rows-00000.safetensors    hidden [n, H]; or codes int16 [n, V] with low and step [n]

Nothing in the directory is trusted: JSON is parsed as a stranger's, every file must have the size and hash that
reference.json gives, every tensor the dtype and shape. There is no pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint import count_nonfinite
from quantkit.errors import CheckpointError, DestinationError
from quantkit.eval.perplexity import OnProgress
from quantkit.eval.protocols import Protocol, Window
from quantkit.eval.reference_rows import Recorder, RowWriter, decode
from quantkit.eval.scoring import batches, check_ids, model_positions, with_prefix
from quantkit.shards import open_safetensors, sha256_file
from quantkit.untrusted import plain_file, read_json, show

MANIFEST = "reference.json"
_VERSION = 1


def cache_directory() -> Path:
    """Where caches are kept: $QUANTKIT_CACHE, else $XDG_CACHE_HOME/quantkit, else ~/.cache/quantkit."""
    own = os.environ.get("QUANTKIT_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkit"


def cache_key(model: str, ids: Tensor, protocol: Protocol, bos: int | None, **more: object) -> dict[str, str]:
    """What a cache was made from; equal keys mean equal predictions. `model` is a fingerprint of its files."""
    return {
        "model": model,
        "text": hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest(),
        "protocol": repr(protocol),
        "bos": str(bos),
        "torch": torch.__version__,
        **{name: str(value) for name, value in more.items()},
    }


def key_name(key: Mapping[str, str]) -> str:
    """The directory's name for a key."""
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:24]


class CachedReference:
    """Gives logits like a `Scorer`, from disk, for the same windows in the same order (any batch size)."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.folder = folder
        self.device = torch.device(device)
        meta = _read_manifest(folder)
        self.key: dict[str, str] = meta["key"]
        self.name: str = meta["name"]
        self.form: str = meta["form"]
        self.vocabulary: int = meta["vocabulary"]
        self.positions: int | None = meta["positions"]
        self.rows: int = meta["rows"]
        self.seconds: float = float(meta["seconds"])
        self.fed: int = meta["fed"]
        self.softcap: float | None = meta["softcap"]
        self.extra: dict[str, Any] = meta["extra"]
        self._files: dict[str, Any] = meta["files"]
        self._head = self._read_head() if self.form == "hidden" else None
        self.rewind()

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(record["size"] for record in self._files.values())

    def rewind(self) -> None:
        """Start again at the first window."""
        self._blocks = self._read_rows()
        self._left: Tensor | None = None
        self._given = 0

    def logits(self, ids: Tensor, window: Window) -> Tensor:
        """Logits `[B, n, V]` of the next `B` windows' scored tokens, on `device`."""
        count = window.length - window.first
        rows = self._take(len(ids) * count)
        if self.form == "codes":
            out = rows
        else:
            assert self._head is not None
            out = nn.functional.linear(rows.to(self._head[0].dtype), *self._head)
            if self.softcap:
                out = torch.tanh(out / self.softcap) * self.softcap
        return out.view(len(ids), count, -1)

    def _take(self, count: int) -> Tensor:
        parts: list[Tensor] = []
        while count > 0:
            if self._left is None or not len(self._left):
                self._left = next(self._blocks, None)
                if self._left is None:
                    raise CheckpointError(f"{show(self.folder)} ends too early", hint="Delete it.")
            part, self._left = self._left[:count], self._left[count:]
            parts.append(part.to(self.device))
            count -= len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read_rows(self) -> Iterator[Tensor]:
        total = 0
        for name in sorted(self._files):
            if not name.startswith("rows-"):
                continue
            tensors = self._read(name)
            rows = tensors.get("hidden")
            if self.form == "codes":
                rows = decode(tensors, self.vocabulary, self.folder / name)
            elif rows is None or self._head is None or rows.shape[1:] != self._head[0].shape[1:]:
                raise CheckpointError(f"{show(self.folder / name)} has no hidden states", hint="Delete it.")
            total += len(rows)
            if total > self.rows:
                break
            yield rows
        if total != self.rows:
            raise CheckpointError(f"{show(self.folder)} does not hold {self.rows} rows", hint="Delete it.")

    def _read_head(self) -> tuple[Tensor, Tensor | None]:
        tensors = self._read("head.safetensors")
        weight, bias = tensors.get("weight"), tensors.get("bias")
        fine = weight is not None and weight.dim() == 2 and weight.shape[0] == self.vocabulary
        if not fine or (bias is not None and bias.shape != (self.vocabulary,)):
            raise CheckpointError(f"{show(self.folder)} has no output embedding", hint="Delete it.")
        assert weight is not None
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise CheckpointError(
                f"{show(self.folder)}: the output embedding is {weight.dtype}", hint="Delete it."
            )
        return weight.to(self.device), None if bias is None else bias.to(self.device)

    def _read(self, name: str) -> dict[str, Tensor]:
        path, record = self.folder / name, self._files[name]
        if plain_file(path, self.folder).st_size != record["size"] or sha256_file(path) != record["sha256"]:
            raise CheckpointError(f"{show(path)} is not what {MANIFEST} says", hint="Delete the directory.")
        handle = open_safetensors(path)
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 -- not a mapping
        for key in ("hidden", "weight"):
            if key in tensors and (bad := count_nonfinite(tensors[key])):
                raise CheckpointError(
                    f"Tensor {key} of {show(path)} has {bad} NaN or infinite values",
                    hint="Delete the directory.",
                )
        return tensors


def open_reference(
    folder: Path, key: Mapping[str, str], device: torch.device | str = "cpu"
) -> CachedReference | None:
    """The cache at `folder`; None when there is none or it was made from something else.

    CheckpointError when it is damaged.
    """
    if not (folder / MANIFEST).is_file():
        return None
    found = CachedReference(folder.resolve(), device)
    return found if found.key == dict(key) else None


def record_reference(
    model: Any,
    ids: Tensor,
    protocol: Protocol,
    folder: Path,
    key: Mapping[str, str],
    *,
    batch: int = 1,
    bos_token_id: int | None = None,
    name: str = "the reference",
    on_progress: OnProgress | None = None,
) -> CachedReference:
    """Run `model` over `ids` (int64 `[T]`) and keep its predictions in `folder`, which appears whole or not
    at all. Memory: one batch of windows and at most 64 MB of rows."""
    ids = with_prefix(check_ids(ids, model, name), protocol, bos_token_id)
    total = len(protocol.windows(len(ids)))
    recorder = Recorder(model, name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise DestinationError(
            f"{show(folder.parent)} cannot hold the reference's predictions: {error.strerror}",
            hint="Name another directory with --cache.",
        ) from None
    try:
        writer = RowWriter(staging)
        done = 0
        for inputs, _, window in batches(ids, protocol, batch, bos_token_id):
            for tensors in recorder.rows(inputs, window):
                writer.add(tensors)
            done += len(inputs)
            if on_progress is not None:
                on_progress(done, total)
        writer.flush()
        recorder.write_head(writer)
        meta = {
            "version": _VERSION,
            "key": dict(key),
            "name": name,
            "form": recorder.form,
            "vocabulary": recorder.vocabulary,
            "positions": model_positions(model),
            "rows": writer.rows,
            "seconds": recorder.seconds,
            "fed": recorder.fed,
            "softcap": recorder.softcap,
            "extra": {},
            "files": writer.files,
        }
        (staging / MANIFEST).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was faster: its cache is as good
            os.replace(staging, folder)
    except OSError as error:
        raise DestinationError(
            f"the reference's predictions cannot be written to {show(folder)}: {error.strerror}",
            hint="Free some space, or name another directory with --cache.",
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        recorder.close()
    return CachedReference(folder.resolve(), recorder.device)


def add_extra(reference: CachedReference, **more: Any) -> None:
    """Keep further plain facts (JSON values) about the reference beside its predictions."""
    path = reference.folder / MANIFEST
    meta = read_json(path, reference.folder)
    meta["extra"].update(more)
    staged = path.with_suffix(f".{os.getpid()}.tmp")
    staged.write_text(json.dumps(meta, indent=1), encoding="utf-8")
    os.replace(staged, path)
    reference.extra = meta["extra"]


def prune(directory: Path, keep: Path, limit: int) -> None:
    """Remove the oldest caches in `directory` until at most `limit` bytes remain; `keep` stays."""
    found = []
    for manifest in directory.glob(f"*/{MANIFEST}"):
        folder = manifest.parent
        if not folder.is_symlink():
            size = sum(f.lstat().st_size for f in folder.iterdir())
            found.append((manifest.lstat().st_mtime, size, folder))
    total = sum(size for _, size, _ in found)
    for _, size, folder in sorted(found):
        if total > limit and folder.resolve() != keep.resolve():
            shutil.rmtree(folder, ignore_errors=True)
            total -= size


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    meta = read_json(path, folder)
    wanted: dict[str, Any] = {
        "version": int,
        "key": dict,
        "name": str,
        "form": str,
        "vocabulary": int,
        "rows": int,
        "seconds": float | int,
        "fed": int,
        "extra": dict,
        "files": dict,
    }
    fine = isinstance(meta, dict) and all(isinstance(meta.get(k), kind) for k, kind in wanted.items())
    fine = fine and meta["version"] == _VERSION and meta["form"] in ("hidden", "codes")
    fine = (
        fine
        and isinstance(meta.get("positions"), int | None)
        and isinstance(meta.get("softcap"), float | None)
    )
    for name, record in meta["files"].items() if fine else ():
        fine = fine and (name == "head.safetensors" or (name.startswith("rows-") and name == Path(name).name))
        fine = fine and isinstance(record, dict) and isinstance(record.get("size"), int)
        fine = fine and isinstance(record.get("sha256"), str)
    if not fine or (meta["form"] == "hidden" and "head.safetensors" not in meta["files"]):
        raise CheckpointError(f"{show(path)} is no list of cached predictions", hint="Delete the directory.")
    return dict(meta)
