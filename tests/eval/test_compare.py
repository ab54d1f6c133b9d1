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
from quantkit.errors import CalibrationError, CheckpointError, UsageError
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
    pair: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, made = pair
    loader = importlib.import_module("quantkit.load")
    monkeypatch.setattr(loader, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match="unknown protocol"):
        quantkit.evaluate(source, protocol="perplexed")
    with pytest.raises(UsageError, match="no checkpoint"):
        quantkit.evaluate([])
    with pytest.raises(UsageError, match="device 'cudda' is not available"):
        quantkit.evaluate(source, device="cudda")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        quantkit.evaluate(Path(__file__).parent)
    with pytest.raises(UsageError, match="batch"):
        quantkit.evaluate(source, batch=0)
    with pytest.raises(UsageError, match="does not exist"):
        quantkit.evaluate(source, data="nothing.txt")
    with pytest.raises(CalibrationError, match="needs"):
        quantkit.evaluate(source, protocol="llama.cpp", tokens=100)
    with pytest.raises(UsageError, match="positions"):
        quantkit.evaluate(source, protocol=protocols.gptq(4096), tokens=5000)
    other = tmp_path / "other"
    shutil.copytree(made[0], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 64}))
    with pytest.raises(UsageError, match=r"has a vocabulary of \d+, .* one of \d+"):
        quantkit.evaluate([made[1], other], source)


def test_a_tiny_text(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Shorter than one window: the window shrinks, the table says so, and says that it means little."""
    source, made = pair
    (tmp_path / "tiny.txt").write_text("Hi.")
    result = quantkit.evaluate(made[0], source, data=tmp_path / "tiny.txt", layers=False, checks=False)
    assert result.rows[1].divergence is not None and result.rows[1].perplexity.tokens == 2
    assert result.warnings[0].startswith("protocol gptq: windows of 3 instead of 2048")
    assert "only 2 tokens were scored: too few to judge by" in result.warnings
    (tmp_path / "one.txt").write_text("H")
    with pytest.raises(CalibrationError, match=r"one\.txt gives 1 tokens"):
        quantkit.evaluate(source, data=tmp_path / "one.txt")


def test_no_tokenizer_at_all(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(pair[0], bare)
    for file in bare.glob("token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no usable tokenizer") as caught:
        quantkit.evaluate(bare, tokens=300)
    assert caught.value.hint and "\n" not in str(caught.value)


def test_errors_are_rounded_with_their_value() -> None:
    assert with_error(19.94384, 0.1234) == "19.94 ± 0.12"
    assert with_error(0.00053212, 0.0000123) == "0.000532 ± 0.000012"
    assert with_error(12345.6, 432.1) == "12346 ± 432"
    assert with_error(3.25, 0.0) == "3.25"
    assert with_error(float("inf"), 1.0) == "inf"


# -- the reference's cache, layers, checks --------------------------------------------------------


def test_the_reference_runs_once(
    pair: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, made = pair
    settings = {"tokens": 600, "protocol": protocols.gptq(64), "cache": tmp_path / "cache"}
    first = quantkit.evaluate(made[0], source, **settings)
    loaded = []
    plain = importlib.import_module("quantkit.load").load

    def load(path: str, **kwargs: object) -> object:
        loaded.append(path)
        return plain(path, **kwargs)

    monkeypatch.setattr(importlib.import_module("quantkit.load"), "load", load)
    second = quantkit.evaluate(made[0], source, **settings)
    assert loaded == [str(made[0])]
    assert second.rows[0].checks == first.rows[0].checks != []
    a, b = first.rows[1].divergence, second.rows[1].divergence
    assert a is not None and b is not None and a.kl_mean == b.kl_mean
    assert first.rows[0].perplexity.ppl == second.rows[0].perplexity.ppl

    rows = next((tmp_path / "cache").rglob("rows-00000.safetensors"))
    rows.write_bytes(rows.read_bytes()[:-4])  # damaged: made again, and said
    (tmp_path / "cache" / "stray").write_text("")
    with pytest.raises(Exception, match="is not what"):
        quantkit.evaluate(made[0], source, **settings)
    head = next((tmp_path / "cache").rglob("head.safetensors"))
    head.write_bytes(b"x")
    third = quantkit.evaluate(made[0], source, **settings)
    assert any("made again" in warning for warning in third.warnings)
    assert third.rows[1].divergence is not None and third.rows[1].divergence.kl_mean == a.kl_mean


def test_no_cache_leaves_nothing(
    pair: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, made = pair
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "unused"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    quantkit.evaluate(made[0], source, tokens=300, cache="none", checks=False)
    assert list(tmp_path.iterdir()) == []


def test_layers_and_checks_come_along(pair: tuple[Path, list[Path]]) -> None:
    source, made = pair
    result = quantkit.evaluate(made[1], source, tokens=600, hashes=True)
    row = result.rows[1]
    assert len(row.layers) == 14 and row.worst_layers(1)[0].advice
    assert {check.name for check in row.checks} >= {"arithmetic"}
    assert row.sha256 and len(row.sha256) == 64 and row.sha256 != result.rows[0].sha256
    assert {"torch", "transformers", "quantkit", "device"} <= result.environment.keys() and result.date
    assert row.divergence is not None and row.divergence.rms_dp > 0
    assert len(row.divergence.kl_quantiles) == 43
    text = result.to_text()
    assert "worst layers" in text and "--override" in text and "arithmetic" in text
    bare = quantkit.evaluate(made[1], source, tokens=300, layers=False, checks=False)
    assert not bare.rows[1].layers and not bare.rows[1].checks


def test_lm_evals_figures(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    source, made = pair
    text = tmp_path / "text.txt"
    text.write_text("one two  three\nfour " * 20)
    result = quantkit.evaluate(made[0], source, data=text, protocol="lm-eval")
    for row in result.rows:
        ppl = row.perplexity
        assert ppl.tokens == len(text.read_bytes()) - 1  # a token per byte; nothing can go before the first
        assert ppl.byte_ppl == pytest.approx(ppl.ppl ** (ppl.tokens / (ppl.tokens + 1)), rel=1e-6)
        assert ppl.word_ppl is not None and ppl.word_ppl > ppl.ppl
    assert "word perplexity" in result.to_text()
    assert any("neither BOS nor EOS" in warning for warning in result.warnings)


def test_a_candidate_that_is_not_quantized(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    source, _ = pair
    shutil.copytree(source, tmp_path / "copy")
    result = quantkit.evaluate(tmp_path / "copy", source, tokens=300, checks=False)
    row = result.rows[1]
    assert any("copy is not quantized" in warning for warning in result.warnings)
    assert row.divergence is not None and row.divergence.kl_mean < 1e-9 and row.layers == []


def test_long_runs_say_how_far_they_are() -> None:
    from quantkit.eval.watch import watch
    from quantkit.progress import NullProgress

    said: list[str] = []

    class Listener(NullProgress):
        def stage(self, text: str) -> None:
            said.append(text)

    seen = watch(Listener(), "measuring x", interval=0.0)
    for done in range(1, 4):
        seen(done, 3)
    assert said[0] == "measuring x" and len(said) == 3
    assert said[1].startswith("measuring x: 1/3 windows, ") and said[1].endswith(" left")
    quiet = watch(Listener(), "measuring y", interval=60.0)
    quiet(1, 2)
    assert said[-1] == "measuring y"
