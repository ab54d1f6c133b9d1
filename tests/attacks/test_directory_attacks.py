"""Bad config.json, pickles, wrong directories: each is refused in one line, quickly."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from attack_support import (
    INDEX,
    ONE,
    TWO,
    Attack,
    check_refused,
)

ATTACKS: list[Attack] = []


def attack(function: Attack) -> Attack:
    ATTACKS.append(function)
    return function


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


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.__name__)
def test_refused_in_one_line(attack: Attack, tmp_path: Path) -> None:
    check_refused(attack, tmp_path)
