"""torch.export programs: one graph for prefill and decode, over a static cache.

    logits, cache... = program(input_ids [B, S], attention_mask [B, L], position_ids [B, S],
                               cache_position [S], [(key, value), ...] each float32 [B, H_kv, L, D])

B, S and L are dynamic. By default quantkit's operators are decomposed into aten, so that a process with
nothing but torch loads and runs the file; the weights stay packed in it and are dequantized by the graph.
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from quantkit.errors import DestinationError, UsageError
from quantkit.export.aten_layers import aten_layer
from quantkit.export.decoder import StaticDecoder
from quantkit.export.onnx_graph import CacheShape, quiet
from quantkit.linear import QuantLinear
from quantkit.staging import FULL

MODEL = "model.pt2"


def cache_shape(model: Any) -> CacheShape:
    """Heads and sizes of the cache of a model."""
    return CacheShape.of(model)


def trace(model: Any, *, keep_ops: bool, device: str = "cpu") -> Any:
    """The ExportedProgram of a prepared model (see `quantkit.export.decoder.prepare`), its tensors on `device`."""
    shape = CacheShape.of(model)
    if not keep_ops:
        for path, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                parent = model.get_submodule(path.rpartition(".")[0])
                setattr(parent, path.rpartition(".")[2], aten_layer(module))
    batch, new, length = 2, 3, 7
    model.to(device)
    one = torch.zeros(batch, shape.heads, length, shape.size, device=device)
    args = (
        torch.ones(batch, new, dtype=torch.int64, device=device),
        torch.ones(batch, length, dtype=torch.int64, device=device),
        torch.arange(new, device=device)[None].repeat(batch, 1),
        torch.arange(new, device=device),
        [(one.clone(), one.clone()) for _ in range(shape.layers)],
    )
    any_size = torch.export.Dim.DYNAMIC
    entry = {0: any_size, 2: any_size}
    shapes = (
        {0: any_size, 1: any_size},
        {0: any_size, 1: any_size},
        {0: any_size, 1: any_size},
        {0: any_size},
        [(dict(entry), dict(entry)) for _ in range(shape.layers)],
    )
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(StaticDecoder(model), args, dynamic_shapes=shapes, strict=False)
            if not keep_ops:
                program = program.run_decompositions({})
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(
            f"torch.export cannot trace {type(model).__name__}: {type(error).__name__}: {str(error)[:200]}",
            hint="Report the architecture; --debug shows the traceback.",
        ) from error
    return program


def save(program: Any, file: Path) -> None:
    """Write the `.pt2`, without stack traces (which name this machine's paths): half of its bytes."""
    for node in program.graph.nodes:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn"):
            node.meta.pop(key, None)
    program.example_inputs = None  # shapes are in the graph; the values would be 60 KB for four layers
    with _sink(file) as sink:
        torch.export.save(program, sink)
    _deflate_graph(file)


class _Sink(io.RawIOBase):
    """A file that takes everything and remembers the first error.

    torch's archive writer ends the process (std::terminate) when a write fails, as on a full disk.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.written = file, 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        size = memoryview(data).nbytes
        self.written += size
        return size

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:  # asked for, and at the end used to go back to the start
        return True

    def seek(self, *_: Any) -> int:
        return 0

    def tell(self) -> int:
        return self.written


@contextmanager
def _sink(file: Path) -> Iterator[Any]:
    """Something to write `file` through; OSError at the end if that failed."""
    with file.open("wb") as raw:
        sink = _Sink(raw)
        yield sink
    if sink.error is not None:
        raise sink.error


def _deflate_graph(file: Path) -> None:
    """Compress the JSON in the archive (ten times smaller); weights stay stored, aligned to 64 bytes."""
    packed = file.with_suffix(".packed")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(packed, "w") as new:
        for item in old.infolist():
            target = zipfile.ZipInfo(item.filename, (1980, 1, 1, 0, 0, 0))
            target.file_size = item.file_size  # beyond 2 GB zipfile must know beforehand
            if item.filename.endswith(".json"):
                target.compress_type = zipfile.ZIP_DEFLATED
            elif new.fp is not None:
                at = new.fp.tell() + 30 + len(item.filename.encode())
                target.extra = b"FB" + struct.pack("<H", -(at + 4) % 64) + b"\0" * (-(at + 4) % 64)
            with old.open(item) as source, new.open(target, "w") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    os.replace(packed, file)


def load_program(file: Path) -> Any:
    """The saved `ExportedProgram`; its `module()` runs."""
    return torch.export.load(file)


def check_compiler() -> None:
    """UsageError where AOTInductor would find no C++ compiler."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++")):
        raise UsageError("--to aoti needs a C++ compiler", hint="Install g++, or export --to torch.")


def compile_package(program: Any, file: Path) -> Callable[..., Any]:
    """AOTInductor's package for the device that `program` was traced on; returns it loaded."""
    check_compiler()
    try:
        with quiet(), torch.no_grad(), _sink(file) as sink:
            torch._inductor.aoti_compile_and_package(program, package_path=sink)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        inner = getattr(error, "inner_exception", error)  # of torch's InductorError
        if isinstance(inner, OSError) and inner.errno in FULL:
            raise DestinationError(
                f"The disk is full while compiling: AOTInductor writes to {tempfile.gettempdir()} too",
                hint="Free space there, or name another place with TMPDIR.",
            ) from error
        lines = [line for line in str(inner).splitlines() if line.strip()] or [""]
        raise UsageError(
            f"AOTInductor cannot compile the program: {type(inner).__name__}: {lines[0][:200]}",
            hint="Check the compiler, or export --to torch; --debug shows the traceback.",
        ) from error
    return torch._inductor.aoti_load_package(str(file))


def count_nodes(program: Any) -> Counter[str]:
    """Operators of the graph by name."""
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")


class StaticRunner:
    """A `proof.Runner` over a program with a static cache, which lives in the object."""

    def __init__(
        self, program: Callable[..., Any], shape: CacheShape, length: int = 32, device: str = "cpu"
    ) -> None:
        self.program, self.shape, self.length, self.device = program, shape, length, device
        self.cache: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, list[Tensor]]:
        total = mask.shape[1]
        if total == ids.shape[1]:
            size = (ids.shape[0], self.shape.heads, self.length, self.shape.size)
            one = torch.zeros(size, device=self.device)
            self.cache = [(one.clone(), one.clone()) for _ in range(self.shape.layers)]
        full = torch.nn.functional.pad(mask, (0, self.length - total))
        places = torch.arange(total - ids.shape[1], total)
        # Contiguous: a compiled package reads inputs with the strides it was traced with and checks nothing.
        inputs = (t.to(self.device).contiguous() for t in (ids, full, positions, places))
        logits, *flat = self.program(*inputs, self.cache)
        self.cache = list(zip(flat[::2], flat[1::2]))
        return logits.cpu(), [t[:, :, :total].cpu() for t in flat]

    def tokens_per_second(self, steps: int = 10) -> float:
        """Median decode speed of one row."""
        one = torch.ones(1, 1, dtype=torch.int64)
        self(one, one, one * 0)
        times = []
        for i in range(1, steps + 1):
            start = time.perf_counter()
            self(one, torch.ones(1, i + 1, dtype=torch.int64), one * i)
            times.append(time.perf_counter() - start)
        return 1 / sorted(times)[len(times) // 2]
