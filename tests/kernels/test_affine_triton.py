"""The affine and ternary Triton kernels against float64: in the interpreter, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
# By path: a package of the folder's name exists elsewhere.
_spec = importlib.util.spec_from_file_location("affine_cases", HERE / "affine_cases.py")
assert _spec is not None and _spec.loader is not None
affine_cases = importlib.util.module_from_spec(_spec)
sys.modules["affine_cases"] = affine_cases
_spec.loader.exec_module(affine_cases)
SEED = int(torch.seed() % 2**31)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, float]:
    """Every case, in one process of its own: the interpreter dies at an out-of-bounds load."""
    root = HERE.parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "affine_cases.py"), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, f"seed {SEED}: exit {done.returncode}\n{done.stderr[-2000:]}"
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("name", affine_cases.names())
def test_in_the_interpreter(name: str, interpreted: dict[str, float]) -> None:
    assert interpreted[name] <= 1, f"seed {SEED}: error is {interpreted[name]:.3g} times its bound"


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("check", [affine_cases.check, affine_cases.check_device])
def test_on_the_device(check: object) -> None:
    assert callable(check)
    results = check(str(torch.accelerator.current_accelerator()), SEED)
    assert {name: r for name, r in results.items() if not r <= 1} == {}, f"seed {SEED}"
