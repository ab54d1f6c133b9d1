"""What quantkit's CPU op costs beside onnxruntime's own call of the same MatMulNBits node, and beside dense.

    OMP_NUM_THREADS=2 python scripts/bench_cpu.py --shape 4096x4096 --bits 4 --rows 1,8,64

The same packed tensors, attributes, number of threads and input tensor for all:

    quantkit   ops.affine_linear on torch tensors, as a layer calls it
    run        InferenceSession.run(None, {"x": x.numpy()}), then torch.from_numpy: onnxruntime's own call
    bound      run_with_iobinding with input and output bound once: the product alone, no tensor in or out
    default    as run, with onnxruntime's default session options (its threads spin between calls)
    dense      torch.nn.functional.linear, float32

`run` and `bound` have the session options that were fastest here (force_spinning_stop). Weights are cold: copies of
256 MiB together take turns, each candidate's own. Candidates alternate in blocks of calls; the first calls of a block
do not count, because threads of the candidate before may still spin. `default` and `dense`, whose threads spin longest,
come in rounds of their own. Medians over all counted calls, in microseconds; rounds in which another process took the
processor from one of the candidates (Linux tells) are dropped for all of them, and counted in the last column.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import torch
from torch import Tensor

from quantkit.encoding import Affine, PackedWeight, dequantize
from quantkit.kernels import cpu, cpu_sessions, cpu_weights, reference
from quantkit.kernels.bench_cases import random_weight, run_op

Call = Callable[[], Any]
COLD_BYTES = 256 << 20
SKIPPED, COUNTED = 3, 9
#: Share of a block's time that its threads may have waited for a processor.
DISTURBED = 0.05


def own_session(packed: PackedWeight, level: int, spin: bool) -> Any:
    """One onnxruntime session of the weight's node, at its own width (no widening), weights read in place."""
    enc, (n, k) = packed.encoding, packed.shape
    assert isinstance(enc, Affine) and packed.zero is not None
    block = cpu.ort_block(enc.group_size, k)
    assert block is not None
    scales = cpu_weights.per_block(packed.scale.float(), enc.group_size, block, -(-k // block))
    zeros = cpu_weights.per_block(packed.zero, enc.group_size, block, -(-k // block))
    weights = {
        "b": packed.codes.view(n, -1, block * enc.bits // 8),
        "scales": scales,
        "zeros": cpu_weights.pack(zeros, enc.bits),
    }
    attributes = {"block_size": block, "accuracy_level": level, "bits": enc.bits}
    return _session(cpu_sessions.Node("MatMulNBits", n, k, attributes, weights), spin)


def _session(node: cpu_sessions.Node, spin: bool) -> Any:
    """The session, and what it reads."""
    weights = node.initializers
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if not spin:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    values = {name: cpu_sessions._borrow(t) for name, t in weights.items()}
    options.add_external_initializers(list(values), list(values.values()))
    for name, value in values.items():
        options.add_initializer(name, value)
    model = cpu_sessions._model_bytes(node)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session, (weights, values)


def own_codebook_session(packed: PackedWeight) -> Any:
    """MatMulBnb4 on bitsandbytes' bytes, read in place."""
    weights = {"b": packed.codes, "absmax": packed.scale}
    node = cpu_sessions.Node("MatMulBnb4", *packed.shape, {"block_size": 64, "quant_type": 1}, weights)
    return _session(node, False)


def run_call(packed: PackedWeight, level: int, x: Tensor, spin: bool) -> Call:
    session, kept = own_session(packed, level, spin) if level >= 0 else own_codebook_session(packed)

    def call(session: Any = session, kept: Any = kept) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return call


def bound_call(packed: PackedWeight, level: int, x: Tensor) -> Call:
    session, kept = own_session(packed, level, False)
    out, binding = torch.empty(x.shape[0], packed.shape[0]), session.io_binding()
    binding.bind_input("x", "cpu", 0, numpy.float32, tuple(x.shape), x.data_ptr())
    binding.bind_output("y", "cpu", 0, numpy.float32, tuple(out.shape), out.data_ptr())

    def call(kept: Any = (kept, out)) -> Tensor:
        session.run_with_iobinding(binding)
        return out

    return call


def in_turn(calls: list[Call]) -> Call:
    position = 0

    def call() -> Any:
        nonlocal position
        position += 1
        return calls[position % len(calls)]()

    return call


def waited() -> int:
    """Nanoseconds that this process' threads were ready and had no processor; 0 where nothing tells."""
    total = 0
    for path in glob.glob("/proc/self/task/*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            total += int(Path(path).read_text().split()[1])
    return total


def medians(candidates: dict[str, Call], seconds: float, drop: bool = True) -> tuple[dict[str, float], str]:
    """Microseconds, from alternating blocks, at least three each; and how many rounds were dropped of how many.

    `drop=False` drops none: for candidates whose own threads spin in each other's way.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end, rounds, dropped = time.perf_counter() + seconds, 0, 0
    while rounds - dropped < 3 or time.perf_counter() < end:
        found: dict[str, list[float]] = {}
        disturbed = False
        for name, call in candidates.items():
            for _ in range(SKIPPED):
                call()
            before, found[name] = waited(), []
            for _ in range(COUNTED):
                start = time.perf_counter()
                call()
                found[name].append(time.perf_counter() - start)
            disturbed |= waited() - before > DISTURBED * sum(found[name]) * 1e9
        rounds += 1
        if drop and disturbed:
            dropped += 1
            if dropped < 1000:
                continue
            raise SystemExit("the machine is too busy: 1000 rounds were disturbed")
        for name, values in found.items():
            times[name] += values
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}, f"{dropped}/{rounds}"


@torch.no_grad()
def measure(bits: int, n: int, k: int, rows: list[int], mode: str, seconds: float) -> None:
    level = cpu_weights.INT8 if mode == "int8" else cpu_weights.FLOAT32
    first = random_weight(f"affine-{bits}g128", n, k, torch.device("cpu"))
    copies = [first]
    for _ in range(-(-COLD_BYTES // (n * k * bits // 8)) - 1):
        copies.append(replace(first, **{name: t.clone() for name, t in first.tensors().items()}))
    dense = [dequantize(first)]
    dense += [dense[0].clone() for _ in range(max(1, -(-COLD_BYTES // (4 * n * k)) - 1))]
    ours = [run_op(replace(w, activation="int8_block" if mode == "int8" else None)) for w in copies]
    for m in rows:
        x = torch.randn(m, k)
        quiet = {
            "quantkit": in_turn([lambda f=f, x=x: f(x) for f in ours]),
            "run": in_turn([run_call(w, level, x, False) for w in copies]),
            "bound": in_turn([bound_call(w, level, x) for w in copies]),
        }
        want = ours[0](x)
        for name in ("run", "bound"):
            apart = float((run_call(first, level, x, False)() - want).norm() / want.norm())
            assert apart < (1e-2 if bits == 2 and mode == "int8" else 2e-3), (name, apart)
        for call in quiet.values():
            for _ in copies:
                call()
        spinning = {
            "default": in_turn([run_call(w, level, x, True) for w in copies]),
            "dense": in_turn([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense]),
        }
        spinning["default"]()
        found, dropped = medians(quiet, seconds)
        found |= medians(spinning, seconds / 3, drop=False)[0]
        us = found["quantkit"]
        cells = [f"{bits}", f"{n}x{k}", f"{m}", mode, f"{us:.0f}"]
        cells += [f"{found[name]:.0f}" for name in ("run", "bound", "default", "dense")]
        cells += [f"{us / found[name]:.2f}" for name in ("run", "bound", "default")]
        print("| " + " | ".join([*cells, f"{found['dense'] / us:.1f}", dropped]) + " |", flush=True)
        del quiet, spinning


@torch.no_grad()
def measure_codebook(n: int, k: int, rows: list[int], seconds: float) -> None:
    """NF4: quantkit, onnxruntime's MatMulBnb4 (`run`) and dense."""
    copies = [random_weight("nf4", n, k, torch.device("cpu")) for _ in range(-(-COLD_BYTES // (n * k // 2)))]
    dense = [dequantize(w) for w in copies[:2]]
    for m in rows:
        x = torch.randn(m, k)
        candidates = {
            "quantkit": in_turn([lambda f=f, x=x: f(x) for f in map(run_op, copies)]),
            "run": in_turn([run_call(w, -1, x, False) for w in copies]),
            "dense": in_turn([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense]),
        }
        found, _ = medians(candidates, seconds, drop=False)
        cells = [f"{n}x{k}", f"{m}", *(f"{found[name]:.0f}" for name in candidates)]
        cells += [f"{found['quantkit'] / found[name]:.2f}" for name in ("run", "dense")]
        print("| " + " | ".join(cells) + " |", flush=True)


@torch.no_grad()
def measure_float8(n: int, k: int, rows: list[int], seconds: float) -> None:
    """float8, 128 x 128 blocks: quantkit, the reference and dense."""
    copies = [random_weight("fp8-block", n, k, torch.device("cpu")) for _ in range(-(-COLD_BYTES // (n * k)))]
    dense = [dequantize(w) for w in copies[:2]]
    for m in rows:
        x = torch.randn(m, k)
        candidates = {
            "quantkit": in_turn([lambda f=f, x=x: f(x) for f in map(run_op, copies)]),
            "reference": in_turn([lambda w=w, x=x: reference.quant_linear(x, w) for w in copies]),
            "dense": in_turn([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense]),
        }
        found, _ = medians(candidates, seconds, drop=False)
        cells = [f"{n}x{k}", f"{m}", *(f"{found[name]:.0f}" for name in candidates)]
        cells += [f"{found['quantkit'] / found[name]:.2f}" for name in ("reference", "dense")]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--rows", default="1,8,64")
    parser.add_argument("--mode", default="int8,exact")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--nf4", action="store_true", help="NF4 beside MatMulBnb4 instead")
    parser.add_argument("--float8", action="store_true", help="float8 beside the reference instead")
    given = parser.parse_args()
    print(
        f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {torch.get_num_threads()} threads"
    )
    shapes = [tuple(map(int, shape.split("x"))) for shape in given.shape or ["4096x4096"]]
    rows = [int(m) for m in given.rows.split(",")]
    if given.nf4 or given.float8:
        peer, measure_format = (
            ("MatMulBnb4", measure_codebook) if given.nf4 else ("reference", measure_float8)
        )
        print(f"| N x K | M | quantkit | {peer} | dense | / {peer} | / dense |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
        for n, k in shapes:
            measure_format(n, k, rows, given.seconds)
        return
    header = ["bits", "N x K", "M", "mode", "quantkit", "run", "bound", "default", "dense"]
    print("| " + " | ".join([*header, "/ run", "/ bound", "/ default", "dense /", "dropped"]) + " |")
    print("|" + " --- |" * 4 + " ---: |" * 10)
    for n, k in shapes:
        for bits in map(int, given.bits.split(",")):
            for mode in given.mode.split(","):
                measure(bits, n, k, rows, mode, given.seconds)


if __name__ == "__main__":
    main()
