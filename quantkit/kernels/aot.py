"""Ahead of time: every kernel that the ops would launch, compiled into binaries without a GPU (Triton).

The family is not listed by hand. The backends run on tensors of the meta device while Triton's launcher is
replaced by a recorder (`record`), so what is compiled is what would be launched: the same signature,
constants, warps and stages, for each shape, dtype, number of rows and encoding asked for. `build` compiles
the records for each target, checks shared memory against the chip's limit (with fewer pipeline stages
where it does not fit), and writes

    DIR/manifest.json
    DIR/<target>/<kernel>-<digest>.cubin (NVIDIA) or .hsaco (AMD)

A manifest entry holds: the arguments in order with their types, which of them must be divisible by 16
(pointers: aligned to 16 bytes), the compile-time constants, the grid rule in words of those, threads per
program, bytes of shared memory (to ask for at launch, and static ones besides) and the chip's limit.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from quantkit.encoding import Affine, Codebook, Encoding, Float8, expected_shapes
from quantkit.errors import QuantkitError, UsageError
from quantkit.kernels import dispatch, launch, tuned

#: Bytes of shared memory that one program may have, by target (CUDA programming guide, table of compute
#: capabilities, minus the 1 KB that the driver keeps from sm_80 on; AMD: the size of the LDS).
SHARED_LIMIT = {
    "sm_75": 65536,
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_87": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx90a": 65536,
    "gfx942": 65536,
    "gfx950": 163840,
    "gfx1100": 65536,
    "gfx1201": 65536,
}
_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
}


#: A group longer than any row: one scale (with 2 bits, ternary weights and their int8 inputs).
WHOLE_ROW = 1 << 30


@dataclass
class Record:
    """One launch: a kernel, its arguments' types, constants and options."""

    kernel: JITFunction[Any]
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: list[str]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def grid_rule(self) -> str:
        """The grid in words of arguments and constants, as the kernel's docstring says it."""
        doc = " ".join((self.kernel.fn.__doc__ or "").split())
        start = doc.lower().find("grid")
        first = doc.find("(", start)
        if start < 0 or first < 0:
            return ""
        depth = 0
        for i in range(first, len(doc)):
            depth += {"(": 1, ")": -1}.get(doc[i], 0)
            if depth == 0:
                return doc[first : i + 1]
        return ""

    def key(self) -> str:
        """Equal for launches that one binary serves."""
        parts = (self.name, self.signature, self.constants, self.divisible, self.options)
        return repr(tuple(repr(p) for p in parts))


@dataclass(frozen=True)
class Request:
    """What to compile: encodings, dtypes of x, shapes of W, numbers of rows of x."""

    encodings: Sequence[Encoding] = (
        Affine(4, 128),
        Affine(2, 128),
        Affine(3, 128),
        Affine(8, 128),
        Affine(2, WHOLE_ROW),
        Codebook(4, 64),
        Float8((128, 128)),
    )
    dtypes: Sequence[torch.dtype] = (torch.float16, torch.bfloat16)
    shapes: Sequence[tuple[int, int]] = ((4096, 4096), (14336, 4096))
    rows: Sequence[int] = (1, 2, 8, 16, 32, 64, 128, 4096)
    backward: bool = True


@dataclass
class Built:
    """A compiled binary, as the manifest describes it."""

    entry: dict[str, Any]
    binary: bytes = field(repr=False)


def parse_target(name: str) -> GPUTarget:
    """`sm_90` -> CUDA, `gfx942` -> HIP; UsageError for names that no limit is known for."""
    if name not in SHARED_LIMIT:
        raise UsageError(f"unknown target {name!r}", hint=f"Known: {', '.join(SHARED_LIMIT)}.")
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 32 if name.startswith(("gfx11", "gfx12")) else 64)


@contextmanager
def record(target: GPUTarget) -> Iterator[list[Record]]:
    """Inside, Triton launches are not run but appended to the list, as if on `target`."""
    records: list[Record] = []

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        records.append(_describe(self, args, kwargs, grid))

    arch = target.arch if isinstance(target.arch, int) else 0
    with (
        tuned.ignored(),  # a build is for every machine
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(launch, "target", lambda: (target.backend, arch)),
    ):
        yield records


def _describe(kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any) -> Record:
    names = [p.name for p in kernel.params]
    values = dict(zip(names, args))
    values.update({k: v for k, v in kwargs.items() if k in names})
    options = {k: v for k, v in kwargs.items() if k not in names}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible = []
    for param in kernel.params:
        value = values[param.name]
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constants[param.name] = value
        elif isinstance(value, Tensor):
            signature[param.name] = _TYPES[value.dtype]
            divisible.append(param.name)
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i64" if abs(value) >= 2**31 else "i32"
            if value % 16 == 0 and not param.do_not_specialize:
                divisible.append(param.name)
    return Record(kernel, signature, constants, divisible, options, tuple(grid))


def collect(request: Request, target: GPUTarget) -> list[Record]:
    """Every distinct launch of the request on `target`."""
    found: dict[str, Record] = {}
    with record(target) as records:
        for encoding in request.encodings:
            for dtype in request.dtypes:
                for shape in request.shapes:
                    for rows in request.rows:
                        _call(encoding, shape, rows, dtype, request.backward)
    for item in records:
        found.setdefault(item.key(), item)
    return list(found.values())


def _call(encoding: Encoding, shape: tuple[int, int], rows: int, dtype: torch.dtype, backward: bool) -> None:
    """Run the backend's linear (and its backward) on meta tensors; what it launches is recorded."""
    (n, k), shapes = shape, expected_shapes(encoding, shape)

    def empty(size: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=kind, device="meta")

    x, grad = empty((rows, k), dtype), empty((rows, n), dtype)
    codes = empty(shapes["codes"], torch.uint8)
    scale_dtype = torch.float16 if isinstance(encoding, Affine) else torch.float32
    scale = empty(shapes["scale"], scale_dtype)
    linear: tuple[Any, ...]
    back: tuple[Any, ...]
    if isinstance(encoding, Affine):
        name, zero = "affine", empty(shapes["scale"], torch.uint8)
        options = (encoding.bits, encoding.group_size)
        ternary = encoding.bits == 2 and encoding.group_size >= k
        linear = (x, codes, scale, zero, None, None, *options, "int8_token" if ternary else None)
        back = (grad, codes, scale, zero, None, *options, k)
    elif isinstance(encoding, Codebook):
        name, lut = "codebook", empty((16,), torch.float32)
        linear = (x, codes, scale, lut, None, n, encoding.block_size)
        back = (grad, codes, scale, lut, k, encoding.block_size)
    else:
        name = "float8"
        tiled = 1 < encoding.block[1] < k
        linear = (x, codes, scale, None, *encoding.block, "fp8_group128" if tiled else "fp8_token", None)
        back = (grad, codes, scale, *encoding.block)
        native = dispatch.implementation("float8_linear", "cuda")
        if native is not None:
            native(*linear)  # with rounded inputs; with 16-bit ones below
        linear = (*linear[:-2], None, None)
    for op, arguments in ((f"{name}_linear", linear), (f"{name}_linear_backward", back)):
        if op.endswith("backward") and not backward:
            continue
        kernel = dispatch.implementation(op, "cuda")
        if kernel is not None:
            kernel(*arguments)


def declared_shared(ptx: str) -> int:
    """Bytes of shared memory that inline PTX declares in a kernel, which Triton's metadata does not count."""
    return sum(
        4 * int(words) for words in re.findall(r"\.shared \.align 16 \.b32 quantkit_\w+\[(\d+)\]", ptx)
    )


def compile_record(item: Record, target_name: str) -> Built:
    """One binary, with as many pipeline stages as the chip's shared memory holds; QuantkitError if none fit."""
    target, limit = parse_target(target_name), SHARED_LIMIT[target_name]
    constants = dict(item.constants)
    options = dict(item.options)
    names = list(item.signature)
    while True:
        source = ASTSource(
            fn=item.kernel,
            signature=dict(item.signature),
            constexprs={(names.index(k),): v for k, v in constants.items()},
            attrs={(names.index(k),): [["tt.divisibility", 16]] for k in item.divisible},
        )
        compiled = triton.compile(source, target=target, options=options)
        shared = int(compiled.metadata.shared)
        static = declared_shared(compiled.asm.get("ptx", ""))
        stages = int(constants.get("STAGES", options.get("num_stages", 1)))
        if shared + static <= limit:
            break
        if stages == 1:
            raise QuantkitError(
                f"{item.name} takes {shared + static} bytes of shared memory, {target_name} has {limit}",
                hint="Its tile in quantkit/kernels/tuning.py is too large for this chip.",
            )
        options["num_stages"] = stages - 1
        if "STAGES" in constants:
            constants["STAGES"] = stages - 1
    kind = "cubin" if target.backend == "cuda" else "hsaco"
    binary = compiled.asm[kind]
    shown = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in constants.items()}
    digest = hashlib.sha256(repr((item.key(), sorted(shown.items()))).encode()).hexdigest()[:12]
    entry = {
        "kernel": item.name,
        "file": f"{target_name}/{item.name}-{digest}.{kind}",
        "symbol": compiled.metadata.name,
        "target": target_name,
        "arguments": {k: v for k, v in item.signature.items() if v != "constexpr"},
        "divisible_by_16": item.divisible,
        "constants": shown,
        "grid": item.grid_rule,
        "threads": int(compiled.metadata.num_warps) * target.warp_size,
        "scratch": [
            int(getattr(compiled.metadata, f"{kind}_scratch_size", 0)) for kind in ("global", "profile")
        ],
        "shared": shared,
        "static_shared": static,
        "shared_limit": limit,
        "sha256": hashlib.sha256(binary).hexdigest(),
    }
    return Built(entry, binary)


def build(
    request: Request, targets: Iterable[str], out: Path, report: Any = None, jobs: int = 1
) -> dict[str, Any]:
    """Compile the request for every target into `out`; returns the manifest that was written.

    `report(entry)` is called after each binary. What a target cannot have is left out and named in the
    manifest's "left_out": kernels too large for its shared memory, bfloat16 on sm_75. More than one of `jobs`
    compile in processes of their own; the result is the same, in the same order.
    """
    entries: list[dict[str, Any]] = []
    left_out: list[str] = []
    manifest = {"format": 1, "triton": triton.__version__, "left_out": left_out, "kernels": entries}
    work: list[tuple[str, Request, int]] = []
    for name in dict.fromkeys(targets):
        wanted = request
        if name == "sm_75" and torch.bfloat16 in request.dtypes:
            wanted = replace(request, dtypes=tuple(d for d in request.dtypes if d != torch.bfloat16))
            left_out.append("sm_75: bfloat16 (no bfloat16 matrix units)")
        work += [(name, wanted, i) for i in range(len(_collected(name, wanted)))]
    try:
        with _mapper(jobs) as mapped:
            for built in mapped(_compile_one, work):
                if isinstance(built, str):
                    left_out.append(built)
                    continue
                path = out / built.entry["file"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(built.binary)
                entries.append(built.entry)
                if report is not None:
                    report(built.entry)
    finally:  # an interrupted build, too, says what it left
        _collected.cache_clear()
        out.mkdir(parents=True, exist_ok=True)
        (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


@cache
def _collected(target_name: str, request: Request) -> list[Record]:
    """`collect`, once per process: records do not travel between processes, their numbers do."""
    return collect(request, parse_target(target_name))


def _compile_one(work: tuple[str, Request, int]) -> Built | str:
    """One binary, or why the target cannot have it."""
    name, request, index = work
    try:
        return compile_record(_collected(name, request)[index], name)
    except QuantkitError as too_large:
        return f"{name}: {too_large.what}"


@contextmanager
def _mapper(jobs: int) -> Iterator[Callable[..., Iterable[Built | str]]]:
    """`map` here, or over `jobs` processes, started afresh: a fork of torch's threads may hang."""
    if jobs <= 1:
        yield map
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
