"""Which implementation answers an op: the one place that knows devices by name.

An op of `quantkit.kernels.ops` has a reference (plain torch, any device). A *backend* is a module that
holds functions of the ops' names, with the ops' arguments; each may return `NotImplemented` for
arguments that it does not cover, and the reference answers then. Backends are imported on first use:
`import quantkit` and runs on a CPU never import Triton.

    device type    encoding    backend
    cuda, xpu      affine      quantkit.kernels.affine      (Triton; "cuda" is NVIDIA and AMD;
                                                              int8 activations: quantkit.kernels.ternary)
    cuda, xpu      codebook    quantkit.kernels.codebook
    cuda, xpu      float8      quantkit.kernels.float8
    cpu            any         quantkit.kernels.cpu         (onnxruntime, numpy or torch's own ops)

A kernel that Triton or the driver refuses to build or to launch on some chip (too much shared memory, say)
is reported once, and the reference answers; QUANTKIT_KERNELS=strict raises instead.

To run everything through the reference: `with use_reference(): ...`, or QUANTKIT_KERNELS=reference.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

from torch import Tensor

Implementation = Callable[..., Tensor]

_TRITON = {name: f"quantkit.kernels.{name}" for name in ("affine", "codebook", "float8")}
_CPU = dict.fromkeys(_TRITON, "quantkit.kernels.cpu")
BACKENDS: dict[str, dict[str, str]] = {"cuda": _TRITON, "xpu": _TRITON, "cpu": _CPU}

_reference_only: ContextVar[bool] = ContextVar(
    "quantkit_reference_only", default=os.environ.get("QUANTKIT_KERNELS", "") == "reference"
)

log = logging.getLogger(__name__)


@contextmanager
def use_reference(enabled: bool = True) -> Iterator[None]:
    """Inside, every op runs its reference (for comparisons and for hunting errors)."""
    token = _reference_only.set(enabled)
    try:
        yield
    finally:
        _reference_only.reset(token)


@cache
def _backend(device_type: str, encoding: str) -> ModuleType | None:
    name = BACKENDS.get(device_type, {}).get(encoding)
    if name is None:
        return None
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        # Triton is absent on some platforms; anything else missing is a bug and must be heard.
        if missing.name is None or not (missing.name.split(".")[0] == "triton" or missing.name == name):
            raise
        log.warning("%s is not available: %s layers run the plain torch reference", missing.name, encoding)
        return None


@cache
def _function(op: str, device_type: str) -> Implementation | None:
    encoding = next(e for e in _TRITON if e in op)
    return getattr(_backend(device_type, encoding), op, None)


_installed: dict[tuple[str, str], Implementation] = {}


def install(op: str, device_type: str, kernel: Implementation | None) -> None:
    """Answer `op` on `device_type` with `kernel` instead of the backend (None: with the backend again)."""
    if kernel is None:
        _installed.pop((op, device_type), None)
    else:
        _installed[op, device_type] = kernel


def implementation(op: str, device_type: str) -> Implementation | None:
    """The function for `op` on `device_type`, or None where only the reference exists."""
    if _reference_only.get():
        return None
    return _installed.get((op, device_type)) or _function(op, device_type)


def launch_failed(op: str, error: Exception) -> bool:
    """Is `error` Triton's refusal to compile or launch, after which the reference may answer? Says so once."""
    refused = type(error).__module__.startswith("triton.") or str(error).startswith("Triton Error")
    if not refused or os.environ.get("QUANTKIT_KERNELS", "") == "strict":
        return False
    first = (str(error).splitlines() or [type(error).__name__])[0]
    _warn_once(
        f"quantkit::{op}: its kernel does not run here ({first}); the slow reference answers. Please report it."
    )
    return True


@cache
def _warn_once(message: str) -> None:
    log.warning(message)
