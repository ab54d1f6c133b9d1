"""`quantkit tune`: time tiles around the shipped ones on this device, keep what is faster.

Coordinate descent: from the shipped tile, every change of one field by one step is timed and the fastest
taken, until no change gains 2 % or the time is up. A tile that does not compile, does not fit the chip or
computes something else than the shipped one is passed over. Products are timed as `bench` times them: weights
cold, calls captured into a graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.encoding import Affine, Codebook, Float8, PackedWeight
from quantkit.errors import QuantkitError
from quantkit.kernels import bench, tuned
from quantkit.kernels.bench_cases import random_weight

#: A change must gain this much: less is within the noise between two runs.
GAIN = 0.02
Clock = Callable[[list[Callable[[Tensor], Tensor]], Tensor], Callable[[], float]]


@dataclass(frozen=True)
class Tuned:
    """One product: shipped and best tile with their times in microseconds; how many tiles were timed."""

    format: str
    entry: tuned.Entry
    tried: int


def tune(
    formats: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 60.0,
    clock: Clock = bench.timer,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Tuned]:
    """Tune every format, `(n, k)` and bucket of rows within `seconds` in all (the rest is left as shipped)."""
    buckets = sorted({tuned._BUCKET[m] for m in rows if m <= tuned.BUCKETS[-1]})
    work = [(form, shape, m) for form in formats for shape in shapes for m in buckets]
    found, start = [], time.perf_counter()
    weights: dict[tuple[str, tuple[int, int]], list[PackedWeight]] = {}
    for i, (form, shape, m) in enumerate(work):
        left = seconds - (time.perf_counter() - start)
        if left <= 0:
            progress(f"time is up: {len(work) - i} of {len(work)} products stay as shipped")
            break
        progress(f"{form} {shape[0]}x{shape[1]} M={m}")
        if (form, shape) not in weights:
            weights = {(form, shape): _copies(form, shape, device)}
        if _has_own_kernel(weights[form, shape][0], m, dtype):
            progress(f"{form} {shape[0]}x{shape[1]} M={m} has a kernel of its own, whose tile is not tuned")
            continue
        deadline = time.perf_counter() + left / (len(work) - i)
        found.append(_one(form, weights[form, shape], m, dtype, clock, deadline))
    return found


def _has_own_kernel(packed: PackedWeight, m: int, dtype: torch.dtype) -> bool:
    """Does the kernel without shared memory serve m rows of x by this weight?"""
    from quantkit.kernels import few_rows_launch, launch_weight

    x = torch.empty(m, packed.shape[1], dtype=dtype, device=packed.codes.device)
    return few_rows_launch.tile_for(x, launch_weight.of(packed)) is not None


def _one(
    form: str, weights: list[PackedWeight], m: int, dtype: torch.dtype, clock: Clock, deadline: float
) -> Tuned:
    (n, k), device = weights[0].shape, weights[0].codes.device
    x = torch.randn(m, k, device=device, dtype=dtype)
    with tuned.ignored():
        family, bits, shipped, products = _family(weights, m)
    want = products(shipped)[0](x).double()
    times: dict[Any, float] = {}
    problems: dict[Any, str] = {}

    def measure(config: Any) -> float:
        if config not in times:
            try:
                calls = products(config)
                got = calls[0](x).double()
                right = got.shape == want.shape and float((got - want).norm()) <= 0.02 * float(want.norm())
                one = clock(calls, x) if right else (lambda: float("inf"))
                times[config] = sorted(one() for _ in range(5))[2]
            except Exception as error:  # too large for the chip, or not a tile of this kernel
                times[config], problems[config] = float("inf"), " ".join(str(error).split())[:200]
        return times[config]

    best, base = shipped, measure(shipped)
    if base == float("inf"):
        raise QuantkitError(
            f"the shipped tile of {form} {n}x{k} does not run here: {problems.get(shipped, 'wrong result')}",
            hint="Please report it.",
        )
    while time.perf_counter() < deadline:
        near = [c for c in neighbours(best) if c not in times]
        for config in near:
            if time.perf_counter() >= deadline:
                break
            measure(config)
        fastest = min(times, key=lambda c: times[c])
        if times[fastest] >= (1 - GAIN) * times[best]:
            break
        best = fastest
    entry = tuned.Entry.model_validate(
        {
            "family": family,
            "bits": bits,
            "m": m,
            "n": n,
            "k": k,
            "dtype": str(dtype).removeprefix("torch."),
            "tile": asdict(best),
            "shipped_us": base * 1e6,
            "tuned_us": times[best] * 1e6,
        }
    )
    return Tuned(form, entry, len(times))


def neighbours(config: Any) -> Iterator[Any]:
    """Tiles one step away; the number of slices stays on its side of 1, which names the kernel."""
    steps = {
        "rows": (16, 256), "columns": (8, 128), "inputs": (32, 256), "split": (1, 16), "warps": (1, 8),
    }  # fmt: skip
    if config.slices > 1:
        steps["slices"] = (2, 16)
    for name, (least, most) in steps.items():
        for value in (getattr(config, name) // 2, getattr(config, name) * 2):
            if least <= value <= most:
                yield replace(config, **{name: value})
    for stages in (config.stages - 1, config.stages + 1):
        if 1 <= stages <= 8:
            yield replace(config, stages=stages)


def _copies(form: str, shape: tuple[int, int], device: torch.device) -> list[PackedWeight]:
    """Weights that together overflow the cache."""
    first = random_weight(form, *shape, device)
    count = max(2, min(64, -(-bench.CACHES * bench.cache_bytes(device) // first.nbytes())))
    if device.type == "cpu":
        count = 2
    return [first] + [random_weight(form, *shape, device) for _ in range(count - 1)]


Products = Callable[[Any], list[Callable[[Tensor], Tensor]]]


def _family(weights: list[PackedWeight], m: int) -> tuple[Any, Any, Any, Products]:
    """Name and bits of the weight's kernels, the shipped tile, and products with any other."""
    from quantkit.kernels import codebook, codebook_tuning, float8_launch, float8_tuning, tuning
    from quantkit.kernels.affine_launch import AffineWeight, launch_gemm
    from quantkit.kernels.launch import large_shared_memory

    enc, (n, k) = weights[0].encoding, weights[0].shape
    if isinstance(enc, Affine):
        bits, group = enc.bits, enc.group_size

        def affine(config: Any) -> list[Callable[[Tensor], Tensor]]:
            packed = [AffineWeight(w.codes, w.scale, w.zero, None, bits, group) for w in weights]  # type: ignore[arg-type]
            return [lambda x, w=w: launch_gemm(x, w, None, config) for w in packed]  # type: ignore[misc]

        return "affine", bits, tuning.gemm_config(m, n, k, bits), affine
    if isinstance(enc, Codebook):
        block = enc.block_size

        def book(config: Any) -> list[Callable[[Tensor], Tensor]]:
            return [
                lambda x, w=w: codebook.launch_gemm(x, w.codes, w.scale, w.lut, None, n, block, config)  # type: ignore[misc]
                for w in weights
            ]

        return "codebook", 4, codebook_tuning.config(m, n, large_shared_memory(), k), book
    assert isinstance(enc, Float8)
    tile = enc.block

    def eight(config: Any) -> list[Callable[[Tensor], Tensor]]:
        return [
            lambda x, w=w: float8_launch.launch_gemm(x, w.codes, w.scale, None, *tile, config)  # type: ignore[misc]
            for w in weights
        ]

    return "float8", 8, float8_tuning.config(m, n, large_shared_memory(), k), eight
