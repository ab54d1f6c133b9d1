"""Timing products with quantized weights: cold weights, captured graphs, errors against float64.

* Every candidate multiplies with several copies of the weight in turn, together larger than the last
  cache, so that weights come from memory as they do in a model.
* On a GPU the calls over all copies are captured into one graph and its replays timed with events:
  launch gaps of Python do not count. On a CPU calls are timed one by one. Candidates take turns, so that
  a slow moment of the machine falls on all of them; the median counts.
* Bytes are those that the product must move once: the packed weight, x and y; GB = 1e9 bytes. The copy
  bandwidth that they are compared with is measured in the same run (bytes read plus bytes written).
* The error is relative, in the Frobenius norm, to the product of float64 x with the float64 weight.
* `backward=True` times dx = dy @ W instead, and measures what it allocates beside dx at its peak.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantkit.encoding import PackedWeight, dequantize
from quantkit.kernels import bench_backward
from quantkit.kernels.bench_cases import CANDIDATES, Candidate, Product, missing, random_weight

#: Rotated weights together exceed this many times the last-level cache.
CACHES = 3
#: Where the last-level cache cannot be asked for: more than most CPUs have for one socket's share.
CPU_CACHE_BYTES = 64 << 20
#: Fewest calls in one graph: starting a graph takes microseconds, which they share.
GRAPH_CALLS = 24
#: Rows of the output that are compared with float64.
CHECKED_ROWS = 16


@dataclass(frozen=True)
class Row:
    """One candidate at one size. Times are medians in microseconds; `bytes` as the module says.

    `extra_bytes` is the peak of what a call allocates beside its result; NaN where it was not measured
    (forward, and on devices that do not count allocations).
    """

    format: str
    n: int
    k: int
    m: int
    dtype: str
    candidate: str
    microseconds: float
    best_microseconds: float
    bytes: int
    error: float
    note: str = ""
    extra_bytes: float = float("nan")

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.microseconds / 1e3

    @property
    def teraflops(self) -> float:
        return 2.0 * self.m * self.n * self.k / self.microseconds / 1e6

    @property
    def cell(self) -> tuple[str, int, int, int, str]:
        return self.format, self.n, self.k, self.m, self.dtype


@dataclass
class Report:
    """All rows and what they were measured on."""

    device: str
    versions: dict[str, str]
    threads: int
    copy_gigabytes_per_second: float
    rows: list[Row] = field(default_factory=list)
    backward: bool = False
    #: Peers that were asked for and are not installed: name, and what to install.
    absent: dict[str, str] = field(default_factory=dict)

    def baseline(self, row: Row, candidate: str) -> Row | None:
        """The row of `candidate` in the same cell."""
        return next((r for r in self.rows if r.cell == row.cell and r.candidate == candidate), None)

    def copy_share(self, row: Row) -> float:
        return row.gigabytes_per_second / self.copy_gigabytes_per_second

    def records(self) -> list[dict[str, Any]]:
        """Flat rows for CSV and JSON, derived numbers included; `speedup` = other's time / quantkit's."""
        out = []
        for row in self.rows:
            ours = self.baseline(row, "quantkit")
            out.append(
                {
                    **asdict(row),
                    "gigabytes_per_second": row.gigabytes_per_second,
                    "share_of_copy_bandwidth": self.copy_share(row),
                    "teraflops": row.teraflops,
                    "speedup": row.microseconds / ours.microseconds if ours else None,
                }
            )
        return out


def bench(
    formats: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    *,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    candidates: Sequence[str],
    backward: bool = False,
    seconds: float = 0.1,
    budget: float = float("inf"),
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Time every candidate on every format, `(n, k)` shape, number of rows M and dtype of x.

    With `backward` the candidates are those of `bench_backward`. `seconds` is the time spent on one candidate
    in one cell. A candidate that raises is left out of that cell, with a row that says why (its time is
    infinite). Once `budget` seconds are over no further weight is begun, and `progress` says how many were
    left out.
    """
    report = Report(
        device=device_name(device),
        versions=versions(candidates),
        threads=torch.get_num_threads(),
        copy_gigabytes_per_second=copy_bandwidth(device),
        backward=backward,
        absent=missing(candidates),
    )
    table = bench_backward.CANDIDATES if backward else CANDIDATES
    chosen = {name: table[name] for name in candidates}
    end = time.perf_counter() + budget
    work = list(itertools.product(formats, shapes, dtypes))
    for i, (form, (n, k), dtype) in enumerate(work):
        if time.perf_counter() > end:
            progress(f"the budget is spent: {len(work) - i} of {len(work)} weights were not measured")
            break
        progress(f"{form} {n}x{k} {str(dtype).removeprefix('torch.')}")
        packed = random_weight(form, n, k, device)
        report.rows += _cells(form, packed, rows, dtype, chosen, seconds, backward)
    return report


def _cells(
    form: str,
    packed: PackedWeight,
    rows: Sequence[int],
    dtype: torch.dtype,
    candidates: dict[str, Candidate],
    seconds: float,
    backward: bool,
) -> Iterator[Row]:
    """All candidates on one weight; M varies inside, so that weights are prepared once."""
    (n, k), device = packed.shape, packed.codes.device
    exact = dequantize(packed, torch.float64)
    if not backward:
        exact = exact.T
    ready: dict[str, list[Product]] = {}
    problems: dict[str, str] = {}
    for name, candidate in candidates.items():
        try:
            dense = n * k * dtype.itemsize
            ready[name] = _copies(candidate, packed, dtype, dense if name == "dense" else packed.nbytes())
        except Exception as error:  # a peer's failure is a result, not the end of the run
            problems[name] = _one_line(error)
    for m in rows:
        x = torch.randn(m, n if backward else k, device=device, dtype=dtype)
        want = x[:CHECKED_ROWS].double() @ exact
        timers: dict[str, Callable[[], float]] = {}
        errors: dict[str, float] = {}
        extra: dict[str, float] = {}
        failed = dict(problems)
        for name, products in ready.items():
            if not products:
                continue
            try:
                got = products[0](x)[:CHECKED_ROWS].double()
                errors[name] = float((got - want).norm() / want.norm())
                if backward:
                    extra[name] = bench_backward.extra_bytes(products[0], x)
                timers[name] = timer(products, x)
            except Exception as error:
                failed[name] = _one_line(error)
        for name, times in _take_turns(timers, seconds).items():
            moved = (n * k * dtype.itemsize if name == "dense" else packed.nbytes()) + (
                m * (n + k) * dtype.itemsize
            )
            yield Row(form, n, k, m, _name(dtype), name, statistics.median(times) * 1e6, min(times) * 1e6,
                      moved, errors[name], extra_bytes=extra.get(name, float("nan")))  # fmt: skip
        for name, why in failed.items():
            yield Row(form, n, k, m, _name(dtype), name, float("inf"), float("inf"), 0, float("nan"), why)


def _copies(candidate: Candidate, packed: PackedWeight, dtype: torch.dtype, nbytes: int) -> list[Product]:
    """Products with enough copies of the weight to overflow the cache; empty if not covered."""
    first = candidate(packed, dtype)
    if first is None:
        return []
    # The first copy keeps the random weight itself; the others have the same codes elsewhere in memory.
    count = max(2, -(-CACHES * cache_bytes(packed.codes.device) // max(nbytes, 1)))
    products = [first]
    for _ in range(min(count, 64) - 1):
        copy = PackedWeight(
            packed.encoding,
            packed.shape,
            activation=packed.activation,
            **{n: t.clone() for n, t in packed.tensors().items()},
        )
        product = candidate(copy, dtype)
        assert product is not None
        products.append(product)
    return products


def timer(products: list[Product], x: Tensor) -> Callable[[], float]:
    """A function that runs the product over all copies and returns seconds per product."""
    if x.device.type == "cpu":
        for product in products:
            product(x)

        turn = iter(_forever(products))

        def one_call() -> float:
            product = next(turn)
            start = time.perf_counter()
            product(x)
            return time.perf_counter() - start

        return one_call
    backend: Any = torch.get_device_module(x.device)
    stream = backend.Stream()
    stream.wait_stream(backend.current_stream())
    with backend.stream(stream):  # compile and allocate outside the capture
        for product in products[:2]:
            product(x)
    backend.current_stream().wait_stream(stream)
    graph = backend.CUDAGraph() if hasattr(backend, "CUDAGraph") else backend.XPUGraph()
    products = products * -(-GRAPH_CALLS // len(products))
    with backend.graph(graph):
        for product in products:
            product(x)
    graph.replay()
    backend.synchronize()

    def one_replay() -> float:
        start, end = (backend.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        backend.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / len(products)

    return one_replay


def _forever(products: list[Product]) -> Iterator[Product]:
    while True:
        yield from products


def _take_turns(timers: dict[str, Callable[[], float]], seconds: float) -> dict[str, list[float]]:
    """Times of each timer, in alternation: at least 5 rounds, until `seconds` each were spent."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for timer in timers.values():
        timer()
    end = time.perf_counter() + seconds * len(timers)
    rounds = 0
    while timers and (rounds < 5 or (time.perf_counter() < end and rounds < 200)):
        for name, timer in timers.items():
            times[name].append(timer())
        rounds += 1
    return times


def copy_bandwidth(device: torch.device) -> float:
    """Median GB/s of a large device copy, read plus written; the yardstick for memory-bound products."""
    size = (4 << 30) if device.type != "cpu" else (256 << 20)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        if device.type == "cpu":
            start = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - start)
            continue
        # Not captured: a copy node of a graph was seen to run at two thirds of the speed (H200).
        backend: Any = torch.get_device_module(device)
        begin, end = (backend.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        backend.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return 2 * size / statistics.median(times) / 1e9


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache (a guess on the CPU)."""
    if device.type == "cpu":
        return CPU_CACHE_BYTES
    properties: Any = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "L2_cache_size", 64 << 20))


def device_name(device: torch.device) -> str:
    """What the vendor calls the device; for CPUs, the model name of /proc/cpuinfo."""
    if device.type != "cpu":
        return str(torch.get_device_module(device).get_device_name(device))
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith("model name")]
        return f"{lines[0].split(':', 1)[1].strip()} ({len(lines)} cores)" if lines else "cpu"
    except OSError:
        return "cpu"


def versions(candidates: Iterable[str]) -> dict[str, str]:
    """Versions of torch, triton and of the packages behind `candidates`, where installed."""
    from importlib import metadata

    found = {}
    for package in ("quantkit", "torch", "triton", *(name.split("-")[0] for name in candidates)):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
