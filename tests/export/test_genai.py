"""onnxruntime-genai loads the exported directory and generates quantkit's tokens.

Runs with the interpreter of QUANTKIT_GENAI (default `../peers/genai/bin/python`), which has
`pip install onnxruntime-genai` and nothing of quantkit.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import quantkit
from quantkit.export.api import export
from quantkit.generate import _tokens
from quantkit.kernels.dispatch import use_reference
from quantkit.load import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/pydoc-qwen2-3m"


@pytest.fixture
def genai() -> Callable[[Path, list[int], int], list[int]]:
    python = Path(os.environ.get("QUANTKIT_GENAI", ROOT.parent / "peers/genai/bin/python"))
    if not python.is_file():
        pytest.skip("no onnxruntime-genai environment (QUANTKIT_GENAI)")

    def run(folder: Path, prompt: list[int], count: int) -> list[int]:
        script = ROOT / "examples/run-genai/generate.py"
        command = [str(python), str(script), str(folder), ",".join(map(str, prompt)), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return [int(token) for token in done.stdout.split(",")]

    return run


@pytest.mark.peer
@pytest.mark.parametrize("format", ["hqq", "nf4"])
def test_generates_the_same_tokens(
    genai: Callable[[Path, list[int], int], list[int]], tmp_path: Path, format: str
) -> None:
    quantkit.convert(EXAMPLE, tmp_path / "ckpt", format=format)
    export(tmp_path / "ckpt", tmp_path / "onnx")
    tokenizer = load_tokenizer(tmp_path / "ckpt")
    prompt = list(tokenizer("def read(self")["input_ids"])
    model = quantkit.load(tmp_path / "ckpt", dtype="float32")
    with use_reference():
        want = list(_tokens(model, torch.tensor([prompt]), 40, 0.0, 0))
    got = genai(tmp_path / "onnx", prompt, 40)
    assert got[: len(want)] == want and len(want) > 10
