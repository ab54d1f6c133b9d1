"""quantkit: quantize, run, evaluate and export Hugging Face checkpoints.

The public API is loaded on first use, so `import quantkit` costs nothing:

    quantkit.convert("path/or/hub-id", "out", format="awq")    quantkit.load("out")
    quantkit.inspect("out")    quantkit.verify("out", against="source")
    quantkit.generate("out", "Once upon a time")    quantkit.evaluate(["out"], reference="source")
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.allocate import allocate
    from quantkit.convert import convert
    from quantkit.errors import QuantkitError
    from quantkit.eval.compare import evaluate
    from quantkit.export.api import export
    from quantkit.generate import generate
    from quantkit.inspect import inspect
    from quantkit.load import load
    from quantkit.sweep import sweep
    from quantkit.verify import verify

__version__ = "0.1.0"
__all__ = [
    "QuantkitError",
    "allocate",
    "convert",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "sweep",
    "verify",
]

_API = {
    "QuantkitError": "quantkit.errors",
    "allocate": "quantkit.allocate",
    "convert": "quantkit.convert",
    "evaluate": "quantkit.eval.compare",
    "export": "quantkit.export.api",
    "generate": "quantkit.generate",
    "inspect": "quantkit.inspect",
    "load": "quantkit.load",
    "sweep": "quantkit.sweep",
    "verify": "quantkit.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_API[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})


class _Package(ModuleType):
    """Keeps `quantkit.load` the function: importing the module of that name would replace it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _API and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
