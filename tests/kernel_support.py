"""What the tests of kernels share: Triton's interpreter, compilation without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).resolve().parent / "kernels"


def interpreted(script: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """The JSON object that `tests/kernels/<script>` prints last, run by Triton's interpreter.

    In a process of its own: TRITON_INTERPRET must be set before Triton is imported, and the interpreter dies at an
    out-of-bounds load.
    """
    given = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(KERNELS.parents[1])}
    done = subprocess.run(
        [sys.executable, str(KERNELS / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **given, **environment},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{script} {arguments}: exit {done.returncode}\n{done.stderr[-2000:]}"
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], target: Any, **options: int
) -> Any:
    """The kernel's binary for `target`, with pointers and sizes divisible by 16, M excepted."""
    import triton
    from triton.compiler import ASTSource

    source = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as source

    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        described = signature[name].startswith("tensordesc")
        if name not in constants and name != "M" and not described:
            attributes[(i,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(source(kernel, signature, values, attributes), target=target, options=options)


def longest_loop(ptx: str) -> str:
    """The text of the longest loop in PTX: from a label to the branch back to it."""
    labels = {m.group(1): m.start() for m in re.finditer(r"^(\$L__BB\d+_\d+):", ptx, re.M)}
    loops = [
        ptx[labels[m.group(1)] : m.start()]
        for m in re.finditer(r"bra(?:\.uni)?\s+(\$L__BB\d+_\d+);", ptx)
        if labels[m.group(1)] < m.start()
    ]
    return max(loops, key=len)
