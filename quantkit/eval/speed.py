"""Speed and memory of one loaded model: prefill, decode, time to first token, share of the bandwidth.

Every point is warmed up, then measured several times; the median is reported with the slowest and the fastest
run. Clocks are read after the device has finished. Tokens are random: their values do not change the work of
a dense model (a mixture of experts may route them differently from text).

`bandwidth_share` of decoding = bytes of the weights that a step reads / its time / the rate at which this
device reads memory, measured here in the same run. A step reads every weight but the input embedding, of which
it gathers one row per sequence; weights of experts that are not chosen are counted too.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UsageError
from quantkit.eval.memory import PeakMemory
from quantkit.eval.results import Speed, SpeedPoint
from quantkit.eval.scoring import Scorer, model_positions


@dataclass(frozen=True)
class SpeedPlan:
    """What to measure: every combination of batch sizes and contexts."""

    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (512,)
    new_tokens: int = 16  # decoded per run
    runs: int = 5
    warmup: int = 1
    bandwidth_bytes: int | None = (
        None  # size of the buffer read for the bandwidth; None: 256 MB, 2 GB on a device
    )

    def __post_init__(self) -> None:
        numbers = (*self.batches, *self.contexts, self.new_tokens, self.runs)
        if not self.batches or not self.contexts or min(numbers) < 1 or self.warmup < 0:
            raise UsageError(
                "batches, contexts, new tokens and runs of a speed measurement must be at least 1"
            )


def measure_speed(model: Any, plan: SpeedPlan | None = None, *, load_seconds: float = 0.0) -> Speed:
    """Measure a causal transformers model where it lies. Contexts are cut to leave room for the new tokens;
    UsageError when there is none."""
    plan = plan or SpeedPlan()
    runner = _Runner(model)
    contexts = _contexts(plan, model_positions(model))
    device = runner.device
    bandwidth = read_bandwidth(device, plan.bandwidth_bytes)
    result = Speed(
        device=str(device),
        dtype=str(next((p.dtype for p in model.parameters() if p.is_floating_point()), "")).removeprefix(
            "torch."
        ),
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        load_seconds=load_seconds,
        weight_bytes=sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())),
        peak_memory=0,
        time_to_first_token=None,
        bandwidth=bandwidth,
    )
    read = result.weight_bytes - _gathered_bytes(model)
    with PeakMemory(device) as memory, torch.inference_mode():
        for batch in plan.batches:
            for context in contexts:
                ids = runner.random_ids(batch, context)
                times = runner.timed(lambda ids=ids: runner.prefill(ids), plan)  # type: ignore[misc]
                result.points.append(_point("prefill", batch, context, times, batch * context))
                steps = runner.decode(ids, plan)
                point = _point("decode", batch, context, steps, batch)
                point.bandwidth_share = read / point.seconds / bandwidth if bandwidth else None
                result.points.append(point)
        one = runner.random_ids(1, max(contexts))
        result.time_to_first_token = statistics.median(runner.timed(lambda: runner.first_token(one), plan))
    result.peak_memory = memory.peak
    return result


class _Runner:
    """Forward passes of one model, timed."""

    def __init__(self, model: Any) -> None:
        scorer = Scorer(model)
        self.model, self.device = model, scorer.device
        self._last = {"logits_to_keep": 1} if scorer.keeps else {}
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            raise UsageError("the model keeps no key-value cache, so its decoding speed cannot be measured")

    def random_ids(self, batch: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self._vocabulary, (batch, count), generator=generator).to(self.device)

    def sync(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def prefill(self, ids: Tensor, cache: Any = None) -> Any:
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True, **self._last)

    def first_token(self, ids: Tensor) -> int:
        return int(self.prefill(ids).logits[0, -1].argmax())

    def timed(self, work: Callable[[], object], plan: SpeedPlan) -> list[float]:
        """Seconds of every run after the warm-up."""
        times = []
        for run in range(plan.warmup + plan.runs):
            self.sync()
            began = time.perf_counter()
            work()
            self.sync()
            if run >= plan.warmup:
                times.append(time.perf_counter() - began)
        return times

    def decode(self, ids: Tensor, plan: SpeedPlan) -> list[float]:
        """Seconds per step of every run of `new_tokens` steps after a prefill that does not count."""
        times = []
        for run in range(plan.warmup + plan.runs):
            out = self.prefill(ids)
            token = out.logits[:, -1:].argmax(-1)
            self.sync()
            began = time.perf_counter()
            for _ in range(plan.new_tokens):
                out = self.prefill(token, out.past_key_values)
                token = out.logits[:, -1:].argmax(-1)
            self.sync()
            if run >= plan.warmup:
                times.append((time.perf_counter() - began) / plan.new_tokens)
        return times


def read_bandwidth(device: torch.device, nbytes: int | None = None) -> float:
    """Bytes per second at which this device sums a buffer much larger than its caches (best of 5)."""
    size = nbytes or (256 << 20 if device.type == "cpu" else 2 << 30)
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)

    def once() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        began = time.perf_counter()
        float(buffer.sum())  # waits for the device
        return time.perf_counter() - began

    once()
    return buffer.numel() * 4 / min(once() for _ in range(5))


def _contexts(plan: SpeedPlan, limit: int | None) -> tuple[int, ...]:
    if limit is None:
        return plan.contexts
    room = limit - plan.new_tokens
    if room < 1:
        raise UsageError(f"the model's {limit} positions leave no room for {plan.new_tokens} new tokens")
    return tuple(dict.fromkeys(min(context, room) for context in plan.contexts))


def _gathered_bytes(model: Any) -> int:
    """Bytes of the input embedding, unless it is the output embedding too."""
    embedding = model.get_input_embeddings().weight
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    tied = head is not None and getattr(head, "weight", None) is embedding
    return 0 if tied else embedding.numel() * embedding.element_size()


def _point(phase: str, batch: int, context: int, times: list[float], tokens: int) -> SpeedPoint:
    median = statistics.median(times)
    return SpeedPoint(
        phase, batch, context, tokens / median, tokens / max(times), tokens / min(times), len(times), median
    )
