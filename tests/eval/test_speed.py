"""Speed: the arithmetic against a model of known speed, contexts, memory, and what cannot be measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit.errors import UsageError
from quantkit.eval import speed
from quantkit.eval.speed import SpeedPlan, measure_speed, read_bandwidth
from quantkit.load import load

FAST = {"bandwidth_bytes": 4 << 20}


class Clock:
    """Time that passes only when somebody works."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(speed, "time", made)
    monkeypatch.setattr(speed, "read_bandwidth", lambda *_: 1e6)
    return made


class Metronome(torch.nn.Module):
    """Takes 2 ms and 20 us for each token of each sequence, every third time 1 ms more; its cache is how much
    it has seen."""

    def __init__(self, clock: Clock | None = None, tied: bool = False) -> None:
        super().__init__()
        self.clock = clock or Clock()
        self.embedding = torch.nn.Embedding(50, 8)
        self.head = torch.nn.Linear(8, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.config = SimpleNamespace(max_position_embeddings=200)
        self.seen: list[tuple[int, int, int]] = []

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        assert use_cache
        rows, count = input_ids.shape
        self.seen.append((rows, past_key_values or 0, count))
        self.clock.now += 0.002 + 20e-6 * rows * count + (0.001 if len(self.seen) % 3 == 0 else 0.0)
        return SimpleNamespace(
            logits=torch.zeros(rows, count, 50), past_key_values=(past_key_values or 0) + count
        )


def test_against_a_model_of_known_speed(clock: Clock) -> None:
    model = Metronome(clock)
    plan = SpeedPlan(batches=(1, 4), contexts=(100,), new_tokens=6, runs=3, warmup=1)
    found = measure_speed(model, plan, load_seconds=1.5)
    for batch in (1, 4):
        step = 0.002 + 20e-6 * batch * 100
        prefill = found.find("prefill", batch, 100)
        assert prefill is not None and prefill.runs == 3
        assert prefill.high == pytest.approx(100 * batch / step)  # one run in three has the extra millisecond
        assert prefill.tokens_per_second == pytest.approx(100 * batch / step)
        assert prefill.low == pytest.approx(100 * batch / (step + 0.001))
        decode = found.find("decode", batch, 100)
        assert decode is not None
        mean = 0.002 + 20e-6 * batch + 0.001 / 3  # two of six steps
        assert decode.seconds == pytest.approx(mean)
        assert decode.tokens_per_second == pytest.approx(batch / mean)
    assert found.time_to_first_token in (pytest.approx(0.004), pytest.approx(0.005))
    assert found.load_seconds == 1.5 and found.threads == torch.get_num_threads()
    decoded = [step for step in model.seen if step[2] == 1]
    assert [past for rows, past, _ in decoded if rows == 4][:6] == [100, 101, 102, 103, 104, 105]
    assert len(decoded) == 2 * 6 * (3 + 1)
    alone = measure_speed(Metronome(clock), SpeedPlan(batches=(4,), contexts=(50, 100), runs=1, warmup=0))
    assert alone.time_to_first_token in (pytest.approx(0.004), pytest.approx(0.005))  # of one sequence of 100
    assert found.find("decode", 2, 100) is None


@pytest.mark.parametrize("tied", [False, True])
def test_share_of_bandwidth_counts_what_a_step_reads(clock: Clock, tied: bool) -> None:
    """The input embedding is only gathered from, unless it is the output embedding too."""
    found = measure_speed(Metronome(clock, tied), SpeedPlan(contexts=(50,), new_tokens=3, runs=2))
    assert found.weight_bytes == 50 * 8 * 4 * (1 if tied else 2)
    point = found.find("decode", 1, 50)
    assert point is not None and found.bandwidth == 1e6
    assert point.bandwidth_share == pytest.approx(50 * 8 * 4 / point.seconds / 1e6)


def test_bandwidth_is_plausible() -> None:
    assert 1e8 < read_bandwidth(torch.device("cpu"), 64 << 20) < 1e13


def test_contexts_leave_room() -> None:
    model = Metronome()
    found = measure_speed(model, SpeedPlan(contexts=(50, 195, 999), new_tokens=10, runs=1, **FAST))
    assert [p.context for p in found.points if p.phase == "decode"] == [50, 190]
    with pytest.raises(UsageError, match="no room"):
        measure_speed(model, SpeedPlan(new_tokens=200, **FAST))
    for wrong in ({"batches": ()}, {"contexts": (0,)}, {"runs": 0}, {"new_tokens": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            SpeedPlan(**wrong)  # type: ignore[arg-type]


def test_a_model_without_a_cache_is_refused() -> None:
    class Plain(Metronome):
        def forward(self, input_ids: Tensor) -> Any:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))

    with pytest.raises(UsageError, match="no key-value cache"):
        measure_speed(Plain(), SpeedPlan(**FAST))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_real_models(tiny: Callable[..., Path], family: str) -> None:
    model = load(tiny(family), dtype=torch.float32)
    plan = SpeedPlan(batches=(1, 2), contexts=(16,), new_tokens=3, runs=2, **FAST)
    found = measure_speed(model, plan)
    assert len(found.points) == 4 and found.dtype == "float32" and found.peak_memory > 0
    assert found.weight_bytes >= sum(p.nbytes for p in model.parameters())


def test_both_are_measured_in_one_run(tiny: Callable[..., Path], tmp_path: Path) -> None:
    quantkit.convert(tiny("llama"), tmp_path / "q", format="hqq")
    plan = SpeedPlan(contexts=(16,), new_tokens=2, runs=2, **FAST)
    result = quantkit.evaluate(
        tmp_path / "q", tiny("llama"), tokens=300, speed=plan, checks=False, layers=False
    )
    assert all(row.speed is not None and row.speed.load_seconds > 0 for row in result.rows)
    source, quantized = (row.speed for row in result.rows)
    assert source and quantized and quantized.weight_bytes < source.weight_bytes
    text = result.to_text()
    assert "decode tok/s" in text and "bandwidth" in text
