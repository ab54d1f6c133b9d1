"""The little that calibration needs of several workers: rank, sums, and a common scratch path.

Started by `torchrun --nproc-per-node N`, every worker runs its share of the calibration samples and
the statistics are summed, so all workers choose the same codes; rank 0 alone writes. Without torchrun
everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """This process among `world` workers."""

    rank: int = 0
    world: int = 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over workers, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Elementwise maximum over workers, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every worker."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def join_workers(device: torch.device) -> Iterator[Workers]:
    """The process group that torchrun's environment describes (a group that exists is used as it is)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world <= 1:
        yield Workers()
        return
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo" if device.type == "cpu" else None)
    try:
        yield Workers(dist.get_rank(), dist.get_world_size())
    finally:
        if mine and dist.is_initialized():
            dist.destroy_process_group()
