"""What a product launches, as data that needs neither Triton nor torch to be followed.

A backend's function (`quantkit.kernels.dispatch`) is run on tensors of the meta device, once for every
number of rows in `ROWS`, while Triton's launcher and torch's allocations are recorded. Rows that launch the
same kernels in the same order form a *regime*; inside it every grid dimension, scalar argument and scratch
size is a `Rule` of the number of rows, found from the recorded values and true for each of them:

    times * ceil(rows * mul / div)

So a plan says: allocate these scratch buffers, then launch these kernels with these pointers and numbers.
Work that is not a launch of ours (the vendor's BLAS beyond 128 rows) ends the last regime; more rows are
multiplied piece by piece, or through the dense weight that the `dequantize` launches write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from quantkit.errors import QuantkitError
from quantkit.kernels import launch
from quantkit.kernels.aot import Record, _describe
from quantkit.kernels.gather_columns import BLOCK, gather_columns_kernel

#: Every number of rows up to 256, beyond all thresholds of the tuning tables, and samples of the rest.
ROWS = (*range(1, 257), 300, 511, 512, 513, 1000, 1024, 2048, 4099, 8192)
#: Divisors that occur in grids: tiles of rows, blocks of elements.
_DIVISORS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Rule:
    """`times * ceil(rows * mul / div)`; a constant has `mul` 0 and its value in `times`."""

    times: int
    mul: int = 0
    div: int = 1

    def at(self, rows: int) -> int:
        """The value for a number of rows."""
        return self.times if self.mul == 0 else self.times * -(-rows * self.mul // self.div)

    def to_json(self) -> int | dict[str, int]:
        """A number, or the three parts."""
        return self.times if self.mul == 0 else {"times": self.times, "mul": self.mul, "div": self.div}


@dataclass
class Launch:
    """One launch as it was recorded: per argument a buffer's name or a number."""

    record: Record
    arguments: list[tuple[str, str | int | float]]


@dataclass
class Run:
    """All of a product's launches for one number of rows, and its scratch buffers in bytes."""

    rows: int
    launches: list[Launch]
    scratch: dict[str, int]
    foreign: list[str]

    def key(self) -> tuple[Any, ...]:
        """Equal for runs of one regime."""
        steps = [(s.record.key(), [a for _, a in s.arguments if isinstance(a, str)]) for s in self.launches]
        return repr(steps), tuple(self.scratch), tuple(self.foreign)


@dataclass
class Step:
    """A launch of a regime."""

    record: Record
    grid: tuple[Rule, ...]
    arguments: list[tuple[str, str | Rule | float]]


@dataclass
class Regime:
    """`first` to `last` rows: what to launch, and the bytes of each scratch buffer."""

    first: int
    last: int
    scratch: dict[str, Rule]
    steps: list[Step]


class _Recorder(TorchDispatchMode):
    """Names the memory that a backend's function allocates and notes its launches and other work."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {_memory(t): name for name, t in inputs.items()}
        self.kept: list[Tensor] = list(inputs.values())  # so that no memory's identity is used twice
        self.scratch: dict[str, int] = {}
        self.launches: list[Launch] = []
        self.foreign: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = func._schema.name.removeprefix("aten::")
        if not isinstance(out, Tensor) or _memory(out) in self.names:
            if not func.is_view:  # it wrote into known memory, as `mm(..., out=...)` does
                self.foreign.append(kind)
            return out
        self.kept.append(out)
        name = f"scratch{len(self.scratch)}"
        self.names[_memory(out)] = name
        self.scratch[name] = out.numel() * out.element_size()
        if kind == "index_select" and args[1] == 1:
            self._gather(args[0], args[2], out)
        elif kind not in ("empty", "new_empty", "empty_like", "empty_strided"):
            self.foreign.append(kind)
        return out

    def _gather(self, x: Tensor, columns: Tensor, out: Tensor) -> None:
        """torch's `index_select` of columns, for which a launch of ours stands in."""
        rows, width = out.shape
        values = (x, columns, out, width, x.stride(0))
        self.launch(gather_columns_kernel, values, {}, (-(-width // BLOCK), rows, 1))

    def launch(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any) -> None:
        """Note a launch of `kernel`."""
        if kernel is gather_columns_kernel:
            kwargs = {"BLOCK": BLOCK, "num_warps": 4}
        record = _describe(kernel, args, kwargs, grid)
        names = [p.name for p in kernel.params]
        values = dict(zip(names, args)) | {k: v for k, v in kwargs.items() if k in names}
        arguments: list[tuple[str, str | int | float]] = []
        for name, kind in record.signature.items():
            if kind == "constexpr":
                continue
            value = values[name]
            if isinstance(value, Tensor):
                if value.storage_offset() != 0:
                    self.foreign.append("a view in the middle of memory")
                value = self.names[_memory(value)]
            arguments.append((name, value))
        self.launches.append(Launch(record, arguments))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def record_run(
    function: Callable[..., Any],
    inputs: dict[str, Tensor],
    arguments: Sequence[Any],
    target: GPUTarget,
    rows: int,
) -> Run:
    """What `function(*arguments)` launches on `target`; `inputs` names the tensors among the arguments.

    QuantkitError where the backend does not cover the arguments.
    """
    recorder = _Recorder(inputs)

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        recorder.launch(self, args, kwargs, grid)

    arch = target.arch if isinstance(target.arch, int) else 0
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(launch, "target", lambda: (target.backend, arch)),
        recorder,
    ):
        out = function(*arguments)
    if out is NotImplemented:
        raise QuantkitError(f"quantkit has no kernel for {function.__name__} with these arguments")
    written = recorder.names[_memory(out)]
    recorder.scratch.pop(written, None)
    renamed = {written: "out"} | {old: f"scratch{i}" for i, old in enumerate(recorder.scratch)}
    for step in recorder.launches:
        step.arguments = [
            (name, renamed.get(value, value) if isinstance(value, str) else value)
            for name, value in step.arguments
        ]
    scratch = {renamed[name]: size for name, size in recorder.scratch.items()}
    return Run(rows, recorder.launches, scratch, recorder.foreign)


def regimes(run_at: Callable[[int], Run]) -> list[Regime]:
    """The regimes of a product, from `run_at(rows)` for each of `ROWS`; they follow one another from 1 on."""
    runs: list[Run] = []
    for rows in ROWS:
        run = run_at(rows)
        if run.foreign:
            break
        runs.append(run)
    if not runs:
        raise QuantkitError(f"one row needs {', '.join(run.foreign)}, which is no kernel of quantkit's")
    groups: list[list[Run]] = []
    for run in runs:
        if groups and groups[-1][-1].key() == run.key():
            groups[-1].append(run)
        else:
            groups.append([run])
    out = [regime_of(group) for group in groups]
    for before, after in pairwise(out):
        if before.last + 1 != after.first:  # a threshold between two samples: only what was seen is said
            return out[: out.index(after)]
    return out


def regime_of(runs: list[Run]) -> Regime:
    """The regime of runs that have one key: its rules."""
    rows = [r.rows for r in runs]
    first = runs[0]
    widths = sorted(
        {abs(v) for s in first.launches for _, v in s.arguments if isinstance(v, int) and v > 0}, reverse=True
    )
    scratch = {name: fit(rows, [r.scratch[name] for r in runs], widths) for name in first.scratch}
    steps = []
    for i, step in enumerate(first.launches):
        grids = [_three(r.launches[i].record.grid) for r in runs]
        grid = tuple(fit(rows, [g[axis] for g in grids], widths) for axis in range(3))
        arguments: list[tuple[str, str | Rule | float]] = []
        for j, (name, value) in enumerate(step.arguments):
            if isinstance(value, str | float):
                arguments.append((name, value))
            else:
                values = [int(r.launches[i].arguments[j][1]) for r in runs]
                arguments.append((name, fit(rows, values, widths)))
        steps.append(Step(step.record, grid, arguments))
    return Regime(rows[0], rows[-1], scratch, steps)


def _three(grid: tuple[int, ...]) -> tuple[int, ...]:
    return (*(int(g) for g in grid), 1, 1)[:3]


def fit(rows: list[int], values: list[int], widths: Sequence[int] = ()) -> Rule:
    """The rule that gives `values` at `rows`; QuantkitError if none of the known forms does."""
    if len(set(values)) == 1:
        return Rule(values[0])
    for div in _DIVISORS:
        for mul in (1, *widths):
            unit = -(-rows[0] * mul // div)
            rule = Rule(values[0] // unit, mul, div)
            if values[0] % unit == 0 and all(rule.at(m) == v for m, v in zip(rows, values)):
                return rule
    raise QuantkitError(f"no rule for {values[:4]}... at {rows[:4]}... rows", hint="Report this.")
