"""Hostile, damaged and merely wrong model directories: each is refused in one line, quickly.

An attack is a function that spoils a good checkpoint (a directory) and returns words that the error has
to contain: the file, and the tensor if one is to blame.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.checkpoint import CheckpointReader
from quantkit.errors import CheckpointError, ConfigError, QuantkitError

INDEX = "model.safetensors.index.json"
ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"
ATTACKS = {}


def attack(function):
    ATTACKS[function.__name__] = function
    return function


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


# -- the index -------------------------------------------------------------------------------------


@attack
def index_not_json(path):
    (path / INDEX).write_text("{weight_map: ")
    return [INDEX, "JSON"]


@attack
def index_a_list(path):
    (path / INDEX).write_text("[]")
    return [INDEX, "weight_map"]


@attack
def index_without_map(path):
    (path / INDEX).write_text('{"metadata": {}}')
    return [INDEX, "weight_map"]


@attack
def index_map_empty(path):
    write_index(path, {})
    return [INDEX]


@attack
def index_map_of_numbers(path):
    write_index(path, {"model.a.weight": 7})
    return [INDEX, "model.a.weight"]


@attack
def index_deep(path):
    (path / INDEX).write_text("[" * 500_000)
    return [INDEX, "deep"]


@attack
def index_repeats_a_key(path):
    pairs = [*weight_map(path).items(), ("model.a.weight", TWO)]
    body = ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in pairs)
    (path / INDEX).write_text(f'{{"weight_map":{{{body}}}}}')
    return [INDEX, "model.a.weight", "twice"]


def _redirect(path: Path, to: str) -> list[str]:
    write_index(path, {**weight_map(path), "model.c.weight": to})
    return [INDEX, "model.c.weight"]


@attack
def index_traversal(path):
    save_file({"model.c.weight": torch.zeros(1)}, path.parent / "outside.safetensors")
    return _redirect(path, "../outside.safetensors")


@attack
def index_absolute(path):
    save_file({"model.c.weight": torch.zeros(1)}, path.parent / "outside.safetensors")
    return _redirect(path, str(path.parent / "outside.safetensors"))


@attack
def index_subdirectory(path):
    (path / "sub").mkdir()
    shutil.copy(path / TWO, path / "sub" / TWO)
    return _redirect(path, f"sub/{TWO}")


@attack
def index_backslash(path):
    return _redirect(path, "..\\outside.safetensors")


@attack
def index_nul(path):
    return _redirect(path, f"{TWO}\0.safetensors")


@attack
def index_surrogate(path):
    return _redirect(path, "\ud800.safetensors")[:1]


@attack
def index_pickle(path):
    torch.save({"model.c.weight": torch.zeros(1)}, path / "pytorch_model.bin")
    return _redirect(path, "pytorch_model.bin")


@attack
def index_device(path):
    return _redirect(path, "/dev/zero")


@attack
def shard_missing(path):
    (path / TWO).unlink()
    return [TWO, "missing"]


@attack
def shard_is_directory(path):
    (path / TWO).unlink()
    (path / TWO).mkdir()
    return [TWO, "regular"]


@attack
def shard_is_pipe(path):
    (path / TWO).unlink()
    os.mkfifo(path / TWO)
    return [TWO, "regular"]


@attack
def shard_lacks_tensor(path):
    save_file({"model.c.bias": torch.zeros(4)}, path / TWO)
    return [TWO, "model.c.weight"]


@attack
def shard_has_more(path):
    save_file(
        {"model.c.bias": torch.zeros(4), "model.c.weight": torch.zeros(4), "hidden": torch.zeros(1)},
        path / TWO,
    )
    return [TWO, "hidden", INDEX]


@attack
def tensor_in_two_shards(path):
    extra = {
        "model.c.weight": torch.zeros(4),
        "model.c.bias": torch.zeros(4),
        "model.a.weight": torch.ones(7, 5),
    }
    save_file(extra, path / TWO)
    return [TWO, "model.a.weight"]


@attack
def shard_not_in_index(path):
    save_file({"model.d.weight": torch.zeros(4)}, path / "model-00003-of-00003.safetensors")
    return ["model-00003-of-00003.safetensors", INDEX]


@attack
def shards_without_index(path):
    (path / INDEX).unlink()
    return [path.name, INDEX]


@attack
def single_file_beside_index(path):
    save_file({"model.d.weight": torch.zeros(4)}, path / "model.safetensors")
    return ["model.safetensors is not in", INDEX]


@attack
def single_file_beside_stray_shard(path):
    (path / INDEX).unlink()
    (path / TWO).unlink()
    save_file({"model.d.weight": torch.zeros(4)}, path / "model.safetensors")
    return [ONE]


# -- links -----------------------------------------------------------------------------------------


@attack
def symlink_out(path):
    shutil.move(path / TWO, path.parent / "elsewhere.safetensors")
    (path / TWO).symlink_to(path.parent / "elsewhere.safetensors")
    return [TWO, "link"]


@attack
def symlink_relative_out(path):
    shutil.move(path / TWO, path.parent / "elsewhere.safetensors")
    (path / TWO).symlink_to("../elsewhere.safetensors")
    return [TWO, "link"]


@attack
def symlink_chain_out(path):
    shutil.move(path / TWO, path.parent / "elsewhere.safetensors")
    (path / "hop").symlink_to("../elsewhere.safetensors")
    (path / TWO).symlink_to("hop")
    return [TWO, "link"]


@attack
def symlink_to_false_blobs(path):
    (path.parent / "blobs").mkdir()
    shutil.move(path / TWO, path.parent / "blobs" / "00")
    (path / TWO).symlink_to("../blobs/00")
    return [TWO, "link"]


@attack
def symlink_loop(path):
    (path / TWO).unlink()
    (path / TWO).symlink_to(TWO)
    return [TWO]


@attack
def symlink_dangling(path):
    (path / TWO).unlink()
    (path / TWO).symlink_to("nowhere.safetensors")
    return [TWO, "dangling"]


@attack
def config_leads_out(path):
    shutil.move(path / "config.json", path.parent / "config.json")
    (path / "config.json").symlink_to("../config.json")
    return ["config.json", "link"]


@attack
def tokenizer_leaks_a_file(path):
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.json").symlink_to("/etc/passwd")
    return ["tokenizer.json", "link"]


@attack
def template_leaks_a_file(path):
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "a.jinja").symlink_to("/etc/passwd")
    return ["a.jinja", "link"]


# -- config.json -------------------------------------------------------------------------------------


@attack
def config_missing(path):
    (path / "config.json").unlink()
    return ["config.json", "missing"]


@attack
def config_not_json(path):
    (path / "config.json").write_text("model_type: llama")
    return ["config.json", "JSON"]


@attack
def config_empty(path):
    (path / "config.json").write_text("")
    return ["config.json", "JSON"]


@attack
def config_list(path):
    (path / "config.json").write_text("[1]")
    return ["config.json", "list"]


@attack
def config_deep(path):
    (path / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    return ["config.json", "deep"]


@attack
def config_a_little_too_deep(path):
    (path / "config.json").write_text('{"a":' * 300 + "1" + "}" * 300)
    return ["config.json", "deep"]


@attack
def config_repeats_a_key(path):
    (path / "config.json").write_text('{"model_type": "llama", "model_type": "gpt2"}')
    return ["config.json", "model_type"]


@attack
def config_huge_number(path):
    (path / "config.json").write_text('{"hidden_size": ' + "9" * 10_000 + "}")
    return ["config.json"]


@attack
def config_not_utf8(path):
    (path / "config.json").write_bytes(b'{"model_type": "\xff\xfe"}')
    return ["config.json", "UTF-8"]


@attack
def config_half_a_surrogate(path):
    (path / "config.json").write_text('{"model_type": "\\ud83d"}')
    return ["config.json", "Unicode"]


@attack
def config_huge_file(path):
    with (path / "config.json").open("wb") as file:
        file.truncate(20 << 30)
    return ["config.json"]


@attack
def config_is_directory(path):
    (path / "config.json").unlink()
    (path / "config.json").mkdir()
    return ["config.json"]


# -- directories -------------------------------------------------------------------------------------


@attack
def pickle_only(path):
    for name in (ONE, TWO, INDEX):
        (path / name).unlink()
    torch.save({"model.c.weight": torch.zeros(1)}, path / "pytorch_model.bin")
    return ["pytorch_model.bin", "safetensors"]


@attack
def gguf_only(path):
    for name in (ONE, TWO, INDEX):
        (path / name).unlink()
    (path / "model.gguf").write_bytes(b"GGUF")
    return ["model.gguf"]


@attack
def other_safetensors_only(path):
    for name in (TWO, INDEX):
        (path / name).unlink()
    (path / ONE).rename(path / "adapter_model.safetensors")
    return ["adapter_model.safetensors", INDEX]


@attack
def empty_directory(path):
    shutil.rmtree(path)
    path.mkdir()
    return [path.name, "empty"]


@attack
def a_file_instead(path):
    shutil.rmtree(path)
    path.write_bytes(b"model")
    return [path.name, "is a file"]


@attack
def nothing_there(path):
    shutil.rmtree(path)
    return [path.name, "does not exist"]


@attack
def file_name_not_utf8(path):
    with open(os.fsencode(path) + b"/tok\xff.json", "wb") as file:
        file.write(b"{}")
    return [path.name, "udcff"]


@attack
def file_name_with_newline(path):
    (path / "tok\nenizer.json").write_text("{}")
    return [path.name, "tok\\nenizer.json"]


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


# ----------------------------------------------------------------------------------------------------


def read_everything(path: Path) -> None:
    with CheckpointReader(path) as reader:
        reader.fingerprint()
        reader.other_files()
        for name in reader.names():
            reader.read(name, check_finite=True)


@pytest.mark.parametrize("name", ATTACKS)
def test_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model-dir"
    good_checkpoint(path)
    read_everything(path)
    words = ATTACKS[name](path)
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        read_everything(path)
    assert time.perf_counter() - start < 2
    message = str(caught.value)
    assert isinstance(caught.value, QuantkitError)
    assert "\n" not in message and message.isprintable() and 20 < len(message) < 1000, message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert isinstance(caught.value, ConfigError) == name.startswith("config_"), type(caught.value)
    # The chain of causes would be printed with --debug only, but must not be needed to understand.
    assert caught.value.__cause__ is None


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
    with pytest.raises(CheckpointError, match="model.safetensors"):
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
