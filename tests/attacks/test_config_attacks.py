"""config.json that lies about its weights, is a bomb, or asks to run code; tokenizers and side files too.

Each attack spoils a copy of a good tiny Llama (or GPT-2, Mixtral) checkpoint and returns words for the error.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_support import edit_json, edit_tensors, first_tensor, quantkit_command, refused

Attack = Callable[[Path], list[str]]
ATTACKS: dict[str, tuple[str, Attack]] = {}
MARKER = "code-ran"


def attack(family: str = "llama") -> Callable[[Attack], Attack]:
    def register(function: Attack) -> Attack:
        ATTACKS[function.__name__] = (family, function)
        return function

    return register


def lie(name: str, words: list[str], family: str = "llama", **changes: Any) -> None:
    """An attack that only changes keys of config.json."""

    def spoil(path: Path) -> list[str]:
        edit_json(path / "config.json", lambda config: config.update(changes))
        return words

    ATTACKS[name] = (family, spoil)


# -- sizes that are bombs, or are not those of the weights ---------------------------------------------------

lie("million_layers", ["config.json", "num_hidden_layers"], num_hidden_layers=10**6)
lie("ten_thousand_layers", ["config.json", "10000 layers"], num_hidden_layers=10_000)
lie("one_layer_too_many", ["layers.2", "missing"], num_hidden_layers=3)
lie("one_layer_too_few", ["config.json", "layer 1"], num_hidden_layers=1)
lie("negative_layers", ["config.json", "num_hidden_layers"], num_hidden_layers=-1)
lie("layers_as_text", ["config.json", "num_hidden_layers"], num_hidden_layers="2")
lie("half_a_layer", ["config.json", "num_hidden_layers"], num_hidden_layers=2.5)
lie("ten_thousand_experts", ["config.json", "experts"], "mixtral", num_local_experts=10_000)
lie("vocabulary_of_two_billion", ["tensor", "shape", "config.json"], vocab_size=2**31 - 1)
lie("vocabulary_beyond_32_bits", ["config.json", "vocab_size"], vocab_size=2**40)
lie("vocabulary_too_small", ["tensor", "shape", "[256, 64]"], vocab_size=255)
lie("hidden_size_huge", ["shape"], hidden_size=2**30)
lie("hidden_size_as_text", ["config.json"], hidden_size="64")
lie("intermediate_size_wrong", ["mlp", "shape"], intermediate_size=97)
lie("zero_heads", ["config.json", "num_attention_heads"], num_attention_heads=0)
lie("negative_heads", ["config.json", "num_attention_heads"], num_attention_heads=-4)
lie("too_many_key_heads", ["k_proj", "shape"], num_key_value_heads=4)
lie("head_dim_huge", ["_proj", "shape"], head_dim=2**20)
lie("positions_beyond_32_bits", ["config.json", "max_position"], max_position_embeddings=10**12)
lie("positions_of_gpt2", ["wpe", "shape"], "gpt2", n_positions=2**30)
lie("activation_unknown", ["config.json"], hidden_act="__import__('os').system('id')")
lie("model_type_unknown", ["config.json", "no_such"], model_type="no_such")
lie("model_type_a_list", ["config.json"], model_type=["llama"])
lie("model_type_of_another", ["config.json"], model_type="whisper")
lie("architecture_unknown", ["config.json", "NoSuchModel"], architectures=["NoSuchModel"])
lie("architecture_no_model", ["config.json", "Trainer"], architectures=["Trainer"])
lie("architecture_of_another", ["config.json", "BertModel"], architectures=["BertModel"])
lie("dtype_unknown", ["config.json"], dtype="float3")
lie(
    "nan_in_the_config", ["config.json", "NaN"], rope_parameters={"rope_type": "yarn", "factor": float("nan")}
)
lie("rope_unknown", ["config.json", "spiral"], rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})

# -- ways around trust_remote_code ---------------------------------------------------------------------------

KERNEL = "evil-org/evil-kernel"
lie("trusts_itself", ["config.json", "trust_remote_code"], trust_remote_code=True)
lie("trusts_itself_nested", ["trust_remote_code"], text_config={"trust_remote_code": True})
lie("trusts_itself_in_a_list", ["trust_remote_code"], parts=[{"deep": {"trust_remote_code": 1}}])
lie("kernel_attention", ["config.json", KERNEL], attn_implementation=KERNEL)
lie("kernel_attention_private", ["config.json", KERNEL], _attn_implementation=KERNEL)
lie("kernel_attention_internal", ["config.json", KERNEL], _attn_implementation_internal=KERNEL)
lie("kernel_attention_by_part", [KERNEL], attn_implementation={"text_config": f"flash|{KERNEL}@v1:f"})
lie("kernel_experts", ["config.json", KERNEL], experts_implementation=KERNEL)


def _code(path: Path, file: str = "evil.py") -> None:
    marker = path.parent / MARKER
    body = f"open({str(marker)!r}, 'w').close()\nclass Evil:\n    pass\nEvilConfig = EvilTokenizer = Evil\n"
    (path / file).write_text(body)


@attack()
def auto_map_of_an_unknown_type(path):
    _code(path)
    names = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    edit_json(path / "config.json", lambda c: c.update(model_type="evil", auto_map=names))
    return ["config.json", "--trust-remote-code"]


@attack()
def auto_map_into_another_repository(path):
    names = {"AutoConfig": "evil/repo--evil.EvilConfig", "AutoModelForCausalLM": "evil/repo--evil.Evil"}
    edit_json(path / "config.json", lambda c: c.update(model_type="evil", auto_map=names))
    return ["config.json", "--trust-remote-code"]


@attack()
def auto_map_of_an_unknown_architecture(path):
    _code(path)
    changes = {"architectures": ["EvilForCausalLM"], "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    edit_json(path / "config.json", lambda c: c.update(changes))
    return ["config.json", "EvilForCausalLM", "--trust-remote-code"]


# -- weights -------------------------------------------------------------------------------------------------


@attack()
def tensor_missing(path):
    name = first_tensor(path, "layers.1.mlp.up_proj")
    edit_tensors(path, lambda t: t.pop(name))
    return [name, "missing"]


@attack()
def weight_transposed(path):
    name = first_tensor(path, "down_proj")
    edit_tensors(path, lambda t: t.update({name: t[name].t()}))
    return [name, "shape"]


@attack()
def tensor_twice_under_two_names(path):
    name = first_tensor(path, "layers.0.mlp.up_proj")
    edit_tensors(path, lambda t: t.update({name.removeprefix("model."): t[name].clone()}))
    return ["two tensors", "up_proj"]


def _poison(pattern: str, value: float) -> Attack:
    def spoil(path: Path) -> list[str]:
        name = first_tensor(path, pattern)
        edit_tensors(path, lambda t: t[name].view(-1)[-1:].fill_(value))
        return [name, "NaN or infinite", "model.safetensors"]

    return spoil


ATTACKS["nan_in_a_weight"] = ("llama", _poison("down_proj", float("nan")))
ATTACKS["inf_in_a_weight"] = ("llama", _poison("o_proj", float("inf")))
ATTACKS["nan_in_a_norm"] = ("llama", _poison("layers.1.input_layernorm", float("nan")))
ATTACKS["inf_in_the_embedding"] = ("llama", _poison("embed_tokens", float("-inf")))
ATTACKS["nan_in_an_expert"] = ("mixtral", _poison("experts", float("nan")))


# -- files beside the weights --------------------------------------------------------------------------------


@attack()
def template_of_20_gigabytes(path):
    with (path / "chat_template.jinja").open("wb") as file:
        file.truncate(20 << 30)
    return ["chat_template.jinja", "bytes"]


@attack()
def tokenizer_of_200_megabytes(path):
    with (path / "tokenizer.json").open("wb") as file:
        file.truncate(200 << 20)
    return ["tokenizer.json", "bytes"]


@attack()
def config_of_100_megabytes(path):
    (path / "config.json").write_bytes(b'{"a": [' + b"1," * (50 << 20) + b"1]}")
    return ["config.json", "bytes"]


@pytest.fixture(scope="module")
def old(tiny, tmp_path_factory) -> Path:
    """A checkpoint that a refused conversion must leave alone; making it also warms up the imports."""
    out = tmp_path_factory.mktemp("old") / "old"
    code, _, err = quantkit_command("convert", tiny("llama"), "--format", "nf4", "-o", out)
    assert code == 0, err
    for other in ("gpt2", "mixtral"):
        quantkit_command("convert", tiny(other), "--format", "nf4", "--dry-run")
    quantkit_command("eval", tiny("llama"), "--tokens", "64", "--window", "32", "--cache", "none")
    return out


@pytest.mark.parametrize("name", ATTACKS)
def test_convert_and_eval_refuse(name: str, tiny, old: Path, tmp_path: Path) -> None:
    family, spoil = ATTACKS[name]
    source = tmp_path / "source"
    shutil.copytree(tiny(family), source)
    words = spoil(source)
    dest = tmp_path / "here" / "out"
    shutil.copytree(old, dest)
    refused("convert", source, "--format", "nf4", "-o", dest, "--overwrite", words=words, destination=dest)
    assert not (tmp_path / MARKER).exists()
    if not name.startswith("template"):  # what is only carried over is no matter of loading
        refused("eval", source, "--tokens", "64", "--cache", "none", words=[])
        assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("name", ["nan_in_a_weight", "nan_in_a_norm", "inf_in_the_embedding"])
def test_calibrated_conversion_refuses(name: str, tiny, old: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("llama"), source)
    words = ATTACKS[name][1](source)
    rows = [{"input_ids": torch.randint(3, 256, (32,)).tolist()} for _ in range(4)]
    (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dest = tmp_path / "here" / "out"
    shutil.copytree(old, dest)
    arguments = ["convert", source, "--format", "gptq", "--group-size", "32", "-o", dest, "--overwrite"]
    arguments += ["--calibration", tmp_path / "ids.jsonl", "--samples", "4", "--seqlen", "32"]
    before = sorted(p.name for p in dest.parent.iterdir())
    code, _, err = quantkit_command(*arguments)
    assert code not in (0, 70) and all(word in err for word in words), err
    assert [p for p in sorted(p.name for p in dest.parent.iterdir()) if not p.startswith(".")] == before


# -- what is carried along is never run ----------------------------------------------------------------------


def test_code_beside_a_stock_model_is_copied_and_never_run(tiny, tmp_path: Path) -> None:
    """auto_map beside a type that transformers knows, code for generation, templates that call or never end."""
    source = tmp_path / "source"
    shutil.copytree(tiny("llama"), source)
    _code(source)
    (source / "custom_generate").mkdir()
    _code(source / "custom_generate", "generate.py")
    edit_json(
        source / "config.json",
        lambda c: c.update(auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}),
    )
    edit_json(
        source / "tokenizer_config.json",
        lambda c: c.update(
            chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}",
            auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]},
        ),
    )
    bomb = "{% for i in range(10**9) %}{% for j in range(10**9) %}{{ i * j }}{% endfor %}{% endfor %}"
    (source / "chat_template.jinja").write_text(bomb)
    out = tmp_path / "out"
    code, _, err = quantkit_command("convert", source, "--format", "nf4", "-o", out)
    assert code == 0, err
    assert (out / "chat_template.jinja").read_text() == bomb
    assert (out / "evil.py").read_bytes() == (source / "evil.py").read_bytes()
    for command in (
        ["inspect", out],
        ["verify", out, "--loader", "none"],
        ["eval", out, "--tokens", "64", "--window", "32", "--cache", "none"],
        ["generate", out, "-p", "a", "--max-new-tokens", "1"],
    ):
        code, _, err = quantkit_command(*command)
        assert code in (0, 3), err  # the tokenizer's auto_map may be refused, too
    assert not list(tmp_path.rglob(MARKER))


TOKENIZERS: dict[str, Any] = {
    "not JSON": "{",
    "a list": "[]",
    "deep": "[" * 100_000,
    "no model": '{"version": "1.0"}',
    "unknown model": '{"version": "1.0", "model": {"type": "Evil"}}',
    "merge of unknown tokens": '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
    "id beyond 32 bits": '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 99999999999}, "merges": []}}',
    "evil class": ("tokenizer_config.json", '{"tokenizer_class": "os.system"}'),
    "code": ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", null]}}'),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_broken_tokenizers_are_refused(kind: str, tiny, old: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("llama"), source)
    _code(source)
    spoiled = TOKENIZERS[kind]
    file, text = spoiled if isinstance(spoiled, tuple) else ("tokenizer.json", spoiled)
    if isinstance(spoiled, tuple):
        (source / "tokenizer.json").unlink()
    (source / file).write_text(text)
    words = [source.name, "tokenizer"]
    refused("convert", source, "--format", "gptq", "-o", tmp_path / "out", words=words)
    refused("eval", source, "--cache", "none", words=words)
    refused("generate", source, "-p", "hello", words=words)
    assert not (tmp_path / "out").exists() and not (tmp_path / MARKER).exists()


CALIBRATION: dict[str, tuple[str, bytes, str]] = {
    "empty": ("c.txt", b"", "empty"),
    "blank": ("c.txt", b" \n" * 1000, "empty"),
    "binary": ("c.txt", b"\x80\xff" * 100, "UTF-8"),
    "too short": ("c.txt", b"abc", "tokens"),
    "not JSON": ("c.jsonl", b'{"text": "a"}\n{"text": ', "line 2"),
    "deep": ("c.jsonl", b"[" * 100_000, "line 1"),
    "no text": ("c.jsonl", b'{"a": 1}', "line 1"),
    "text a number": ("c.jsonl", b'{"text": 5}', "row 1"),
    "ids of text": ("c.jsonl", b'{"input_ids": ["a"]}', "row 1"),
    "ids negative": ("c.jsonl", b'{"input_ids": [-1' + b", 5" * 40 + b"]}", "-1"),
    "ids beyond vocabulary": ("c.jsonl", b'{"input_ids": [256' + b", 5" * 40 + b"]}", "256"),
    "ids beyond 64 bits": ("c.jsonl", b'{"input_ids": [' + b"9" * 30 + b", 5" * 40 + b"]}", "row 1"),
    "rows of two kinds": ("c.jsonl", b'{"input_ids": [' + b"5, " * 40 + b'5]}\n{"text": "a"}', "row 2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CALIBRATION)
def test_bad_calibration_data_is_refused(kind: str, tiny, old: Path, tmp_path: Path) -> None:
    file, data, word = CALIBRATION[kind]
    (tmp_path / file).write_bytes(data)
    arguments = ["convert", tiny("llama"), "--format", "gptq", "-o", tmp_path / "out", "--seqlen", "32"]
    arguments += ["--samples", "4", "--calibration", tmp_path / file]
    refused(*arguments, words=[file, word])
    assert not (tmp_path / "out").exists()
