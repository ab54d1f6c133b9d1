"""Functions of Gluon kernels on numpy arrays: what they compute, whatever layout holds it.

A jit function of integer arithmetic, reshapes and inline PTX runs as the Python it is written in, with `Language` in
place of `gluon.language` and `Values` for tensors. Layouts mean nothing here. One thing they would decide is agreed
on: inline PTX with pack=2 takes neighbours along the last dimension together.
"""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

FLOAT32, INT32, FLOAT16, BFLOAT16 = "float32", "int32", "float16", "bfloat16"
_NUMPY = {FLOAT32: np.float32, INT32: np.uint32, FLOAT16: np.uint16, BFLOAT16: np.uint16}


class Values:
    """An array with a Gluon tensor's methods: int32 as uint32, 16-bit floats as their bits."""

    def __init__(self, array: Any) -> None:
        self.array = np.asarray(array)
        self.shape = self.array.shape

    def reshape(self, *shape: int) -> Values:
        return Values(self.array.reshape(shape))

    def permute(self, order: Sequence[int]) -> Values:
        return Values(self.array.transpose(order))

    def split(self) -> tuple[Values, Values]:
        assert self.shape[-1] == 2
        return Values(self.array[..., 0]), Values(self.array[..., 1])

    def to(self, dtype: str, bitcast: bool = False) -> Values:
        return Values(self.array.view(_NUMPY[dtype]) if bitcast else self.array.astype(_NUMPY[dtype]))

    def __neg__(self) -> Values:
        return Values(-self.array)

    def _with(self, other: Any, operation: Any) -> Values:
        value = other.array if isinstance(other, Values) else other
        if isinstance(value, int):  # wraps around
            value = np.asarray(value & 0xFFFFFFFF, self.array.dtype)
        return Values(operation(self.array, value))

    def __add__(self, other: Any) -> Values:
        return self._with(other, np.add)

    def __radd__(self, other: Any) -> Values:
        return self._with(other, np.add)

    def __sub__(self, other: Any) -> Values:
        return self._with(other, np.subtract)

    def __rsub__(self, other: Any) -> Values:
        return self._with(other, lambda a, b: np.subtract(b, a))

    def __mul__(self, other: Any) -> Values:
        return self._with(other, np.multiply)

    def __rmul__(self, other: Any) -> Values:
        return self._with(other, np.multiply)

    def __and__(self, other: Any) -> Values:
        return self._with(other, np.bitwise_and)

    def __rshift__(self, other: Any) -> Values:
        return self._with(other, np.right_shift)

    def __rlshift__(self, other: Any) -> Values:
        return self._with(other, lambda a, b: np.left_shift(b, a))

    def __eq__(self, other: object) -> Values:  # type: ignore[override]
        return self._with(other, np.equal)

    __hash__ = None  # type: ignore[assignment]


class Language:
    """The part of `gluon.language` that `Values` have."""

    constexpr = Any
    float32, int32, float16, bfloat16 = FLOAT32, INT32, FLOAT16, BFLOAT16

    @staticmethod
    def SliceLayout(dim: int, parent: Any) -> None:
        return None

    @staticmethod
    def arange(start: int, end: int, layout: Any) -> Values:
        return Values(np.arange(start, end, dtype=np.uint32))

    @staticmethod
    def full(shape: Sequence[int], value: int, dtype: str, layout: Any) -> Values:
        return Values(np.full(shape, value, _NUMPY[dtype]))

    @staticmethod
    def expand_dims(a: Values, axis: int) -> Values:
        return Values(np.expand_dims(a.array, axis))

    @staticmethod
    def convert_layout(a: Values, layout: Any, assert_trivial: bool) -> Values:
        return a

    @staticmethod
    def where(condition: Values, a: int, b: int) -> Values:
        return Values(np.where(condition.array, np.uint32(a), np.uint32(b)))

    @staticmethod
    def join(a: Values, b: Values) -> Values:
        return Values(np.stack([a.array, b.array], -1))

    @staticmethod
    def inline_asm_elementwise(
        asm: Any, constraints: str, args: Sequence[Values], dtype: Any, is_pure: bool, pack: int
    ) -> Any:
        kinds = (dtype,) if isinstance(dtype, str) else tuple(dtype)
        arrays = np.broadcast_arrays(*(a.array for a in args))
        inputs = [a if pack == 1 else a[..., i] for a in arrays for i in range(pack)]
        assert len(constraints.split(",")) == len(kinds) + len(inputs)
        registers = run_ptx(str(getattr(asm, "value", asm)), inputs, len(kinds))
        if pack == 2:
            assert {_NUMPY[kind] for kind in kinds} == {np.uint16} and arrays[0].shape[-1] == 2
            registers = [np.stack([r & 0xFFFF, r >> 16], -1) for r in registers]
        found = tuple(Values(r.astype(_NUMPY[kind])) for r, kind in zip(registers, kinds))
        return found[0] if isinstance(dtype, str) else found


def plain(module: types.ModuleType) -> dict[str, Any]:
    """The names of a module of jit functions, with those as Python functions that see `Language` for `gl`."""
    names: dict[str, Any] = {}
    for name, value in vars(module).items():
        function = getattr(value, "fn", None)
        if isinstance(function, types.FunctionType):
            value = types.FunctionType(function.__code__, names, name, function.__defaults__)
        elif hasattr(value, "value") and type(value).__name__ == "constexpr":
            value = value.value
        names[name] = value
    names["gl"] = Language
    return names


def run_ptx(asm: str, inputs: Sequence[np.ndarray], outputs: int) -> list[np.ndarray]:
    """The output registers of a block of PTX, uint32; float registers are kept as their bits."""
    registers: dict[str, np.ndarray] = {}
    for i, value in enumerate(inputs):
        registers[f"${outputs + i}"] = np.ascontiguousarray(value).view(np.uint32)

    def read(name: str) -> np.ndarray:
        if re.fullmatch(r"0f[0-9A-F]{8}", name):
            return np.uint32(int(name[2:], 16))
        return np.uint32(int(name, 0)) if name[0].isdigit() else registers[name]

    for line in asm.strip("{} ").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        operation, operands = line.split(None, 1)
        result, *names = [part.strip() for part in operands.split(",")]
        registers[result] = OPERATIONS[operation](*(read(name) for name in names))
    return [registers[f"${i}"] for i in range(outputs)]


def _prmt(a: Any, b: Any, order: Any) -> Any:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.uint32(0)
    for i in range(4):
        nibble = order >> np.uint32(4 * i) & np.uint32(15)
        assert (nibble < 8).all(), "replicates a sign"
        byte = both >> (np.uint64(8) * nibble.astype(np.uint64)) & np.uint64(255)
        out = out | (byte.astype(np.uint32) << np.uint32(8 * i))
    return out


def _rotate(low: Any, high: Any, by: Any) -> Any:
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    return (both << (by & np.uint32(31)).astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def _lop3(a: Any, b: Any, c: Any, table: Any) -> Any:
    out = np.uint32(0)
    for i in range(8):
        if int(table) >> i & 1:
            out = out | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _floats(operation: Any) -> Any:
    """In float64, rounded once: exact for the sums and products of these few bits."""

    def run(*bits: Any) -> Any:
        exact = operation(*(np.asarray(b, np.uint32).view(np.float32).astype(np.float64) for b in bits))
        return exact.astype(np.float32).view(np.uint32)

    return run


def _pair(dtype: torch.dtype) -> Any:
    def half(bits: Any) -> Any:
        rounded = torch.from_numpy(np.array(bits).view(np.float32)).to(dtype)
        return rounded.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)

    return lambda high, low: half(high) << np.uint32(16) | half(low)


def _halves(dtype: torch.dtype, operation: Any) -> Any:
    """On two 16-bit floats a register, in float64 and rounded once."""

    def run(*registers: Any) -> Any:
        out = np.uint32(0)
        for shift in (0, 16):
            bits = (np.asarray(r >> np.uint32(shift) & np.uint32(0xFFFF), np.uint16) for r in registers)
            wide = [torch.from_numpy(np.array(b).view(np.int16)).view(dtype).double() for b in bits]
            half = operation(*wide).to(dtype).view(torch.int16).numpy().view(np.uint16)
            out = out | half.astype(np.uint32) << np.uint32(shift)
        return out

    return run


#: PTX instructions on registers' bits.
OPERATIONS: dict[str, Any] = {
    "prmt.b32": _prmt,
    "shf.l.wrap.b32": _rotate,
    "lop3.b32": _lop3,
    "and.b32": lambda a, b: a & b,
    "shr.b32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "mov.b32": lambda a: a,
    "fma.rn.f32": _floats(lambda a, b, c: a * b + c),
    "sub.rn.f32": _floats(lambda a, b: a - b),
    "mul.rn.f32": _floats(lambda a, b: a * b),
    "fma.rn.bf16x2": _halves(torch.bfloat16, lambda a, b, c: a * b + c),
    "mul.rn.bf16x2": _halves(torch.bfloat16, lambda a, b: a * b),
    "fma.rn.f16x2": _halves(torch.float16, lambda a, b, c: a * b + c),
    "add.rn.f16x2": _halves(torch.float16, lambda a, b: a + b),
    "mul.rn.f16x2": _halves(torch.float16, lambda a, b: a * b),
    "cvt.rn.bf16x2.f32": _pair(torch.bfloat16),
    "cvt.rn.f16x2.f32": _pair(torch.float16),
}
