"""`quantkit.inspect` on files of ours and of other tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import quantkit
from quantkit.errors import CheckpointError, ConfigError
from quantkit.inspect import inspect

#: Golden checkpoint -> (format, bits, words of its commonest kind of layer).
GOLDEN = {
    "gptq_llama_g128": ("gptq", 4, "group_size 128"),
    "gptq_llama_b3": ("gptq", 3, "group_size"),
    "gptq_qwen2_asym_act_g64": ("gptq", 4, "group_size 64"),
    "awq_llama_gemm_g128": ("awq", 4, "group_size 128"),
    "nf4_llama_dq1_bfloat16": ("nf4", 4, "block_size 64"),
    "ct_llama_FP8_DYNAMIC": ("compressed-tensors", 8, ""),
}


def dense_weights(path: Path) -> int:
    """Elements of all linear weights of the decoder layers, from the source's header."""
    from quantkit.checkpoint import CheckpointReader

    with CheckpointReader(path) as reader:
        return sum(
            i.shape[0] * i.shape[1] for i in reader.infos() if "layers" in i.name and len(i.shape) == 2
        )


@pytest.mark.parametrize("name", GOLDEN)
def test_other_tools_files(shared: Path, name: str) -> None:
    path = shared / "golden" / name
    if not path.is_dir():
        pytest.skip(f"{path} is absent")
    report = inspect(path)
    fmt, bits, kind = GOLDEN[name]
    assert report.format == fmt
    assert len(report.kinds()) == 1 and kind in report.kinds()[0][0]
    assert {layer.bits for layer in report.layers} == {bits}
    source = shared / "golden" / "sources" / ("qwen2" if "qwen2" in name else "llama")
    assert sum(layer.weights for layer in report.layers) == dense_weights(source)
    assert report.bits_per_weight is not None and bits < report.bits_per_weight < bits + 1
    assert report.quantized_size < report.size == sum(d.size for d in report.dtypes)
    plain = json.loads(json.dumps(report.to_json()))
    assert plain["architecture"].endswith("ForCausalLM")


OPTIONS = {
    "nf4": ({}, 4),
    "gptq": ({"group_size": 32, "bits": 3}, 3),
    "awq": ({"group_size": 32}, 4),
    "hqq": ({"group_size": 32, "bits": 3}, 3),
    "fp8": ({}, 8),
    "ternary": ({}, 2),
}


@pytest.mark.parametrize("fmt", OPTIONS)
def test_our_files(tiny: Callable[..., Path], tmp_path: Path, ids: torch.Tensor, fmt: str) -> None:
    source = tiny("llama")
    options, bits = OPTIONS[fmt]
    done = quantkit.convert(
        source, tmp_path / "out", format=fmt, options=options, calibration=ids, samples=6, seqlen=48
    )
    report = quantkit.inspect(tmp_path / "out")
    assert report.format == fmt and {layer.bits for layer in report.layers} == {bits}
    assert len(report.layers) == len(done.quantized)  # type: ignore[arg-type]
    weights = sum(layer.shape[0] * layer.shape[1] for layer in done.quantized)  # type: ignore[misc]
    assert sum(layer.weights for layer in report.layers) == weights
    assert report.bits_per_weight == pytest.approx(done.bits_per_weight, rel=0.02)
    assert report.bits_per_weight_model == pytest.approx(done.bits_per_weight_model, rel=0.02)
    assert report.tokenizer and report.warnings == []
    assert report.provenance["quantkit_version"] == quantkit.__version__
    assert report.provenance["quantized_by"] == "quantkit"


def test_an_unquantized_model(tiny: Callable[..., Path]) -> None:
    report = inspect(tiny("gpt2"))
    assert report.format is None and report.layers == [] and report.bits_per_weight is None
    assert report.bits_per_weight_model == 32.0 and report.model_type == "gpt2"


def write(path: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_what_is_odd_is_said(tmp_path: Path) -> None:
    weight = {"a.weight": torch.zeros(4, 4)}
    report = inspect(write(tmp_path / "a", weight, quantization_config={"quant_method": "eetq"}))
    assert report.format is None and report.quant_method == "eetq"
    assert any("eetq" in text for text in report.warnings)
    lies = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    report = inspect(write(tmp_path / "b", weight, quantization_config=lies))
    assert report.layers == [] and any("no tensor is quantized" in text for text in report.warnings)
    assert any("tokenizer" in text for text in report.warnings)


def test_a_changed_size_is_said(tiny: Callable[..., Path], tmp_path: Path) -> None:
    quantkit.convert(tiny("llama"), tmp_path / "out", format="nf4")
    with (tmp_path / "out" / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert any("tokenizer.json" in text for text in inspect(tmp_path / "out").warnings)


def test_what_is_wrong_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        inspect(tmp_path / "absent")
    with pytest.raises(ConfigError, match="quant_method"):
        inspect(write(tmp_path / "a", {"x": torch.zeros(1)}, quantization_config={"bits": 4}))
    shape = {"l.W_q": torch.zeros(2, 2, dtype=torch.uint8), "l.shape": torch.tensor([-1, 8])}
    lies = {
        "quant_method": "hqq",
        "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}},
    }
    with pytest.raises(CheckpointError, match="shape"):
        inspect(write(tmp_path / "b", shape, quantization_config=lies))
