"""The PTX that fills a codebook's table of pairs in shared memory, run statement by statement for whole warps."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from gluon_values import OPERATIONS

pytest.importorskip("triton")

from quantkit.kernels import codebook_lookup

LANES = np.arange(32, dtype=np.uint32)


class Warp:
    """32 lanes; registers are uint32, floats their bits, addresses in bytes from the table of numbers or of pairs."""

    def __init__(self, warp: int, warps: int, numbers: np.ndarray, shared: np.ndarray) -> None:
        self.numbers, self.shared = numbers, shared
        self.values: dict[str, Any] = {
            "%laneid": LANES, "%tid.x": 32 * warp + LANES, "%ntid.x": np.full(32, 32 * warps, np.uint32),
            "quantkit_pairs": np.zeros(32, np.uint32), "$1": np.zeros(32, np.uint32),
        }  # fmt: skip

    def read(self, name: str) -> Any:
        return (
            np.full(32, int(name, 0) & 0xFFFFFFFF, np.uint32)
            if re.match(r"-?\d", name)
            else self.values[name]
        )

    def run(self, asm: str) -> None:
        statements: list[str] = []
        labels: dict[str, int] = {}
        for text in asm.split("{", 1)[1].rsplit("}", 1)[0].split(";"):
            while match := re.match(r"\s*(\w+):", text):
                labels[match[1]], text = len(statements), text[match.end() :]
            statements.append(text.strip())
        at = steps = 0
        while at < len(statements):
            target = self.step(statements[at])
            at = at + 1 if target is None else labels[target]
            assert (steps := steps + 1) < 10_000, "does not end"

    def step(self, text: str) -> str | None:
        """One statement; the label that it goes to."""
        if not text or text.startswith((".reg", "bar.sync")):
            return None
        if text.startswith("@p bra"):
            return text.split()[-1] if self.values["p"] else None
        operation, rest = text.split(None, 1)
        if operation == "bra":
            return rest
        if operation == "st.shared.v4.b32":
            register, offset, words = re.fullmatch(r"\[(\w+) \+ (\d+)\], \{(.*)\}", rest).groups()  # type: ignore[union-attr]
            first = (self.read(register) + np.uint32(int(offset))) // 4
            for i, word in enumerate(words.split(", ")):
                assert (self.shared[first + i] == 0).all(), "written twice"
                self.shared[first + i] = self.read(word)
            return None
        result, *names = [part.strip() for part in rest.split(",")]
        if operation == "ld.global.f32":
            self.values[result] = self.numbers[self.read(names[0].strip("[]")) // 4]
            return None
        a, *more = [self.read(name) for name in names]
        if operation == "setp.ge.u32":
            (b,) = more
            assert (a == a[0]).all(), "warps do not part"
            self.values[result] = bool(a[0] >= b[0])
        elif operation == "shfl.sync.idx.b32":
            self.values[result] = a[more[0] & 31]
        elif operation in ("mad.lo.u32", "mad.wide.u32"):
            self.values[result] = a * more[0] + more[1]
        elif operation == "add.u32":
            self.values[result] = a + more[0]
        else:
            self.values[result] = OPERATIONS[operation.replace(".u32", ".b32")](a, *more)
        return None


@pytest.mark.parametrize("warps", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_lane_has_every_pair(dtype: torch.dtype, warps: int) -> None:
    """Word 32 b + l, for lane l: the low nibble's value of byte b above the high nibble's, rounded."""
    numbers = torch.randn(16) + 3  # none is zero, so a word that was written is not
    name = "BF16" if dtype == torch.bfloat16 else "F16"
    asm = getattr(codebook_lookup, f"_FILL_{name}").value
    shared = np.zeros(8192, np.uint32)
    for warp in range(warps):
        Warp(warp, warps, numbers.numpy().view(np.uint32), shared).run(asm)
    halves = numbers.to(dtype).view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    byte = np.repeat(np.arange(256), 32)
    assert np.array_equal(shared, halves[byte & 15] << 16 | halves[byte >> 4])
