"""Six formats of every family as ONNX: the artifact agrees, stays as small as the checkpoint, runs on its own.

The continuous integration runs a diagonal that touches every format and every family; the full matrix is slow.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.export.api import export
from quantkit.export.result import ExportResult
from quantkit.generate import _tokens
from quantkit.kernels.dispatch import use_reference

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/pydoc-llama-7m"
FORMATS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 32, "desc_act": True, "sym": False},
    "awq": {"group_size": 32},
    "hqq": {"bits": 4, "group_size": 32},
    "nf4": {"block_size": 64},
    "fp8": {},
    "ternary": {},
}
FAMILIES = ["llama", "qwen2", "gemma2", "gemma3", "phi3", "mixtral"]
DIAGONAL = list(zip(["phi3", "qwen2", "gemma3", "mixtral", "gemma2", "llama"], FORMATS))
#: A graph of a tiny model is as large as its weights: these are for the weights' file. 3 % is the promise;
#: shared lookup tables (8 kB at most) weigh nothing in a real one.
GROWTH, TABLES = 1.03, 8192


def check(source: Path, tmp_path: Path, format: str, **options: Any) -> ExportResult:
    checkpoint = tmp_path / "checkpoint"
    calibrated = {"samples": 2, "seqlen": 32} if format in ("gptq", "awq") else {}
    quantkit.convert(source, checkpoint, format=format, options=FORMATS[format], **calibrated)
    result = export(checkpoint, tmp_path / "onnx", **options)
    rounds = format in ("ternary", "fp8")  # these round activations: a tie may fall either way
    assert result.proof.steps == 10
    assert result.proof.relative_error < (2e-2 if rounds else 1e-5)
    data = (tmp_path / "onnx/model.onnx.data").stat().st_size
    assert data <= result.checkpoint_bytes * GROWTH + TABLES
    return result


@pytest.mark.parametrize(("family", "format"), DIAGONAL)
def test_diagonal(tiny: Callable[..., Path], tmp_path: Path, family: str, format: str) -> None:
    result = check(tiny(family), tmp_path, format)
    assert result.nodes["com.microsoft::GroupQueryAttention"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("family", FAMILIES)
def test_matrix(tiny: Callable[..., Path], tmp_path: Path, family: str, format: str) -> None:
    if (family, format) in DIAGONAL:
        pytest.skip("test_diagonal runs this one")
    check(tiny(family), tmp_path, format)


@pytest.mark.slow
@pytest.mark.parametrize("format", list(FORMATS))
def test_standard_operators(tiny: Callable[..., Path], tmp_path: Path, format: str) -> None:
    result = check(tiny("llama"), tmp_path, format, standard=True)
    assert not [kind for kind in result.nodes if "::" in kind]


@pytest.mark.slow
@pytest.mark.parametrize("format", list(FORMATS))
def test_example(tmp_path: Path, format: str) -> None:
    """A trained model, and the promise as it is given: the whole artifact within 3 % of the checkpoint."""
    result = check(EXAMPLE, tmp_path, format)
    assert result.artifact_bytes <= result.checkpoint_bytes * GROWTH


# -- without quantkit -----------------------------------------------------------------------------------

BLOCKED = """
import runpy, sys
for name in ("quantkit", "torch", "triton", "transformers", "onnx", "onnxscript"):
    sys.modules[name] = None  # importing it raises
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def exported(tiny: Callable[..., Path], tmp_path: Path) -> tuple[list[int], list[int]]:
    """An export of a tiny Qwen2 in `tmp_path / "onnx"`; a prompt and what `quantkit generate` makes of it."""
    check(tiny("qwen2"), tmp_path, "hqq")
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
