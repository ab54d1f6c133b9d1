"""Other runtimes load the exported directory and generate quantkit's tokens.

onnxruntime-genai runs with the interpreter of QUANTKIT_GENAI (default `.peers/genai/bin/python`: `pip install
onnxruntime-genai`), Hugging Face's ORTModelForCausalLM with that of QUANTKIT_OPTIMUM (default
`.peers/optimum/bin/python`: `pip install 'optimum-onnx[onnxruntime]'`). Neither has anything of quantkit.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.export.api import export
from quantkit.generate import _tokens
from quantkit.kernels.dispatch import use_reference
from quantkit.load import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/pydoc-qwen2-3m"
FORMATS: dict[str, dict[str, Any]] = {
    "gptq": {"group_size": 32, "desc_act": True, "sweeps": 0, "search": "minmax"},
    "awq": {"group_size": 32},
    "hqq": {},
    "nf4": {},
    "fp8": {},
    "ternary": {},
}
COUNT = 40
Generate = Callable[[Path, list[int], int], list[int]]


def runner(name: str, script: str) -> Generate:
    default = ROOT / f".peers/{name}/bin/python"
    python = Path(os.environ.get(f"QUANTKIT_{name.upper()}", default))
    if not python.is_file():
        pytest.skip(f"no {name} environment (QUANTKIT_{name.upper()})")

    def run(folder: Path, prompt: list[int], count: int) -> list[int]:
        command = [str(python), str(ROOT / script), str(folder), ",".join(map(str, prompt)), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return [int(token) for token in done.stdout.split(",")]

    return run


@pytest.fixture
def genai() -> Generate:
    return runner("genai", "examples/run-genai/generate.py")


@pytest.fixture
def optimum() -> Generate:
    return runner("optimum", "examples/run-optimum/generate.py")


def exported(tmp_path: Path, format: str) -> tuple[list[int], list[int]]:
    """An export of the example at `tmp_path / "onnx"`, a prompt, and what `quantkit generate` makes of it."""
    calibrated = {"samples": 2, "seqlen": 64} if format in ("gptq", "awq") else {}
    quantkit.convert(EXAMPLE, tmp_path / "ckpt", format=format, options=FORMATS[format], **calibrated)
    export(tmp_path / "ckpt", tmp_path / "onnx")
    prompt = list(load_tokenizer(tmp_path / "ckpt")("def read(self")["input_ids"])
    model = quantkit.load(tmp_path / "ckpt", dtype="float32")
    with use_reference():
        return prompt, list(_tokens(model, torch.tensor([prompt]), COUNT, 0.0, 0))


def same(got: list[int], want: list[int], format: str) -> None:
    assert len(want) > 10
    # fp8 and ternary round activations: where a tie falls the other way, texts may part after a while.
    count = len(want) if format not in ("fp8", "ternary") else 10
    assert got[:count] == want[:count]


@pytest.mark.peer
@pytest.mark.parametrize(
    "format",
    ["hqq", "nf4", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gptq", "awq", "fp8", "ternary"))],
)
def test_genai_generates_the_same_tokens(genai: Generate, tmp_path: Path, format: str) -> None:
    prompt, want = exported(tmp_path, format)
    same(genai(tmp_path / "onnx", prompt, COUNT), want, format)


@pytest.mark.peer
@pytest.mark.parametrize("format", ["hqq", pytest.param("gptq", marks=pytest.mark.slow)])
def test_optimum_generates_the_same_tokens(optimum: Generate, tmp_path: Path, format: str) -> None:
    prompt, want = exported(tmp_path, format)
    same(optimum(tmp_path / "onnx", prompt, COUNT), want, format)
