"""Hidden states of all calibration samples, on disk: outside of memory, and there after a crash."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class HiddenStates:
    """float32 `[samples, seqlen, hidden]` in one file, read and written a few samples at a time."""

    def __init__(self, path: Path, samples: int, seqlen: int, hidden: int) -> None:
        self.path = path
        self.shape = (samples, seqlen, hidden)
        self._row = seqlen * hidden * 4

    def create(self) -> None:
        """Make the file at its full size, so that a full disk is noticed now."""
        with open(self.path, "wb") as file:
            if hasattr(os, "posix_fallocate") and self.nbytes:
                os.posix_fallocate(file.fileno(), 0, self.nbytes)
            else:
                file.truncate(self.nbytes)

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self._row

    def complete(self) -> bool:
        """Is the file there, with the size it should have?"""
        return self.path.exists() and self.path.stat().st_size == self.nbytes

    def read(self, start: int, stop: int) -> Tensor:
        """Samples `start:stop`; a private copy (a short-lived map, so that pages are given back)."""
        shape = (stop - start, *self.shape[1:])
        view = np.memmap(self.path, np.float32, "r", start * self._row, shape)
        return torch.from_numpy(np.array(view))

    def write(self, start: int, values: Tensor) -> None:
        """Store samples from `start` on."""
        data = values.detach().to("cpu", torch.float32).contiguous().numpy()
        with open(self.path, "r+b") as file:
            file.seek(start * self._row)
            file.write(data.tobytes())

    def sync(self) -> None:
        """Make the file durable."""
        with open(self.path, "r+b") as file:
            os.fsync(file.fileno())
