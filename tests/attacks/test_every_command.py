"""One attack of every family, on every command: the table in docs/reliability.md.

The other files of this folder try many variants of a family on the commands that go deepest; here nothing may
be forgotten. `convert` gets the unquantized model, everything else a GPTQ checkpoint, spoilt alike.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_support import (
    WEIGHTS,
    check_line,
    edit_json,
    edit_tensors,
    first_tensor,
    limited,
    quantkit_command,
    refused,
)

import quantkit
from quantkit.errors import QuantkitError

NORM = "model.norm.weight"
COMMANDS = ("convert", "load", "inspect", "verify", "eval", "export", "generate")
FAMILIES: dict[str, Callable[[Path], list[str]]] = {}
#: What a command does not look at and so does not refuse: it must end well. `inspect` reads headers only; what is
#: only carried along (tokenizer) is no matter for those that need none.
UNSEEN = {
    ("a NaN", "inspect"),
    ("codes out of range", "inspect"),
    ("tensor missing", "inspect"),
    ("shape of a norm", "inspect"),
    ("a million layers", "inspect"),
    ("trust_remote_code in config.json", "inspect"),
    ("auto_map of an unknown type", "inspect"),
    ("kernel from the hub", "inspect"),
    ("tokenizer that is none", "inspect"),
    ("tokenizer that is none", "load"),
    ("tokenizer that is none", "convert"),
    ("tokenizer that is none", "verify"),
    ("tokenizer that is none", "export"),
    ("unknown quant_method", "inspect"),
}
#: Families that only a quantized checkpoint can have.
QUANTIZED = {"codes out of range"}


def family(name: str) -> Callable[[Callable[[Path], list[str]]], Callable[[Path], list[str]]]:
    def register(spoil: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
        FAMILIES[name] = spoil
        return spoil

    return register


@family("header longer than the file")
def header(path):
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(data) * 2) + data[8:])
    return [WEIGHTS]


@family("body cut off")
def body(path):
    os.truncate(path / WEIGHTS, (path / WEIGHTS).stat().st_size - 5)
    return [WEIGHTS]


@family("index that leads out")
def index(path):
    shutil.copy(path / WEIGHTS, path.parent / "outside.safetensors")
    weight_map = {"weight_map": {NORM: "../outside.safetensors"}}
    (path / f"{WEIGHTS}.index.json").write_text(json.dumps(weight_map))
    return ["index.json", NORM]


@family("link that leads out")
def link(path):
    shutil.move(path / WEIGHTS, path.parent / "elsewhere")
    (path / WEIGHTS).symlink_to("../elsewhere")
    return [WEIGHTS, "link"]


@family("unknown dtype")
def dtype(path):
    data = (path / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = data[8 : 8 + length].replace(b'"F32"', b'"F31"').replace(b'"F16"', b'"F15"')
    (path / WEIGHTS).write_bytes(data[:8] + text + data[8 + length :])
    return [WEIGHTS]


@family("shape of a norm")
def shape(path):
    edit_tensors(path, lambda t: t.update({NORM: t[NORM][:-1]}))
    return [NORM, "shape"]


@family("tensor missing")
def missing(path):
    edit_tensors(path, lambda t: t.pop(NORM))
    return [NORM, "missing"]


@family("a NaN")
def nan(path):
    edit_tensors(path, lambda t: t[NORM].view(-1)[-1:].fill_(float("nan")))
    return [NORM, "NaN"]


@family("unknown quant_method")
def method(path):
    edit_json(path / "config.json", lambda c: c.update(quantization_config={"quant_method": "evil"}))
    return ["evil"]


@family("codes out of range")
def codes(path):
    name = first_tensor(path, r"q_proj\.g_idx$")
    edit_tensors(path, lambda t: t[name].fill_(99))
    return ["g_idx"]


@family("a million layers")
def bomb(path):
    edit_json(path / "config.json", lambda c: c.update(num_hidden_layers=10**6))
    return ["config.json", "num_hidden_layers"]


@family("deep JSON")
def deep(path):
    (path / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    return ["config.json", "deep"]


@family("pickled weights")
def pickled(path):
    (path / WEIGHTS).unlink()
    torch.save({NORM: torch.zeros(1)}, path / "pytorch_model.bin")
    return ["pytorch_model.bin", "safetensors"]


@family("trust_remote_code in config.json")
def trust(path):
    edit_json(path / "config.json", lambda c: c.update(trust_remote_code=True))
    return ["config.json", "trust_remote_code"]


@family("auto_map of an unknown type")
def auto_map(path):
    (path / "evil.py").write_text(f"open({str(path.parent / 'ran')!r}, 'w')\nclass Evil: pass\n")
    names = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    edit_json(path / "config.json", lambda c: c.update(model_type="evil", auto_map=names))
    return ["config.json", "--trust-remote-code"]


@family("kernel from the hub")
def kernel(path):
    edit_json(path / "config.json", lambda c: c.update(_attn_implementation_internal="evil/kernel"))
    return ["config.json", "evil/kernel"]


@family("template of 20 GB")
def template(path):
    with (path / "chat_template.jinja").open("wb") as file:
        file.truncate(20 << 30)
    return ["chat_template.jinja", "bytes"]


@family("tokenizer that is none")
def tokenizer(path):
    (path / "tokenizer.json").write_text("{")
    return ["tokenizer"]


@family("an export instead")
def export(path):
    """An ONNX model whose external data is said to lie outside, as a directory that commands are pointed at."""
    (path / WEIGHTS).unlink()
    onnx = pytest.importorskip("onnx")
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=1)
    tensor.external_data.add(key="location", value="../outside.safetensors")
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    onnx.save(onnx.helper.make_model(graph), path / "model.onnx")
    return ["model.onnx", "no safetensors"]


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory) -> dict[bool, Path]:
    """quantized? -> directory; making them also warms up the imports of every command."""
    out = tmp_path_factory.mktemp("models") / "gptq"
    ids = torch.randint(3, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    quantkit.convert(
        tiny("llama"), out, format="gptq", options={"group_size": 32, "desc_act": True}, calibration=ids, samples=4,
        seqlen=32,
    )  # fmt: skip
    for command in COMMANDS:
        if command not in ("convert", "load", "export"):
            code, _, err = quantkit_command(*arguments(command, out, out.parent / "x"))
            assert code == 0, (command, err)
    importlib.import_module("quantkit.export.api")

    return {True: out, False: tiny("llama")}


def arguments(command: str, path: Path, dest: Path) -> list[object]:
    few = ["--tokens", "64", "--window", "32", "--cache", "none"]
    return {
        "convert": ["convert", path, "--format", "nf4", "-o", dest],
        "inspect": ["inspect", path],
        "verify": ["verify", path, "--loader", "none"],
        "eval": ["eval", path, *few],
        "export": ["export", path, "-o", dest],
        "generate": ["generate", path, "-p", "a", "--max-new-tokens", "1"],
    }[command]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_refused(name: str, command: str, models: dict[bool, Path], tmp_path: Path) -> None:
    if command == "convert" and name in QUANTIZED:
        pytest.skip("an unquantized model has none")
    path, dest = tmp_path / "model", tmp_path / "dest"
    shutil.copytree(models[command != "convert"], path)
    (path / "quantkit_manifest.json").unlink(missing_ok=True)  # a stranger would make it fit
    words = FAMILIES[name](path)
    unseen = (name, command) in UNSEEN
    if command == "load":
        with limited():
            try:
                quantkit.load(path)
                assert unseen
            except QuantkitError as error:
                check_line(str(error), words)
    elif unseen:
        if command == "export":  # what it takes along is not read; the export itself takes seconds
            pytest.skip("tests/attacks/test_state_attacks.py looks at what an export takes along")
        code, _, err = quantkit_command(*arguments(command, path, dest))
        assert code == 0, err
    elif command == "verify":  # it reports what it finds in a table, and refuses what cannot be read
        with limited():
            code, out, err = quantkit_command(*arguments(command, path, dest))
        assert code not in (0, 70) and "Traceback" not in err, (code, out, err)
    else:
        refused(*arguments(command, path, dest), words=words)
    assert not (tmp_path / "ran").exists()
    assert not dest.exists() or (unseen and command == "convert")
