"""Counters with which the programs of a launch tell who comes last: int32, zeros before every launch and after it.

Launches that may run at the same time must not share counters. On one stream they follow one another, so each stream
has its own. A captured graph may be replayed on any stream beside anything, so what is captured gets counters that no
other call ever gets.
"""

from __future__ import annotations

from functools import cache
from threading import Lock

import torch
from torch import Tensor

#: Counters of a stream: more than any launch has (two for a tile, fewer tiles than multiprocessors).
OF_STREAM = 4096
#: Counters for what is captured on a device: 8 MB, some ten thousand calls.
CAPTURED = 2 << 20

_streams: dict[tuple[torch.device, int], Tensor] = {}
_captured: dict[torch.device, Tensor] = {}
_given: dict[torch.device, int] = {}
_lock = Lock()


def arrivals(count: int, device: torch.device) -> Tensor:
    """Zeros for `count` counters on `device`, for a launch on its current stream that leaves them zeros."""
    if count == 0:
        return _none(device)
    backend = torch.get_device_module(device)
    if backend.is_current_stream_capturing():
        return _for_capture(count, device)
    key = device, backend.current_stream(device).stream_id
    found = _streams.get(key)
    if found is None or found.numel() < count:
        with _lock:
            if device not in _captured:
                _captured[device] = torch.zeros(CAPTURED, dtype=torch.int32, device=device)
                backend.synchronize(device)  # a graph will not wait for this stream
            found = torch.zeros(max(count, OF_STREAM), dtype=torch.int32, device=device)
            _streams[key] = found
    return found


@cache
def _none(device: torch.device) -> Tensor:
    """For a launch that counts nothing: an address."""
    return torch.zeros(4, dtype=torch.int32, device=device)


def _for_capture(count: int, device: torch.device) -> Tensor:
    """Counters of their own; where none are left, zeros that the graph writes anew on every replay."""
    with _lock:
        start = _given.get(device, 0)
        pool = _captured.get(device)
        if pool is None or start + count > pool.numel():
            return torch.zeros(count, dtype=torch.int32, device=device)
        _given[device] = start + -(-count // 4) * 4  # addresses of 16 bytes
        return pool[start : start + count]
