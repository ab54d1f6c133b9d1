"""ONNX export: what onnxruntime computes is what the quantkit model computes, and the files stay packed.

The export proves itself (prefill and decode, left padding); these tests add what the proof does not: other
batch and sequence sizes, sizes of files, operators, bad input.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_support import convert, fresh_error

import quantkit
from quantkit.algorithms.codebook import table
from quantkit.errors import DestinationError, UsageError
from quantkit.export.api import export
from quantkit.export.onnx_codebook import planes
from quantkit.export.onnx_graph import CacheShape
from quantkit.export.onnx_run import OnnxRunner
from quantkit.kernels.dispatch import use_reference

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def converted(tiny: Callable[..., Path], tmp_path: Path, family: str, format: str, **options: Any) -> Path:
    return convert(tiny(family), tmp_path / f"{family}-{format}", format, **options)


def compare_fresh(checkpoint: Path, artifact: Path, batch: int, prompt: int, *, level: int = 1) -> float:
    """Largest relative error on fresh random tokens: a prompt, then more at once, then one.

    More at once is three for one row; GroupQueryAttention takes only one beside a past for several.
    """
    activations = "int8" if level == 4 else "exact"
    model = quantkit.load(checkpoint, dtype="float32", cpu_activations=activations)
    runner = OnnxRunner(artifact, CacheShape.of(model), use_cache=True, level=level)
    chunk = 3 if batch == 1 else 1
    return fresh_error(model, runner, batch, (prompt, chunk, 1))


# float32 sums in another order: 1e-5 is ten times what was seen. Ternary rounds activations to int8, where
# the last bit of a sum decides a tie.
@pytest.mark.parametrize(("family", "format", "limit"), [("llama", "gptq", 1e-5), ("qwen2", "nf4", 1e-5)])
def test_fresh_inputs(
    tiny: Callable[..., Path], tmp_path: Path, family: str, format: str, limit: float
) -> None:
    checkpoint = converted(tiny, tmp_path, family, format)
    result = export(checkpoint, tmp_path / "onnx")
    assert result.proof.steps == 10 and result.proof.max_error <= result.proof.atol
    # q, k, v are one product, and gate and up; with act-order the columns of x are gathered once for them.
    operator, count = {"gptq": ("com.microsoft::MatMulNBits", 8), "nf4": ("MatMul", 15)}[format]
    assert result.nodes[operator] == count
    assert result.nodes["com.microsoft::GroupQueryAttention"] == 2
    for batch, prompt in ((1, 1), (1, 17), (3, 5)):
        assert compare_fresh(checkpoint, tmp_path / "onnx", batch, prompt) < limit
    config = json.loads((tmp_path / "onnx/genai_config.json").read_text())
    assert config["model"]["type"] == family and (tmp_path / "onnx/tokenizer.json").is_file()


@pytest.mark.parametrize("bits", [2, 3, pytest.param(8, marks=pytest.mark.slow)])
def test_other_bits_stay_packed(tiny: Callable[..., Path], tmp_path: Path, bits: int) -> None:
    """Codes are widened when the file is opened, not in the file."""
    checkpoint = converted(tiny, tmp_path, "llama", "hqq", bits=bits, group_size=32)
    export(checkpoint, tmp_path / "onnx")
    assert compare_fresh(checkpoint, tmp_path / "onnx", 2, 6) < 1e-5
    tables = 65536 * 2 if bits == 8 else 8192
    weights = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    assert (tmp_path / "onnx/model.onnx.data").stat().st_size <= weights + tables


def test_integer_zeros_need_no_correction(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """HQQ's rounded zeros are integers in a float tensor: the operator holds them all."""
    checkpoint = converted(tiny, tmp_path, "llama", "hqq", bits=4, group_size=32, round_zero=True)
    result = export(checkpoint, tmp_path / "onnx")
    assert result.nodes["com.microsoft::MatMulNBits"] == 8 and "ReduceSum" not in result.nodes
    assert result.proof.relative_error < 1e-5


def test_int8_activations(tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = converted(tiny, tmp_path, "llama", "gptq", bits=4, group_size=32)
    result = export(checkpoint, tmp_path / "onnx", accuracy_level=4)
    exact = compare_fresh(checkpoint, tmp_path / "onnx", 2, 6, level=1)
    rounded = compare_fresh(checkpoint, tmp_path / "onnx", 2, 6, level=4)
    assert result.proof.relative_error < 2e-2 and rounded < 2e-2
    assert exact > 1e-4  # int8 arithmetic did run


@pytest.mark.parametrize(("kind", "limit"), [("nf4", 7e-6), ("fp4", 4e-8)])
def test_a_codebook_is_the_sum_of_two_planes(kind: str, limit: float) -> None:
    """To ten times float32's own step for NF4: what the proof without rounding then sees is far below 1e-4."""
    values = table(kind).double()
    made = planes(tuple(values.tolist()))
    total = sum(plane.unit * (plane.codes.double() - 128) for plane in made)
    assert float((total - values).abs().max()) < limit
    # And nothing assumes that the largest value is 1:
    wide = planes(tuple((values * 3).tolist()))
    assert float((sum(p.unit * (p.codes.double() - 128) for p in wide) - 3 * values).abs().max()) < 3 * limit


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_with_int8_activations(tiny: Callable[..., Path], tmp_path: Path, double_quant: bool) -> None:
    source = tiny("qwen2", intermediate_size=128)  # whole blocks in every row
    checkpoint = convert(source, tmp_path / "nf4", "nf4", block_size=64, double_quant=double_quant)
    result = export(checkpoint, tmp_path / "onnx", accuracy_level=4)
    # Products of one input are one node, planes included: q, k, v and gate, up; o and down.
    assert result.nodes["com.microsoft::MatMulNBits"] == 8
    proof = result.proof
    assert proof is not None and proof.unrounded_error is not None
    assert proof.unrounded_error < 1e-5 * proof.largest_logit
    data = (tmp_path / "onnx/model.onnx.data").stat().st_size
    assert data <= 1.03 * result.checkpoint_bytes + 8192


def test_blocks_that_straddle_rows_are_looked_up(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """NF4's blocks count through the flattened weight: 96 inputs are no whole number of 64."""
    source = tiny("llama", hidden_size=96, intermediate_size=160, num_attention_heads=6)
    quantkit.convert(source, tmp_path / "nf4", format="nf4", options={"block_size": 64})
    result = export(tmp_path / "nf4", tmp_path / "onnx", accuracy_level=4)
    assert "com.microsoft::MatMulNBits" not in result.nodes and result.proof is not None
    assert result.proof.relative_error < 1e-5 and result.proof.unrounded_error is None


def test_groups_that_no_operator_takes(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Groups of 24: looked up when the file is opened; the file stays packed."""
    source = tiny("llama", hidden_size=96, intermediate_size=192, num_attention_heads=6)
    checkpoint = convert(source, tmp_path / "hqq", "hqq", bits=4, group_size=24)
    result = export(checkpoint, tmp_path / "onnx")
    assert "com.microsoft::MatMulNBits" not in result.nodes
    assert compare_fresh(checkpoint, tmp_path / "onnx", 2, 6) < 1e-5
    assert (tmp_path / "onnx/model.onnx.data").stat().st_size <= 1.03 * result.checkpoint_bytes + 8192


def test_fp8_by_rows(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """One scale per row is DequantizeLinear's axis; blocks of 128 x 128 are what the matrix runs."""
    options = {"scheme": "channel", "layout": "compressed-tensors"}
    result = export(convert(tiny("llama"), tmp_path / "fp8", "fp8", **options), tmp_path / "onnx")
    assert result.nodes["DequantizeLinear"] == 14
    proof = result.proof
    assert proof is not None and proof.unrounded_error is not None
    assert proof.unrounded_error < 1e-5 * proof.largest_logit


def test_without_a_cache_and_over_an_older_export(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """`kv_cache=False`: logits of whole prompts, of any batch and length; an export replaces an export."""
    checkpoint = converted(tiny, tmp_path, "llama", "gptq")
    export(checkpoint, tmp_path / "onnx")
    result = export(checkpoint, tmp_path / "onnx", kv_cache=False, overwrite=True)
    assert result.proof is not None and result.proof.steps == 0
    assert not (tmp_path / "onnx/genai_config.json").exists()  # nothing of the older one is left
    model = quantkit.load(checkpoint, dtype="float32")
    runner = OnnxRunner(tmp_path / "onnx", CacheShape.of(model), use_cache=False, level=1)
    assert [value.name for value in runner.session.get_outputs()] == ["logits"]
    for batch, length in ((1, 1), (3, 11)):
        ids, ones = torch.randint(3, 256, (batch, length)), torch.ones(batch, length, dtype=torch.int64)
        with torch.no_grad(), use_reference():
            want = model(input_ids=ids).logits
        got, cache = runner(ids, ones, torch.arange(length)[None].repeat(batch, 1))
        assert not cache and float((got - want).norm() / want.norm()) < 1e-5


def test_standard_operators_only(tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = converted(tiny, tmp_path, "llama", "gptq", bits=4, group_size=32)
    result = export(checkpoint, tmp_path / "onnx", standard=True, opset=21, kv_cache=True)
    assert not [kind for kind in result.nodes if "::" in kind]
    assert result.nodes["DequantizeLinear"] == 14
    assert compare_fresh(checkpoint, tmp_path / "onnx", 2, 6) < 1e-5


def test_bad_requests(tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tiny("llama")
    with pytest.raises(UsageError, match="opset 17 is too old"):
        export(checkpoint, tmp_path / "out", opset=17)
    with pytest.raises(UsageError, match="Did you mean 'onnx'"):
        export(checkpoint, tmp_path / "out", to="onxx")
    with pytest.raises(UsageError, match="accuracy level 3"):
        export(checkpoint, tmp_path / "out", accuracy_level=3)
    with pytest.raises(UsageError, match="GPT2LMHeadModel"):
        export(tiny("gpt2"), tmp_path / "out")
    with pytest.raises(UsageError, match="BertForMaskedLM"):
        export(tiny("bert"), tmp_path / "out")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("mine")
    with pytest.raises(DestinationError, match="exists"):
        export(checkpoint, tmp_path / "there")
    with pytest.raises(DestinationError, match="not an export"):
        export(checkpoint, tmp_path / "there", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]
    assert (tmp_path / "there/file").read_text() == "mine"
