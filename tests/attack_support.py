"""What tests/attacks shares: a good checkpoint to spoil, and what a refusal has to look like.

An attack is a function that spoils a good checkpoint (a directory) and returns words that the error has
to contain: the file, and the tensor if one is to blame.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.checkpoint import CheckpointReader
from quantkit.errors import CheckpointError, ConfigError

INDEX = "model.safetensors.index.json"
ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"
Attack = Callable[[Path], list[str]]


def good_checkpoint(path: Path, *, sharded: bool = True) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (path / "tokenizer.json").write_text("{}")
    a = {"model.a.weight": torch.randn(7, 5), "model.b.weight": torch.randn(3, 5).to(torch.bfloat16)}
    b = {"model.c.weight": torch.randn(4, 5), "model.c.bias": torch.randn(4)}
    if not sharded:
        save_file({**a, **b}, path / "model.safetensors")
        return
    save_file(a, path / ONE)
    save_file(b, path / TWO)
    write_index(path, {**dict.fromkeys(a, ONE), **dict.fromkeys(b, TWO)})


def write_index(path: Path, weight_map: object) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def weight_map(path: Path) -> dict[str, str]:
    return json.loads((path / INDEX).read_text())["weight_map"]


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file whose header is whatever we like."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def single(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    """Make it a checkpoint of one file with this header."""
    for name in (ONE, TWO, INDEX):
        (path / name).unlink()
    raw(path / "model.safetensors", header, data, length)


def u8(*shape: int, start: int = 0, end: int = 1) -> dict[str, object]:
    return {"dtype": "U8", "shape": list(shape), "data_offsets": [start, end]}


def read_everything(path: Path) -> None:
    with CheckpointReader(path) as reader:
        reader.fingerprint()
        reader.other_files()
        for name in reader.names():
            reader.read(name, check_finite=True)


def check_refused(attack: Attack, tmp_path: Path) -> None:
    """Spoil a good checkpoint, read all of it, and look at the error."""
    path = tmp_path / "model-dir"
    good_checkpoint(path)
    read_everything(path)
    words = attack(path)
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        read_everything(path)
    assert time.perf_counter() - start < 2
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and 20 < len(message) < 1000, message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert isinstance(caught.value, ConfigError) == attack.__name__.startswith("config_"), type(caught.value)
    # The chain of causes would be printed with --debug only, but must not be needed to understand.
    assert caught.value.__cause__ is None
