"""Reading compiled NVIDIA code: what is in the loop of a kernel's products, and what may not be there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

#: Instructions whose first operand is no register that they write.
_NO_RESULT = re.compile(
    r"(ST|RED|ATOM|BAR|BRA|BSYNC|BSSY|EXIT|SYNCS|UT|HGMMA|WARP|MEMBAR|FENCE|NOP|R2UR|ISETP|FSETP|PLOP3|VOTE|"
    r"DEPBAR|ELECT|CCTL|ERRBAR|U[A-Z])"
)
_PRODUCT = re.compile(r"HGMMA\S* R\d+, R(\d+), gdesc")


def disassembled(cubin: bytes) -> list[str]:
    """nvdisasm's lines: labels `.L_x_3:` and instructions without addresses and encodings."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            lines.append(label[0])
        elif instruction := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;", line):
            lines.append(instruction[1])
    return lines


def product_loops(lines: list[str]) -> list[list[str]]:
    """Bodies of loops with products that hold no smaller such loop."""
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    spans = []
    for end, line in enumerate(lines):
        # Retries of a barrier lie behind the code and come back by an unconditional branch.
        target = re.match(r"@\S+\s+BRA.*?`\((\.L_x_\d+)\)", line)
        start = labels.get(target[1], end) if target else end
        if start < end and any("HGMMA" in inside for inside in lines[start:end]):
            spans.append((start, end))
    smallest = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [lines[start : end + 1] for start, end in smallest]


def beside_products(loop: list[str]) -> list[list[str]]:
    """What runs from the issue of the first of a loop's two products to that of the second, and from there to the
    last wait.

    Serialized products have a wait of their own each: here there are two, one of which leaves a group in flight.
    """
    waits = [i for i, line in enumerate(loop) if "DEPBAR.LE gsb0" in line]
    assert [loop[i].split()[-1] for i in waits] == ["0x1", "0x0"]
    ends = [i for i, line in enumerate(loop) if "HGMMA" in line and "gsb0" in line]
    assert len(ends) == 2 and ends[1] < waits[0]
    return [loop[ends[0] : ends[1]], loop[ends[1] : waits[1]]]


def overwritten_operands(loop: list[str]) -> list[str]:
    """Writes to registers that a product of the loop may still be reading: two turns are followed.

    A product with registers as its first operand is in flight until a wait (DEPBAR gsb0, n) leaves at
    most n groups of later products.
    """
    found: list[str] = []
    groups: list[set[int]] = []
    current: set[int] = set()
    for line in loop + loop:
        if product := _PRODUCT.search(line):
            first = int(product[1])
            current |= set(range(first, first + 4))
            if "gsb0" in line:
                groups.append(current)
                current = set()
        elif wait := re.search(r"DEPBAR\.LE gsb0, 0x(\d+)", line):
            groups = groups[len(groups) - int(wait[1]) :] if int(wait[1]) < len(groups) else groups
            groups = groups if int(wait[1]) else []
        elif set(_written(line)) & set().union(current, *groups):
            found.append(line)
    return found


def _written(line: str) -> Iterable[int]:
    line = re.sub(r"^@!?U?P\w+\s+", "", line)
    operation = line.split()[0]
    result = re.match(r"\S+\s+(?:P\d+,\s*)?R(\d+)", line)
    if _NO_RESULT.match(operation) or result is None:
        return ()
    first, count = int(result[1]), 1
    if operation.startswith("LD"):
        matrices = re.match(r"LDSM\..*\.([24])$", operation)
        count = int(matrices[1]) if matrices else 4 if ".128" in operation else 2 if ".64" in operation else 1
    elif ".WIDE" in operation or operation.startswith("CS2R"):
        count = 2
    return range(first, first + count)
