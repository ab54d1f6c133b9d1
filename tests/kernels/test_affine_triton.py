"""The affine and ternary Triton kernels against float64: in the interpreter, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from kernel_support import interpreted

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
def errors() -> dict[str, float]:
    """Every case, in one process."""
    return interpreted("affine_cases.py", str(SEED))


@pytest.mark.parametrize("name", affine_cases.names())
def test_in_the_interpreter(name: str, errors: dict[str, float]) -> None:
    assert errors[name] <= 1, f"seed {SEED}: error is {errors[name]:.3g} times its bound"


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("check", [affine_cases.check, affine_cases.check_device])
def test_on_the_device(check: object) -> None:
    assert callable(check)
    results = check(str(torch.accelerator.current_accelerator()), SEED)
    assert {name: r for name, r in results.items() if not r <= 1} == {}, f"seed {SEED}"
