"""The manifest of `quantkit export --to kernels`: reading it, and the names that both sides compute.

    {"format": 2, "dtype": "float16", "targets": ["sm_80", ...],
     "kernels":  [{"target", "kernel", "file", "symbol", "parameters": [[name, type], ...], "threads", "shared",
                   "static_shared", "constants", "divisible_by_16", "sha256", ...}],
     "products": [{"key", "op", "shape": [N, K], "tensors": {name: [dtype, shape]}, "activation", "params",
                   "plans": {target: {"regimes": [REGIME], "dequantize": [LAUNCH]}}}],
     "layers":   {"model.layers.0.self_attn.q_proj": index of its product}}

    REGIME = {"rows": [first, last], "scratch": [bytes RULE], "launches": [LAUNCH]}
    LAUNCH = {"kernel": index into kernels, "grid": [RULE, RULE, RULE], "arguments": [ARGUMENT]}
    ARGUMENT = a buffer's name ("x", "out", a weight's tensor, "scratch0", "null") or a RULE or {"float": 1.0}
    RULE = an integer, or {"times", "mul", "div"} for times * ceil(rows * mul / div)

`x` is `[rows, K]` and `out` `[rows, N]`, contiguous; pointers are aligned to 16 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
FORMAT = 2
#: Arguments that a weight can bring, in the order of the C header's `qk_weight`.
TENSORS = ("codes", "scale", "zero", "lut", "perm", "input_scale", "bias")
#: Scratch buffers start at multiples of this many bytes.
ALIGN = 256


def product_key(
    op: str, dtype: str, shape: tuple[int, int], params: tuple[Any, ...], tensors: Mapping[str, str]
) -> str:
    """One text for everything that decides a product's launches.

    `params` are the op's plain arguments (bits, group size, activation, ...), `tensors` the dtypes of the
    tensors that are present.
    """
    present = ",".join(f"{name}:{tensors[name]}" for name in TENSORS if name in tensors)
    return f"{op} {dtype} {shape[0]}x{shape[1]} {','.join(map(str, params))} {present}"


def rule_at(rule: int | Mapping[str, int], rows: int) -> int:
    """The value of a RULE for a number of rows."""
    if isinstance(rule, int):
        return rule
    return rule["times"] * -(-rows * rule["mul"] // rule["div"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an exported directory; CheckpointError if it has none, or one of another kind."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or not isinstance(manifest["products"], list):
            raise ValueError(f"format {manifest['format']}")
        for entry in manifest["kernels"]:
            file = Path(entry["file"])
            if file.is_absolute() or ".." in file.parts:
                raise ValueError(f"file {str(file)[:40]!r} outside the directory")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no manifest of exported kernels ({type(error).__name__}: {str(error)[:80]})",
            hint="Make one with `quantkit export CHECKPOINT --to kernels`.",
        ) from error
    return dict(manifest)
