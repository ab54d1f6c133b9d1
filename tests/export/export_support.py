"""What the tests of exports share: conversion in six formats, export with checks, damage to written files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit.export import decoder
from quantkit.export.api import export
from quantkit.export.result import ExportResult
from quantkit.kernels.dispatch import use_reference

ROOT = Path(__file__).resolve().parents[2]
FORMATS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 32, "desc_act": True, "sym": False},
    "awq": {"group_size": 32},
    "hqq": {"bits": 4, "group_size": 32},
    "nf4": {"block_size": 64},
    "fp8": {},
    "ternary": {},
}
#: Formats whose activations are rounded, by the checkpoint's own rule.
ROUNDED = ("fp8", "ternary")
#: A graph of a tiny model is as large as its weights: these are for the weights' file. 3 % is the promise;
#: shared lookup tables (8 kB at most) weigh nothing in a real one.
GROWTH, TABLES = 1.03, 8192


def convert(source: Path, out: Path, format: str, **options: Any) -> Path:
    """`source` in `format` at `out`, with these options or, where none are given, those of FORMATS."""
    calibrated = {"samples": 2, "seqlen": 32} if format in ("gptq", "awq") else {}
    quantkit.convert(source, out, format=format, options=options or FORMATS[format], **calibrated)
    return out


def check(target: str, source: Path, folder: Path, format: str, **options: Any) -> ExportResult:
    """Convert to `folder / "checkpoint"`, export to `folder / target`; what every export must keep to."""
    if target == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    checkpoint = convert(source, folder / "checkpoint", format)
    result = export(checkpoint, folder / target, to=target, **options)
    proof = result.proof
    assert proof is not None and proof.steps == 10
    # Where activations are rounded a tie may fall either way; without the rounding it is float32 again.
    assert proof.relative_error < (2e-2 if format in ROUNDED else 1e-5)
    assert (proof.unrounded_error is not None) == (format in ROUNDED)
    if target == "onnx":
        data = (folder / "onnx/model.onnx.data").stat().st_size
        assert data <= result.checkpoint_bytes * GROWTH + TABLES
    else:
        assert not [kind for kind in result.nodes if not kind.startswith(("aten.", "<built-in", "_operator"))]
    return result


def damage(
    monkeypatch: pytest.MonkeyPatch, layer: str, part: str, change: Callable[[Tensor], Tensor]
) -> None:
    """From now on exports write `change(tensor)` for one packed tensor, after the reference has run."""
    original = decoder.prepare

    def damaged(model: Any) -> None:
        module = model.get_submodule(layer)
        module.nested_absmax = None  # or NF4's doubly quantized scales would be written instead
        tensor = getattr(module, part)
        tensor.data = change(tensor.data.clone())
        original(model)

    monkeypatch.setattr(decoder, "prepare", damaged)


def fresh_error(model: Any, runner: Any, batch: int, counts: tuple[int, ...]) -> float:
    """Largest relative error of the logits on fresh random tokens, `counts` of them at a time behind one cache."""
    ids = torch.randint(3, 256, (batch, sum(counts)))
    worst, cache, done = 0.0, None, 0
    for count in counts:
        part = ids[:, done : done + count]
        done += count
        with torch.no_grad(), use_reference():
            out = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        positions = torch.arange(done - count, done)[None].repeat(batch, 1)
        got, _ = runner(part, torch.ones(batch, done, dtype=torch.int64), positions)
        worst = max(worst, float((got - out.logits).norm() / out.logits.norm()))
    return worst
