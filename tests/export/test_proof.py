"""The proof of artifacts that round activations: a right one passes by itself, a slightly wrong one does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_support import convert, damage
from torch import Tensor

from quantkit.cli.app import run
from quantkit.errors import NumericsError
from quantkit.export import api, reference
from quantkit.export.api import export
from quantkit.kernels import reference as kernels

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

#: (format, accuracy level, target): all ways in which activations come to be rounded.
ROUNDED = [
    ("fp8", 1, "onnx"),
    ("gptq", 4, "onnx"),
    ("nf4", 4, "onnx"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("ternary", 1, "onnx"), ("fp8", 1, "torch"), ("ternary", 1, "torch"))
    ),
]
LAYER = "model.layers.1.self_attn.k_proj"


def one_scale(scale: Tensor) -> Tensor:
    """One scale of many, 20 % off; where a layer has but one (fp8), 1 % off."""
    scale.view(-1)[0] *= 1.2 if scale.numel() > 1 else 1.01
    return scale


def rows_exchanged(codes: Tensor) -> Tensor:
    """The weight's rows in another order: every number is there, in the wrong place."""
    return codes.roll(1, 0)


def deep(tiny: Callable[..., Path]) -> Path:
    """A random model in which rounding grows: four layers, 128 wide."""
    return tiny("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=4)


@pytest.mark.parametrize("target", ["onnx", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_right_export_passes_where_rounding_grows(
    tiny: Callable[..., Path], tmp_path: Path, target: str
) -> None:
    """fp8 through four layers of random weights; the allowance is what rounding does, not a guess."""
    checkpoint = convert(deep(tiny), tmp_path / "ckpt", "fp8")
    proof = export(checkpoint, tmp_path / "out", to=target).proof
    assert proof is not None and proof.unrounded_error is not None and proof.unrounded_atol is not None
    assert proof.atol > reference.ROUNDED * proof.largest_logit  # the fixed share alone could refuse it
    assert proof.unrounded_error <= proof.unrounded_atol <= 1.01e-4 * proof.largest_logit


@pytest.mark.parametrize(("format", "level", "to"), ROUNDED)
@pytest.mark.parametrize(
    ("part", "change"), [("scale", one_scale), pytest.param("codes", rows_exchanged, marks=pytest.mark.slow)]
)
def test_a_wrong_weight_fails_and_its_layer_is_named(
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    level: int,
    to: str,
    part: str,
    change: Callable[[Tensor], Tensor],
) -> None:
    checkpoint = convert(tiny("llama"), tmp_path / "ckpt", format)
    damage(monkeypatch, LAYER, part, change)
    with pytest.raises(NumericsError, match=r"taken out, differs .* first seen in the keys of layer 1 "):
        export(checkpoint, tmp_path / "out", to=to, accuracy_level=level)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt"]


@pytest.mark.parametrize(("format", "level", "to"), ROUNDED)
def test_rounding_alone_would_hide_one_wrong_scale(
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    level: int,
    to: str,
) -> None:
    """The comparison of the artifact as it is passes the damage of the test above: the other one is needed."""
    checkpoint = convert(tiny("llama"), tmp_path / "ckpt", format)
    damage(monkeypatch, LAYER, "scale", one_scale)
    monkeypatch.setattr(reference.Reference, "prove_unrounded", lambda *_: None)
    proof = export(checkpoint, tmp_path / "out", to=to, accuracy_level=level).proof
    assert proof is not None and proof.max_error > reference.EXACT * proof.largest_logit


def test_wrong_rounding_fails(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are right, but activations are rounded to three levels instead of 255."""

    def coarse(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = 1.0 / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        return (x * scale).round().clamp(-128, 127), scale

    checkpoint = convert(tiny("llama"), tmp_path / "ckpt", "ternary")
    made = api.run_reference

    def reference_then_coarse(*arguments: Any, **options: Any) -> Any:
        got = made(*arguments, **options)
        monkeypatch.setattr(kernels, "int8_per_token", coarse)
        return got

    monkeypatch.setattr(api, "run_reference", reference_then_coarse)
    with pytest.raises(NumericsError, match="the ONNX model differs from the checkpoint"):
        export(checkpoint, tmp_path / "onnx")


@pytest.mark.parametrize("format", ["fp8", "ternary"])
def test_kept_operators(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """With quantkit's own operators in the program: right passes, one scale off fails."""
    checkpoint = convert(tiny("llama"), tmp_path / "ckpt", format)
    proof = export(checkpoint, tmp_path / "right", to="torch", keep_ops=True).proof
    assert proof is not None and proof.unrounded_error is not None
    damage(monkeypatch, LAYER, "scale", one_scale)
    with pytest.raises(NumericsError, match=r"first seen in the keys of layer 1 "):
        export(checkpoint, tmp_path / "wrong", to="torch", keep_ops=True)


def test_the_summary_prints_both_errors(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(tiny("llama"), tmp_path / "ckpt", "gptq")
    arguments = ["export", str(tmp_path / "ckpt"), "-o", str(tmp_path / "out"), "--accuracy-level", "4"]
    assert run([*arguments]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "with the rounding of activations taken out (allowed " in said and "largest error" in said
    # --atol replaces both allowances.
    assert run([*arguments, "--overwrite", "--atol", "1e-9"]) == NumericsError.exit_code
    assert (tmp_path / "out/model.onnx").is_file()  # the older export is still there
