"""Safetensors files: dtypes, opening them safely, writing them as a stream, planning shards.

Reading is left to the `safetensors` library, which checks every offset. It reads with pread(2), not
through a memory map: a tensor is then a private copy, resident memory stays flat while a checkpoint
of any size streams by, and a file that is truncated meanwhile gives an error instead of SIGBUS.

Writing is done here, byte for byte as `safetensors.torch.save_file` does it (a test compares them),
because a shard has to be put together without holding all of it in memory, its hash is wanted in the
same pass, and its permissions must follow the umask.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.errors import CheckpointError, UsageError
from quantkit.untrusted import show

#: Dtypes by safetensors code, in the library's own order: within a file, tensors are sorted by this
#: order backwards, so that wide types come first and everything stays aligned.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANK = {code: rank for rank, code in enumerate(DTYPES)}

#: The library refuses longer headers too; it is checked first so that nothing of that size is read.
MAX_HEADER_BYTES = 100_000_000


def header_bytes(path: Path, *, content: bool = True) -> bytes:
    """The raw header of a safetensors file (or only its length), refusing lengths that cannot be true."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if length < 2 or length > size - 8 or length > MAX_HEADER_BYTES:
                said = f"a header of {length} bytes in" if length >= 0 else "no header in"
                raise CheckpointError(
                    f"{show(path)} is truncated or no safetensors file: {said} {size} bytes",
                    hint="Download it again; a Git LFS pointer has to be replaced by its file.",
                )
            return start + file.read(length) if content else start
    except OSError as error:
        raise CheckpointError(f"{show(path)} cannot be read: {show(error.strerror)}") from None


def open_safetensors(path: Path) -> Any:
    """A `safe_open` handle that reads with pread; CheckpointError when the library refuses the file."""
    header_bytes(path, content=False)
    try:
        return safe_open(str(path), framework="pt", backend="pread")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{show(path)} is not a valid safetensors file: {show(error)}", hint="Download it again."
        ) from None


class Handles:
    """A few open files, the least recently used closed first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def get(self, path: Path, before: Callable[[], object] = lambda: None) -> Any:
        """The handle of `path`; `before` runs when it has to be opened."""
        if path not in self._open:
            while len(self._open) >= self._limit:
                self._open.popitem(last=False)
            before()
            self._open[path] = open_safetensors(path)
        self._open.move_to_end(path)
        return self._open[path]

    def drop(self, path: Path) -> None:
        """Close one file, if it is open."""
        self._open.pop(path, None)

    def close(self) -> None:
        """Close all files."""
        self._open.clear()


@dataclass(frozen=True)
class Spec:
    """A tensor of a file: safetensors dtype code and shape."""

    code: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * DTYPES[self.code].itemsize


def spec_of(tensor: Tensor) -> Spec:
    """The `Spec` of a tensor; ValueError for a dtype that is not written."""
    if tensor.dtype not in CODES:
        raise ValueError(f"dtype {tensor.dtype} is not written to checkpoints")
    return Spec(CODES[tensor.dtype], tuple(tensor.shape))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any device and dtype, in row-major order."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_safetensors(path: Path, specs: Mapping[str, Spec], get: Callable[[str], Tensor]) -> tuple[str, int]:
    """Write a safetensors file, asking `get` for one tensor at a time; returns (sha256, size).

    The content is durable (fsync) on return; the caller renames the file and syncs the directory.
    """
    names = sorted(specs, key=lambda n: (-_RANK[specs[n].code], n))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + specs[name].nbytes
        header[name] = {
            "dtype": specs[name].code,
            "shape": list(specs[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in (struct.pack("<Q", len(text)), text):
            file.write(chunk)
            digest.update(chunk)
        for name in names:
            tensor = get(name)
            if spec_of(tensor) != specs[name]:
                raise ValueError(f"{name} changed between planning and writing: {spec_of(tensor)}")
            data = tensor_bytes(tensor)
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), 8 + len(text) + end


def sha256_file(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "200MB", "1.5GiB" or a plain number (GB is 10^9, GiB is 2^30, as on the hub)."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    result = 0
    if match and not isinstance(size, bool) and not (match[3] and not match[2]):
        power = " KMGT".index(match[2].upper() or " ")
        result = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if result <= 0:
        hint = 'Write "5GB", "200MB" or a number of bytes.'
        raise UsageError(f"{show(repr(size))} is not a size", hint=hint)
    return result


def plan_shards(tensors: Iterable[tuple[str, Spec]], max_bytes: int) -> list[dict[str, Spec]]:
    """Group tensors, in order, into shards of at most `max_bytes` (a larger tensor gets its own)."""
    shards: list[dict[str, Spec]] = []
    filled = 0
    for name, spec in tensors:
        if not shards or (filled and filled + spec.nbytes > max_bytes):
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """File names of `count` shards, as transformers spells them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
