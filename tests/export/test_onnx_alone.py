"""ONNX exports run where quantkit and torch cannot be imported, and make the tokens of `quantkit generate`."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from export_support import ROOT, check

import quantkit
from quantkit.generate import _tokens
from quantkit.kernels.dispatch import use_reference

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

BLOCKED = """
import runpy, sys
for name in ("quantkit", "torch", "triton", "transformers", "onnx", "onnxscript"):
    sys.modules[name] = None  # importing it raises
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def exported(tiny: Callable[..., Path], tmp_path: Path) -> tuple[list[int], list[int]]:
    """An export of a tiny Qwen2 in `tmp_path / "onnx"`; a prompt and what `quantkit generate` makes of it."""
    check("onnx", tiny("qwen2"), tmp_path, "hqq")
    prompt = torch.randint(3, 256, (7,)).tolist()
    model = quantkit.load(tmp_path / "checkpoint", dtype="float32")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with use_reference():
        return prompt, list(_tokens(model, torch.tensor([prompt]), 12, 0.0, 0))


def run_onnx(python: str, folder: Path, prompt: list[int], *before: str) -> list[int]:
    script = ROOT / "examples/run-onnx/generate.py"
    command = [python, *before, str(script), str(folder), ",".join(map(str, prompt)), "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(token) for token in done.stdout.split(",")]


def test_runs_without_quantkit_and_torch(tiny: Callable[..., Path], tmp_path: Path) -> None:
    prompt, want = exported(tiny, tmp_path)
    assert run_onnx(sys.executable, tmp_path / "onnx", prompt, "-c", BLOCKED) == want


@pytest.mark.slow
def test_runs_in_a_fresh_environment(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A new virtual environment with onnxruntime and numpy; skipped where pip cannot install them."""
    prompt, want = exported(tiny, tmp_path)
    venv.create(tmp_path / "fresh", with_pip=True)
    python = str(tmp_path / "fresh/bin/python")
    install = [python, "-m", "pip", "install", "--quiet", "onnxruntime", "numpy"]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip("pip cannot install onnxruntime here")
    for name in ("quantkit", "torch"):
        assert subprocess.run([python, "-I", "-c", f"import {name}"], capture_output=True).returncode
    assert run_onnx(python, tmp_path / "onnx", prompt) == want
