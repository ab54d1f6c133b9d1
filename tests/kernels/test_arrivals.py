"""Counters of launches: who shares them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from quantkit.kernels import arrivals as module
from quantkit.kernels.arrivals import CAPTURED, OF_STREAM, arrivals

DEVICE = torch.device("cpu")


class Backend:
    """What `torch.cuda` says of streams and captures."""

    def __init__(self) -> None:
        self.stream, self.capturing, self.waited = 0, False, 0

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def current_stream(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(stream_id=self.stream)

    def synchronize(self, device: torch.device) -> None:
        self.waited += 1


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    found = Backend()
    monkeypatch.setattr(torch, "get_device_module", lambda device: found)
    for name in ("_streams", "_captured", "_given"):
        monkeypatch.setattr(module, name, {})
    yield found


def where(counters: torch.Tensor) -> range:
    return range(counters.data_ptr(), counters.data_ptr() + 4 * counters.numel())


def test_launches_of_a_stream_share_counters_streams_do_not(backend: Backend) -> None:
    first = arrivals(10, DEVICE)
    assert first.dtype == torch.int32 and first.numel() >= 10 and not first.any()
    assert arrivals(OF_STREAM, DEVICE).data_ptr() == first.data_ptr() and backend.waited == 1
    backend.stream = 7
    other = arrivals(10, DEVICE)
    assert not set(where(first)) & set(where(other)) and backend.waited == 1
    many = arrivals(OF_STREAM + 1, DEVICE)
    assert many.numel() > OF_STREAM and not many.any()
    backend.stream = 0
    assert arrivals(3, DEVICE).data_ptr() == first.data_ptr()


def test_what_is_captured_shares_with_nobody(backend: Backend) -> None:
    first = arrivals(10, DEVICE)
    backend.capturing = True
    given = [arrivals(count, DEVICE) for count in (7, 184, 9, 264)]
    assert [g.numel() for g in given] == [7, 184, 9, 264] and not any(bool(g.any()) for g in given)
    taken: set[int] = set(where(first))
    for counters in given:
        assert not taken & set(where(counters)) and counters.data_ptr() % 16 == 0
        taken |= set(where(counters))
    assert arrivals(CAPTURED, DEVICE).numel() == CAPTURED, "none left: zeros of the graph's own"


def test_who_counts_nothing_takes_nothing(backend: Backend) -> None:
    assert arrivals(0, DEVICE).dtype == torch.int32
    backend.capturing = True
    arrivals(0, DEVICE)
    assert not module._streams and not module._given and backend.waited == 0


def test_a_capture_before_any_launch_has_zeros_of_its_own(backend: Backend) -> None:
    backend.capturing = True
    first, second = arrivals(8, DEVICE), arrivals(8, DEVICE)
    assert not first.any() and not set(where(first)) & set(where(second))
