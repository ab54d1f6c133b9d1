"""Damaged and lying safetensors headers, and data that is not finite: each is refused in one line, quickly."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from attack_support import (
    ONE,
    TWO,
    Attack,
    check_refused,
    good_checkpoint,
    read_everything,
    single,
    u8,
)
from safetensors.torch import save_file

from quantkit.checkpoint import CheckpointReader
from quantkit.errors import CheckpointError

ATTACKS: list[Attack] = []


def attack(function: Attack) -> Attack:
    ATTACKS.append(function)
    return function


# -- the files' headers --------------------------------------------------------------------------


@attack
def truncated_data(path):
    data = (path / TWO).read_bytes()
    (path / TWO).write_bytes(data[:-3])
    return [TWO]


@attack
def truncated_header(path):
    (path / TWO).write_bytes((path / TWO).read_bytes()[:50])
    return [TWO, "truncated"]


@attack
def empty_file(path):
    (path / ONE).write_bytes(b"")
    return [ONE]


@attack
def five_bytes(path):
    (path / ONE).write_bytes(b"12345")
    return [ONE]


@attack
def git_lfs_pointer(path):
    (path / ONE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    return [ONE, "LFS"]


@attack
def trailing_data(path):
    with (path / ONE).open("ab") as file:
        file.write(b"smuggled")
    return [ONE]


@attack
def header_length_bomb(path):
    single(path, b"{}", length=2**63 - 1)
    return ["model.safetensors"]


@attack
def header_length_negative(path):
    single(path, b"{}", length=2**64 - 1)
    return ["model.safetensors"]


@attack
def header_length_just_allowed_but_sparse(path):
    single(path, b"")
    with (path / "model.safetensors").open("wb") as file:  # 90 MB of zeros that take no disk
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(90_000_008)
    return ["model.safetensors"]


@attack
def header_over_the_limit(path):
    single(path, b"")
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 5_000_000_000))
        file.truncate(5_000_000_008)
    return ["model.safetensors", "header"]


@attack
def header_is_a_list(path):
    single(path, [1, 2])
    return ["model.safetensors"]


@attack
def header_deeply_nested(path):
    single(path, b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}")
    return ["model.safetensors"]


@attack
def header_not_utf8(path):
    single(path, b'{"a\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1")
    return ["model.safetensors"]


@attack
def header_overlapping_tensors(path):
    single(path, {"a": u8(2, end=2), "b": u8(2, start=1, end=3)}, b"123")
    return ["model.safetensors", "`b`"]


@attack
def header_with_hole(path):
    single(path, {"a": u8(1, start=2, end=3)}, b"123")
    return ["model.safetensors"]


@attack
def header_offsets_beyond_file(path):
    single(path, {"a": u8(1000, end=1000)}, b"123")
    return ["model.safetensors"]


@attack
def header_offsets_backwards(path):
    single(path, {"a": u8(1, start=1, end=0)}, b"1")
    return ["model.safetensors"]


@attack
def header_shape_lies(path):
    single(path, {"a": u8(1000, end=3)}, b"123")
    return ["model.safetensors"]


@attack
def header_shape_overflows(path):
    single(path, {"a": u8(2**33, 2**33, end=4)}, b"1234")
    return ["model.safetensors"]


@attack
def header_negative_shape(path):
    single(path, {"a": u8(-1, end=1)}, b"1")
    return ["model.safetensors"]


@attack
def header_absurd_zero_size(path):
    single(path, {"a.weight": u8(0, 2**62, end=0)})
    return ["model.safetensors", "a.weight", "shape"]


@attack
def header_thousand_dimensions(path):
    single(path, {"a.weight": u8(*[1] * 1000, end=1)}, b"1")
    return ["model.safetensors", "a.weight", "shape"]


@attack
def dtype_unknown(path):
    single(path, {"a.weight": {"dtype": "Q4_K", "shape": [1], "data_offsets": [0, 1]}}, b"1")
    return ["model.safetensors", "Q4_K"]


@attack
def dtype_float4(path):
    single(path, {"a.weight": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"1")
    return ["model.safetensors", "a.weight", "F4"]


@attack
def dtype_complex(path):
    single(path, {"a.weight": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, b"12345678")
    return ["model.safetensors", "a.weight", "C64"]


@attack
def no_tensors(path):
    single(path, {"__metadata__": {"format": "pt"}})
    return [path.name, "no tensors"]


@attack
def tensor_name_tries_the_terminal(path):
    name = "\x1b[2J\r\n" + "x" * 5000
    single(path, {name: {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"1")
    return ["model.safetensors", "F4"]


# -- the data ----------------------------------------------------------------------------------------


def _poison(path: Path, dtype: torch.dtype, value: float) -> list[str]:
    weight = torch.ones(33, 65)
    weight[32, 64] = value
    save_file({"model.c.weight": weight.to(dtype), "model.c.bias": torch.zeros(4)}, path / TWO)
    return [TWO, "model.c.weight", "1 NaN or infinite"]


@attack
def nan_f32(path):
    return _poison(path, torch.float32, float("nan"))


@attack
def inf_f32(path):
    return _poison(path, torch.float32, float("-inf"))


@attack
def nan_bf16(path):
    return _poison(path, torch.bfloat16, float("nan"))


@attack
def inf_f16(path):
    return _poison(path, torch.float16, float("inf"))


@attack
def nan_f8(path):
    return _poison(path, torch.float8_e4m3fn, float("nan"))


@attack
def inf_f8_e5m2(path):
    return _poison(path, torch.float8_e5m2, float("inf"))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.__name__)
def test_refused_in_one_line(attack: Attack, tmp_path: Path) -> None:
    check_refused(attack, tmp_path)


def test_unchecked_read_returns_nan_as_it_is(tmp_path: Path) -> None:
    good_checkpoint(tmp_path / "m")
    _poison(tmp_path / "m", torch.float32, float("nan"))
    assert CheckpointReader(tmp_path / "m").read("model.c.weight").isnan().sum() == 1


@pytest.mark.parametrize("size", range(0, 400, 7))
def test_every_truncation_is_refused(size: int, tmp_path: Path) -> None:
    good_checkpoint(tmp_path / "m", sharded=False)
    file = tmp_path / "m" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_everything(tmp_path / "m")


@pytest.mark.parametrize("seed", range(40))
def test_flipped_header_bytes_never_crash(seed: int, tmp_path: Path) -> None:
    """Random damage: either it is refused with our error, or what is read has the shapes it says."""
    good_checkpoint(tmp_path / "m", sharded=False)
    file = tmp_path / "m" / "model.safetensors"
    data = bytearray(file.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    for at in torch.randint(0, 8 + data[0], (3,), generator=generator).tolist():
        data[at] = int(torch.randint(0, 256, (1,), generator=generator))
    file.write_bytes(data)
    try:
        with CheckpointReader(tmp_path / "m") as reader:
            for name in reader.names():
                assert tuple(reader.read(name).shape) == reader.info(name).shape
    except CheckpointError as error:
        assert "\n" not in str(error) and "model" in str(error)
