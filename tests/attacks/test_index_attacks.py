"""Indexes that lie, shards that do not fit, links that lead out: each is refused in one line, quickly."""

from __future__ import annotations

import json
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
    weight_map,
    write_index,
)
from safetensors.torch import save_file

ATTACKS: list[Attack] = []


def attack(function: Attack) -> Attack:
    ATTACKS.append(function)
    return function


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


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.__name__)
def test_refused_in_one_line(attack: Attack, tmp_path: Path) -> None:
    check_refused(attack, tmp_path)
