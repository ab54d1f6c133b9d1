"""`quantkit.evaluate`: rows, table, JSON, and checkpoints that cannot be compared."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import quantkit
from quantkit.errors import CalibrationError, UsageError
from quantkit.eval import protocols
from quantkit.eval.compare import EvalResult
from quantkit.eval.table import with_error


@pytest.fixture(scope="module")
def pair(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    source = tiny("llama")
    made = []
    for bits in (4, 2):
        out = tmp_path_factory.mktemp("eval") / f"hqq{bits}"
        quantkit.convert(source, out, format="hqq", options={"bits": bits})
        made.append(out)
    return source, made


def test_with_reference(pair: tuple[Path, list[Path]]) -> None:
    source, made = pair
    result = quantkit.evaluate(made, source, tokens=600, protocol=protocols.gptq(64))
    assert isinstance(result, EvalResult)
    reference, four, two = result.rows
    assert reference.is_reference and reference.format is None and reference.divergence is None
    assert (four.format, two.format) == ("hqq", "hqq")
    assert four.bits_per_weight < two.bits_per_weight + 2.5 and 4.5 <= four.bits_per_weight < 6
    assert four.size < reference.size
    assert four.divergence is not None and two.divergence is not None
    assert 0 < four.divergence.kl_mean < two.divergence.kl_mean
    assert four.divergence.top1 > two.divergence.top1
    assert four.perplexity.tokens == 9 * 63 and result.tokens == 600
    assert four.divergence.reference.ppl == pytest.approx(reference.perplexity.ppl)
    assert not result.warnings

    plain = json.loads(json.dumps(result.to_json()))
    assert plain["rows"][1]["divergence"]["kl_mean"] == four.divergence.kl_mean
    text = result.to_text()
    assert "hqq4" in text and "KL mean" in text and "(reference)" in text and "gptq (windows of 64)" in text
    assert "\x1b" not in text


def test_without_reference(pair: tuple[Path, list[Path]]) -> None:
    source, made = pair
    result = quantkit.evaluate([source, str(made[0])], tokens=300)
    assert [row.is_reference for row in result.rows] == [False, False]
    assert all(row.divergence is None for row in result.rows)
    assert result.protocol == "gptq (windows of 128)"
    assert any("windows of 128 instead of 2048" in warning for warning in result.warnings)
    assert "KL" not in result.to_text() and "warning:" in result.to_text()
    alone = quantkit.evaluate(source, source, tokens=300)  # the reference and nothing else
    assert [row.is_reference for row in alone.rows] == [True]


def test_batch_and_dtype_do_not_change_much(pair: tuple[Path, list[Path]]) -> None:
    source, made = pair
    one = quantkit.evaluate(made[0], source, tokens=600, protocol=protocols.gptq(64))
    many = quantkit.evaluate(made[0], source, tokens=600, protocol=protocols.gptq(64), batch=4)
    assert one.rows[1].divergence and many.rows[1].divergence
    assert many.rows[1].divergence.kl_mean == pytest.approx(one.rows[1].divergence.kl_mean, rel=1e-3)
    half = quantkit.evaluate(made[0], source, tokens=600, protocol=protocols.gptq(64), dtype=torch.bfloat16)
    assert half.rows[1].perplexity.ppl == pytest.approx(one.rows[1].perplexity.ppl, rel=0.05)


def test_other_tokenizers(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    source, made = pair
    bare = tmp_path / "bare"
    shutil.copytree(made[0], bare)
    for file in bare.glob("token*"):
        file.unlink()
    result = quantkit.evaluate(bare, source, tokens=300)
    assert any("no tokenizer" in warning for warning in result.warnings)

    other = tmp_path / "other"
    shutil.copytree(made[0], other)
    mapping = json.loads((other / "tokenizer.json").read_text())
    mapping["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(mapping))
    with pytest.raises(UsageError, match="tokenize the text differently"):
        quantkit.evaluate(other, source, tokens=300)
    result = quantkit.evaluate([source, other], tokens=300)
    assert any("not comparable" in warning for warning in result.warnings)


def test_what_is_refused_before_a_model_is_loaded(
    pair: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = pair
    loader = importlib.import_module("quantkit.load")
    monkeypatch.setattr(loader, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match="unknown protocol"):
        quantkit.evaluate(source, protocol="perplexed")
    with pytest.raises(UsageError, match="no checkpoint"):
        quantkit.evaluate([])
    with pytest.raises(UsageError, match="batch"):
        quantkit.evaluate(source, batch=0)
    with pytest.raises(UsageError, match="does not exist"):
        quantkit.evaluate(source, data="nothing.txt")
    with pytest.raises(CalibrationError, match="needs"):
        quantkit.evaluate(source, protocol="llama.cpp", tokens=100)
    with pytest.raises(UsageError, match="positions"):
        quantkit.evaluate(source, protocol=protocols.gptq(4096), tokens=5000)


def test_errors_are_rounded_with_their_value() -> None:
    assert with_error(19.94384, 0.1234) == "19.94 ± 0.12"
    assert with_error(0.00053212, 0.0000123) == "0.000532 ± 0.000012"
    assert with_error(12345.6, 432.1) == "12346 ± 432"
    assert with_error(3.25, 0.0) == "3.25"
    assert with_error(float("inf"), 1.0) == "inf"
