"""onnxruntime sessions for packed weights: built on a layer's first call, dropped with its tensors.

A session holds one node of the contrib domain `com.microsoft` (onnxruntime's ContribOperators.md):

    MatMulNBits   Y[M, N] = A[M, K] @ ((B - zero) * scale).T     B uint8 [N, K/block, block*bits/8]

Weights reach it as external initializers over torch's memory, without a copy. `MatMulNBits` prepacks B into
the order its instruction set wants: the one further copy of the codes, after which a B that had to be
converted (widened codes) is freed. Inputs and outputs are bound by address.

Threads: a layer is cut into pieces of its output rows, one single-threaded onnxruntime session each (a small layer is
one piece, to which threads bring rows of x), and the pieces run on a few workers that all layers share
(`cpu_workers`), so 300 layers do not start 600 threads.
(onnxruntime's own global pool would be simpler, but once it exists every other session of the process that
does not ask for it fails to build: not a library's decision to make.)

A session belongs to the *storage* of a layer's codes, not to the module: modules stay plain (deepcopy,
pickle, `.to(device)`, safetensors), and the session goes when the storage goes. A write through torch
(`copy_`, `load_state_dict`) is seen by the tensors' version counters and rebuilds the session; a write
that hides from them (`tensor.data`, numpy) is not: call `forget()` after one. The look-up of a call is one
dictionary access by the tensors' addresses and versions; an entry goes with the first of its storages that is
freed, so an address that is used again finds nothing.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels import cpu_workers

#: ONNX versions that every onnxruntime >= 1.22 reads.
IR_VERSION, OPSET = 10, 21


@cache
def available() -> bool:
    """Are onnxruntime and onnx installed (extra `quantkit[cpu]`)?"""
    return find_spec("onnxruntime") is not None and find_spec("onnx") is not None


@dataclass(frozen=True)
class Node:
    """One operator with its weights: `y = op(x, *initializers)`, float32 in and out."""

    op: str
    out_features: int
    in_features: int
    attributes: dict[str, int]
    initializers: dict[str, Tensor]  # in the operator's argument order; contiguous, on the CPU

    def session(self, owned: Sequence[Tensor] = ()) -> Session:
        """Build it; `owned` are the layer's tensors, whose memory outlives the session."""
        return Session(self, {t.untyped_storage()._cdata for t in owned})


class Session:
    """A `Node` ready to run. Calls may come from several threads at once."""

    def __init__(self, node: Node, owned: set[int]) -> None:
        weights = {name: t.detach() for name, t in node.initializers.items()}
        self.in_features, self.out_features = node.in_features, node.out_features
        starts, self._threads = _pieces(node)
        ends = [*starts[1:], node.out_features]
        self._counts = [end - start for start, end in zip(starts, ends)]
        self._parts = [_build(node, start, end) for start, end in zip(starts, ends)]
        self._bound: tuple[int, Tensor, Tensor, list[cpu_workers.Job]] | None = None
        converted = {n: t for n, t in weights.items() if t.untyped_storage()._cdata not in owned}
        if "b" in converted and prepacks(**node.attributes):
            del converted["b"]
        self.kept = converted  # what nobody else keeps alive and onnxruntime still reads

    def __call__(self, x: Tensor) -> Tensor:
        """`x [M, K]`, 16 or 32-bit floats -> new float32 `[M, N]`.

        A few rows go through buffers that all sessions share, to which each session's bindings stay bound:
        binding anew costs more than copying the rows. Who finds the buffers taken binds anew.
        """
        rows = x.shape[0]
        if rows <= SHARED_ROWS and _buffers_taken.acquire(blocking=False):
            try:
                bound = self._bound
                if bound is None or bound[0] != rows:
                    source = _buffer("x", rows * self.in_features).view(rows, -1)
                    target = _buffer("y", rows * self.out_features).view(rows, -1)
                    bound = self._bound = (rows, source, target, self._jobs(source, target))
                if x.dtype == torch.float32 and x.is_contiguous():
                    # Not copy_ and clone: with Python's and torch's code out of the cache after each
                    # product, a call into torch costs many times what it does in a loop.
                    ctypes.memmove(bound[1].data_ptr(), x.data_ptr(), 4 * rows * self.in_features)
                else:
                    bound[1].copy_(x)
                fresh: list[Tensor] = []
                cpu_workers.run_all(bound[3], self._threads, (_append_empty, (fresh, bound[2])))
                return self._assembled(bound[2], fresh[0])
            finally:
                _buffers_taken.release()
        x = x.float().contiguous()
        out = torch.empty((rows, self.out_features), dtype=torch.float32)
        if len(self._parts) > 1:
            cpu_workers.run_all(self._jobs(x, out), self._threads)
            return self._assembled(out, torch.empty_like(out))
        worth = rows * self.out_features * self.in_features // SHARED_WORK
        threads = max(1, min(torch.get_num_threads(), rows, worth))
        shares = list(zip(x.tensor_split(threads), out.tensor_split(threads)))
        cpu_workers.run_all([job for share in shares for job in self._jobs(*share)], threads)
        return out

    def _jobs(self, x: Tensor, out: Tensor) -> list[cpu_workers.Job]:
        """One run per part, from `x [M, K]` to its own stretch of `out`'s memory."""
        rows, start, jobs = x.shape[0], out.data_ptr(), []
        for part, count in zip(self._parts, self._counts):
            binding = part.io_binding()
            binding.bind_input("x", "cpu", 0, _float32(), tuple(x.shape), x.data_ptr())
            binding.bind_output("y", "cpu", 0, _float32(), (rows, count), start)
            start += 4 * rows * count
            jobs.append((part.run_with_iobinding, binding))
        return jobs

    def _assembled(self, parts: Tensor, out: Tensor) -> Tensor:
        """`out [M, N]`, filled with the pieces' results, which lie one after the other in `parts`' memory."""
        rows = out.shape[0]
        if rows == 1 or len(self._counts) == 1:
            ctypes.memmove(out.data_ptr(), parts.data_ptr(), 4 * rows * self.out_features)
            return out
        # By numpy: torch would start OpenMP's threads, which spin on after their work and take the processor
        # from the next layer's pieces.
        source, target, start = parts.numpy().reshape(-1), out.numpy(), 0
        for count in self._counts:
            piece = source[rows * start : rows * (start + count)].reshape(rows, count)
            target[:, start : start + count] = piece
            start += count
        return out


def _append_empty(argument: tuple[list[Tensor], Tensor]) -> None:
    """Append to the list an empty tensor like the other one."""
    argument[0].append(torch.empty_like(argument[1]))


#: A weight of fewer values is one piece: to hand one over takes longer than half the product of a row. Threads share
#: rows of x instead, where each has products of so many values.
ONE_PIECE, SHARED_WORK = 1 << 21, 1 << 24
#: Most rows that go through the shared buffers (4 * rows bytes for each width in a model, once).
SHARED_ROWS = 8
_buffers: dict[tuple[str, int], Tensor] = {}
_buffers_taken = threading.Lock()


def _buffer(name: str, count: int) -> Tensor:
    """The shared buffer of `count` floats; it stays where it is for as long as the process lives."""
    if (name, count) not in _buffers:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
            _buffers[name, count] = torch.empty(count, dtype=torch.float32)
    return _buffers[name, count]


def _pieces(node: Node) -> tuple[list[int], int]:
    """First output row of each piece, and how many threads share them (at least 2**18 weights each).

    One large piece per thread, the caller's (the first) a little larger, and small ones for whoever is free first:
    on two threads one, since each costs 17 us (its session's code and data are out of the cache) and a second evens
    out less than that. Measured on two threads: docs/benchmarks/kernels-cpu.md.
    """
    n, k = node.out_features, node.in_features
    threads = max(1, min(torch.get_num_threads(), n // 64, n * k >> 18))
    if threads == 1 or n * k < ONE_PIECE:
        return [0], 1
    small = [0.05] if threads == 2 else [0.288 / threads, 0.192 / threads]
    shares = [(1 - sum(small)) / threads] * threads + small
    shares[0] *= 1.1
    starts, end = [0], 0.0
    for share in shares:
        end += share * n / sum(shares)
        starts.append(min(round(end / 64) * 64, n))
    return sorted({start for start in starts[:-1] if start < n}), threads


def _build(node: Node, start: int, end: int) -> Any:
    """onnxruntime's session for rows `start` to `end` of the node."""
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    # An arena would keep each session's largest scratch for ever.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3  # errors only: its warnings are about graphs, and this is one node
    weights = {name: t.detach() for name, t in node.initializers.items()}
    if (start, end) != (0, node.out_features):
        weights = {name: t[start:end] for name, t in weights.items()}
    values = {name: _borrow(t) for name, t in weights.items()}
    # The first call gives the graph its values; the second makes the session read them in place.
    options.add_external_initializers(list(values), list(values.values()))
    for name, value in values.items():
        options.add_initializer(name, value)
    part = Node(node.op, end - start, node.in_features, node.attributes, weights)
    return runtime.InferenceSession(_model_bytes(part), options, providers=["CPUExecutionProvider"])


@cache
def _runtime() -> Any:
    import onnxruntime

    return onnxruntime


@cache
def _float32() -> Any:
    import numpy

    return numpy.float32


def _borrow(tensor: Tensor) -> Any:
    """An OrtValue over a tensor's memory that does not keep the tensor alive.

    A reference would keep the storage, and with it the session, for ever. The entry of `prepared` goes
    with the storage instead, and a call holds the tensors as its arguments.
    """
    import numpy

    kind, code = (
        (ctypes.c_uint8, numpy.uint8) if tensor.dtype == torch.uint8 else (ctypes.c_float, _float32())
    )
    pointer = ctypes.cast(tensor.data_ptr(), ctypes.POINTER(kind))
    array = numpy.ctypeslib.as_array(pointer, shape=tuple(tensor.shape))
    assert array.dtype == code and tensor.is_contiguous()
    return _runtime().OrtValue.ortvalue_from_numpy(array)


@cache
def prepacks(**attributes: int) -> bool:
    """Does MatMulNBits with these attributes stop reading B once its session is built?

    Seen by trying: B is overwritten after the first calls, for one row and for many. It depends on
    onnxruntime's version and the processor, and a wrong guess would read freed memory.
    """
    k, n = 2 * attributes["block_size"], 64
    b = torch.randint(0, 256, (n, 2, attributes["block_size"] * attributes["bits"] // 8), dtype=torch.uint8)
    node = Node("MatMulNBits", n, k, attributes, {"b": b, "scales": torch.ones(n, 2)})
    session = Session(node, {b.untyped_storage()._cdata})
    inputs = [torch.rand(rows, k) for rows in (1, 64)]
    before = [session(x) for x in inputs]
    b ^= 255
    return all(torch.equal(session(x), y) for x, y in zip(inputs, before))


def _model_bytes(node: Node) -> bytes:
    """The ONNX model of one node, without its weights."""
    from onnx import TensorProto, helper

    def weight(name: str, tensor: Tensor) -> Any:
        proto = TensorProto()
        proto.name = name
        proto.data_type = TensorProto.UINT8 if tensor.dtype == torch.uint8 else TensorProto.FLOAT
        proto.dims.extend(tensor.shape)
        proto.data_location = TensorProto.EXTERNAL
        entry = proto.external_data.add()
        entry.key, entry.value = "location", "memory"  # never opened: the value is given by name
        return proto

    graph = helper.make_graph(
        [
            helper.make_node(
                node.op,
                ["x", *node.initializers],
                ["y"],
                domain="com.microsoft",
                N=node.out_features,
                K=node.in_features,
                **node.attributes,
            )
        ],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", node.in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", node.out_features])],
        initializer=[weight(name, tensor) for name, tensor in node.initializers.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return bytes(model.SerializeToString())


# --- one prepared value per (kind, storage of the codes) -----------------------------------------------


@dataclass
class _Entry:
    versions: tuple[int, ...]
    value: Any


_Key = tuple[Any, ...]
_entries: dict[_Key, _Entry] = {}
#: Keys that read a storage, by its identity; a storage is here while a finalizer watches it.
_watched: dict[int, set[_Key]] = {}
_lock = threading.RLock()
# Not comprehensions, which are a function each: their code is out of the cache when a look-up comes.
_address, _version = Tensor.data_ptr, attrgetter("_version")


def find(kind: Any, tensors: tuple[Tensor, ...]) -> Any:
    """What `prepared` keeps for these arguments, or None."""
    entry = _entries.get((kind, *map(_address, tensors), tensors[0].shape))
    return entry.value if entry is not None and entry.versions == _versions(tensors) else None


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """How often each was written to; inference tensors do not say."""
    try:
        return tuple(map(_version, tensors))
    except RuntimeError:
        return tuple([-1 if t.is_inference() else t._version for t in tensors])


def prepared(kind: Any, tensors: tuple[Tensor, ...], build: Callable[[], Any]) -> Any:
    """`build()`, kept while the storages of `tensors` live and none of them has changed.

    `kind` says, with the tensors, what `build` would make: anything hashable.
    """
    with _lock:
        value = find(kind, tensors)
        if value is None:
            key = (kind, *map(_address, tensors), tensors[0].shape)
            versions = _versions(tensors)
            value = build()
            _entries[key] = _Entry(versions, value)
            for storage in (t.untyped_storage() for t in tensors):
                if storage._cdata not in _watched:
                    _watched[storage._cdata] = set()
                    weakref.finalize(storage, _evict, storage._cdata)
                _watched[storage._cdata].add(key)
        return value


def forget() -> None:
    """Drop every session; layers build theirs anew at their next call."""
    with _lock:
        _entries.clear()


def count() -> int:
    """How many layers hold something prepared now."""
    return len(_entries)


def _evict(storage: int) -> None:
    with _lock:
        for key in _watched.pop(storage, ()):
            _entries.pop(key, None)


def _after_fork() -> None:
    """Sessions have no threads of their own and live on; locks that the parent's threads held do not."""
    global _buffers_taken, _lock
    _buffers_taken, _lock = threading.Lock(), threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
