"""The error above which a layer is warned about, and `--strict`, which then refuses it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.cli.app import run
from quantkit.encoding import Affine, Codebook, Float8, dequantize
from quantkit.error_limits import affine_error, default_limit, error_note, typical_error
from quantkit.errors import NumericsError, UsageError
from quantkit.formats import get_format

UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 128), (4, 32), (4, 128), (8, 64), (4, 512)])
def test_the_estimate_is_what_rounding_normal_weights_costs(bits: int, group: int) -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(bits))
    grouped = weight.view(256, -1, group)
    top = grouped.abs().amax(-1, keepdim=True)
    step = 2 * top / (2**bits - 1)
    rounded = ((grouped + top) / step).round() * step - top
    measured = float((rounded - grouped).norm() / grouped.norm())
    assert affine_error(Affine(bits, group), 512) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("fmt", "encoding"), [("nf4", Codebook()), ("fp8", Float8((128, 128)))])
def test_the_other_encodings(fmt: str, encoding: Codebook | Float8) -> None:
    weight = torch.randn(256, 256)
    chosen = get_format(fmt)
    dense = dequantize(chosen.quantize(weight.clone(), chosen.Config(), None))
    error = float((dense - weight).norm() / weight.norm())
    assert default_limit(encoding, 256) == pytest.approx(2.5 * error, rel=0.1)


def test_outliers_cannot_hide_the_error_of_the_others() -> None:
    weight = torch.randn(32, 64)
    assert typical_error(weight, torch.zeros_like(weight)) is None
    weight[3, 5] = 1e30
    delta = -weight.clone()
    delta[3, 5] = 0  # the outlier is exact, everything else is lost
    assert float(delta.norm()) / 1e30 < 1e-20 and typical_error(weight, delta) == pytest.approx(1.0)
    assert "without outliers" in error_note(weight, delta, 1e-20, 0.2)
    assert error_note(weight, delta * 1e-3, 1e-20, 0.2) == ""
    assert typical_error(torch.zeros(4, 4), torch.zeros(4, 4)) is None


def spoilt(tiny: Callable[..., Path], to: Path) -> Path:
    """A layer that one scale per tensor cannot hold."""
    shutil.copytree(tiny("llama"), to)
    tensors = load_file(to / "model.safetensors")
    tensors[UP + ".weight"][0, 0] = 1e6
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def test_it_warns_and_strict_refuses(tiny: Callable[..., Path], tmp_path: Path, capsys) -> None:
    source, out = spoilt(tiny, tmp_path / "source"), tmp_path / "out"
    common = ["convert", str(source), "--format", "fp8", "--set", "layout=compressed-tensors"]
    common += ["--set", "scheme=tensor", "-o", str(out)]
    assert run(common) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "mlp.up_proj: without outliers" in text
    assert "without outliers" in (out / "README.md").read_text()
    assert quantkit.inspect(out).format is not None
    before = sorted(p.read_bytes() for p in out.iterdir())
    assert run([*common, "--overwrite", "--strict"]) not in (0, 70)
    error = capsys.readouterr().err
    assert "error: " in error and UP in error and "--strict" in error
    assert sorted(p.read_bytes() for p in out.iterdir()) == before
    assert run([*common, "--overwrite", "--strict", "--max-error", "2"]) == 0


def test_weights_below_the_smallest_scale_are_warned_about(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Float16 scales end at 6e-8 (found by a property test at 2e-8): what is smaller is lost, and that is said."""
    source = tmp_path / "source"
    shutil.copytree(tiny("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors[UP + ".weight"] *= 2e-8 / float(tensors[UP + ".weight"].abs().max())
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    ids = torch.randint(3, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    result = quantkit.convert(
        source,
        tmp_path / "out",
        format="gptq",
        options={"group_size": 32},
        calibration=ids,
        samples=4,
        seqlen=32,
    )
    notes = {layer.name: " ".join(layer.notes) for layer in result.quantized}  # type: ignore[union-attr]
    assert "is above" in notes.pop(UP)
    notes.pop(UP.replace("up_proj", "down_proj"))  # what it is fed with is nearly zero: it has its own remark
    assert not any(notes.values()), notes


def test_the_limit_is_the_users(tiny: Callable[..., Path], tmp_path: Path) -> None:
    result = quantkit.convert(tiny("llama"), tmp_path / "a", format="nf4")
    assert not any(layer.notes for layer in result.quantized)  # type: ignore[union-attr]
    result = quantkit.convert(tiny("llama"), tmp_path / "b", format="nf4", max_error=0.01)
    assert all("above 0.010" in layer.notes[0] for layer in result.quantized)  # type: ignore[union-attr]
    with pytest.raises(NumericsError, match=r"layers\.0.*above 0\.010"):
        quantkit.convert(tiny("llama"), tmp_path / "c", format="nf4", max_error=0.01, strict=True)
    assert not (tmp_path / "c").exists()
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="largest error"):
            quantkit.convert(tiny("llama"), tmp_path / "c", format="nf4", max_error=bad)


def test_provenance_is_in_the_card_and_in_inspect(tiny: Callable[..., Path], tmp_path: Path, capsys) -> None:
    """Source revision, config, calibration fingerprint, versions: as in a hub's cache, where a commit is known."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    source = tmp_path / "models--org--name" / "snapshots" / commit
    shutil.copytree(tiny("llama"), source)
    ids = torch.randint(3, 256, (4, 32))
    options = {"bits": 3, "group_size": 32}
    quantkit.convert(
        source, tmp_path / "out", format="gptq", options=options, calibration=ids, samples=4, seqlen=32
    )
    found = quantkit.inspect(tmp_path / "out").provenance
    assert found["source"]["revision"] == commit and len(found["source"]["fingerprint"]) == 64
    assert found["options"]["bits"] == 3 and found["format"] == "gptq"
    assert len(found["calibration"]["fingerprint"]) == 64 and found["calibration"]["samples"] == 4
    assert found["versions"].keys() == {"quantkit", "torch", "transformers", "python"}
    assert found["inputs"].keys() >= {"model.safetensors", "config.json", "tokenizer.json"}
    card = (tmp_path / "out" / "README.md").read_text()
    for value in (
        commit,
        found["source"]["fingerprint"],
        found["calibration"]["fingerprint"],
        found["versions"]["torch"],
        found["versions"]["transformers"],
    ):
        assert value in card.replace("\\", ""), value
    assert run(["inspect", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"] == json.loads(json.dumps(found))
