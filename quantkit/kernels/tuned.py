"""The cache that `quantkit tune` writes: tiles that were timed on this device, instead of the shipped tables.

One JSON file per device class under `$QUANTKIT_CACHE` (else `$XDG_CACHE_HOME/quantkit`, `~/.cache/quantkit`),
in `tuning/`. It is read once, at the first product on the device, and is a file like any other: what does not
validate is reported once and ignored. A look-up is one access to a dictionary.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from quantkit.errors import DestinationError

log = logging.getLogger(__name__)

#: Numbers of rows that share a tile: the largest M of each.
BUCKETS = (1, 8, 16, 32, 64, 128)
_BUCKET = [next(b for b in BUCKETS if m <= b) for m in range(BUCKETS[-1] + 1)]
#: No tuning file is longer than this.
MOST_BYTES = 4 << 20

T = TypeVar("T")
Key = tuple[str, int, int, int, int]  # family, bits, bucket of M, N, K
Size = Annotated[int, Field(ge=1, le=1024)]


class Tile(BaseModel):
    """Fields of the tables' configs; powers of two, as Triton's tiles are."""

    model_config = ConfigDict(extra="forbid", strict=True)
    rows: Size
    columns: Size
    inputs: Size
    slices: Size
    split: Annotated[int, Field(ge=1, le=64)]
    stages: Annotated[int, Field(ge=1, le=8)]
    warps: Annotated[int, Field(ge=1, le=16)]

    @field_validator("rows", "columns", "inputs", "slices", "warps")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("not a power of two")
        return value


class Entry(BaseModel):
    """One tuned product. Times are microseconds."""

    model_config = ConfigDict(extra="forbid", strict=True)
    family: Literal["affine", "codebook", "float8"]
    bits: Literal[1, 2, 3, 4, 8]
    m: Literal[1, 8, 16, 32, 64, 128]
    n: Annotated[int, Field(ge=1, lt=1 << 31)]
    k: Annotated[int, Field(ge=1, lt=1 << 31)]
    dtype: str
    tile: Tile
    shipped_us: Annotated[float, Field(gt=0)]
    tuned_us: Annotated[float, Field(gt=0)]

    @property
    def key(self) -> Key:
        return self.family, self.bits, self.m, self.n, self.k


class Cache(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    device: str
    torch: str
    entries: list[Entry] = Field(default_factory=list, max_length=20000)


def directory() -> Path:
    """Where tuning files are kept."""
    own = os.environ.get("QUANTKIT_CACHE")
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkit"
    return root / "tuning"


def device_class(device: torch.device | None = None) -> str | None:
    """The vendor's name of the accelerator as a file name; None without one."""
    device = device or torch.accelerator.current_accelerator()
    if device is None:
        return None
    name = "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-") or device.type


def path(device: str) -> Path:
    """The file of a device class."""
    return directory() / f"{device}.json"


def read(device: str) -> Cache | None:
    """The device class's cache; None where there is none or it does not validate (said in the log)."""
    file = path(device)
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError("the file is too long")
        cache = Cache.model_validate_json(file.read_bytes())
        if cache.device != device:
            raise ValueError("it is for another device")
        return cache
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        first = str(error).splitlines()[0]
        log.warning("%s is ignored (%s): run `quantkit tune --clear`", file, first)
        return None


def write(cache: Cache) -> Path:
    """Replace the device class's file in one step."""
    file = path(cache.device)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                json.dump(cache.model_dump(), out, indent=1)
                out.flush()
                os.fsync(out.fileno())
            os.replace(name, file)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise DestinationError(
            f"{file} cannot be written ({error.strerror})", hint="Name another directory with QUANTKIT_CACHE."
        ) from error
    reload()
    return file


_tiles: dict[Key, Any] | None = None
_off = 0


def reload() -> None:
    """Read the file again at the next product."""
    global _tiles
    _tiles = None


@contextmanager
def ignored() -> Iterator[None]:
    """Inside, the shipped tables answer: for ahead-of-time builds, and for what tuning compares with."""
    global _off
    _off += 1
    try:
        yield
    finally:
        _off -= 1


def find(family: str, bits: int, m: int, n: int, k: int, make: type[T]) -> T | None:
    """The tuned tile as a `make` (a table's config class), or None: the shipped table answers."""
    global _tiles
    if _tiles is None:
        device = device_class()
        cache = read(device) if device else None
        _tiles = {entry.key: entry.tile for entry in cache.entries} if cache else {}
    if not _tiles or _off or m > BUCKETS[-1]:
        return None
    key = (family, bits, _BUCKET[m], n, k)
    tile = _tiles.get(key)
    if isinstance(tile, Tile):
        names = {f.name for f in fields(make)}  # type: ignore[arg-type]
        tile = _tiles[key] = make(**{name: v for name, v in tile.model_dump().items() if name in names})
    return tile
