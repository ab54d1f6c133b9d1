"""torch.export: the file runs where quantkit and triton cannot be imported, and computes the same tokens."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import quantkit
from quantkit.export.api import export
from quantkit.generate import _tokens
from quantkit.kernels.dispatch import use_reference

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BLOCKED = """
import runpy, sys
for name in ("quantkit", "triton", "transformers", "onnx"):
    sys.modules[name] = None  # importing it raises
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_blocked(script: Path, *arguments: str) -> list[int]:
    """Run a script in a process whose imports of quantkit and triton fail; its list of tokens."""
    command = [sys.executable, "-c", BLOCKED, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(token) for token in done.stdout.split(",")]


def greedy(checkpoint: Path, prompt: list[int], count: int) -> list[int]:
    """What `quantkit generate` would make, end tokens included."""
    model = quantkit.load(checkpoint, dtype="float32")
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    with use_reference():
        return list(_tokens(model, torch.tensor([prompt]), count, 0.0, 0))


def test_runs_without_quantkit_and_triton(tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "hqq"
    quantkit.convert(tiny("llama"), checkpoint, format="hqq", options={"bits": 4, "group_size": 32})
    result = export(checkpoint, tmp_path / "out", to="torch")
    assert result.proof.relative_error < 1e-5 and not any("quantkit" in kind for kind in result.nodes)
    prompt = torch.randint(3, 256, (7,)).tolist()
    made = run_blocked(
        EXAMPLES / "run-pt2/generate.py", str(tmp_path / "out"), ",".join(map(str, prompt)), "12"
    )
    assert made == greedy(checkpoint, prompt, 12)


def test_keep_ops(tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "hqq"
    quantkit.convert(tiny("llama"), checkpoint, format="hqq", options={"bits": 4, "group_size": 32})
    result = export(checkpoint, tmp_path / "out", to="torch", keep_ops=True)
    assert result.nodes["quantkit.affine_linear.default"] == 14
    assert result.proof.relative_error < 1e-5


@pytest.mark.slow
def test_aoti_package(tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "hqq"
    quantkit.convert(tiny("llama"), checkpoint, format="hqq", options={"bits": 4, "group_size": 32})
    result = export(checkpoint, tmp_path / "out", to="aoti")
    assert result.proof.relative_error < 1e-5
