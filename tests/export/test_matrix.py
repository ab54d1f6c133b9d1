"""Six formats of every family, as ONNX and as torch.export: the artifact agrees and stays as small.

The continuous integration runs a diagonal that touches every format and every family; the full matrix is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from export_support import FORMATS, GROWTH, ROOT, check

FAMILIES = ["llama", "qwen2", "gemma2", "gemma3", "phi3", "mixtral"]
TARGETS = ["onnx", "torch"]
#: Every format and every family once for each target.
DIAGONALS = {
    "onnx": list(zip(["phi3", "qwen2", "gemma3", "mixtral", "gemma2", "llama"], FORMATS)),
    "torch": list(zip(["qwen2", "llama", "phi3", "gemma2", "gemma3", "mixtral"], FORMATS)),
}
DIAGONAL = [(target, *cell) for target in TARGETS for cell in DIAGONALS[target]]


@pytest.mark.parametrize(("target", "family", "format"), DIAGONAL)
def test_diagonal(tiny: Callable[..., Path], tmp_path: Path, target: str, family: str, format: str) -> None:
    result = check(target, tiny(family), tmp_path, format)
    if target == "onnx":
        assert result.nodes["com.microsoft::GroupQueryAttention"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", TARGETS)
def test_matrix(tiny: Callable[..., Path], tmp_path: Path, target: str, family: str, format: str) -> None:
    if (target, family, format) in DIAGONAL:
        pytest.skip("test_diagonal runs this one")
    check(target, tiny(family), tmp_path, format)


@pytest.mark.slow
@pytest.mark.parametrize("format", list(FORMATS))
def test_standard_operators(tiny: Callable[..., Path], tmp_path: Path, format: str) -> None:
    result = check("onnx", tiny("llama"), tmp_path, format, standard=True)
    assert not [kind for kind in result.nodes if "::" in kind]


@pytest.mark.slow
@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("target", TARGETS)
def test_example(tmp_path: Path, target: str, format: str) -> None:
    """A trained model, and the promise as it is given: the whole artifact within 3 % of the checkpoint."""
    result = check(target, ROOT / "examples/pydoc-llama-7m", tmp_path, format)
    print(target, format, result.artifact_bytes / result.checkpoint_bytes, result.proof)
    assert result.artifact_bytes <= result.checkpoint_bytes * GROWTH
