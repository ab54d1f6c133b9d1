"""What the tests of kernels share: compilation without a GPU."""

from __future__ import annotations

import re
from typing import Any


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
