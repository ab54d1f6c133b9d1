"""What the tests of reader and writer share: random tensors, small units, whole trees of files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.publish import CheckpointWriter
from quantkit.shards import DTYPES


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random bytes as a tensor of any dtype (for bool: 0 and 1)."""
    data = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    if dtype == torch.bool:
        data &= 1
    return data.view(dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def some_units(count: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    shapes = [(), (63,), (31, 5), (2, 3, 7), (0, 4)]
    return {
        f"layer {i}": {
            f"model.layers.{i}.{code}.{j}": random_tensor(shape, dtype)
            for code, dtype in DTYPES.items()
            for j, shape in enumerate(shapes)
        }
        for i in range(count)
    }


def write(dest: Path, units: dict[str, dict[str, torch.Tensor]], **options) -> None:
    with CheckpointWriter(dest, **options) as writer:
        for unit, tensors in units.items():
            if unit not in writer.completed:
                writer.write_unit(unit, tensors, report={"unit": unit})
        writer.add_json("config.json", {"model_type": "llama"})
        writer.publish()


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def all_tensors(units: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: tensor for unit in units.values() for name, tensor in unit.items()}


class Stop(Exception):
    """Stands for an interruption."""


def interrupt(dest: Path, units: dict[str, dict[str, torch.Tensor]], after: int, **options) -> None:
    """Write the first `after` units, then fail."""
    with pytest.raises(Stop), CheckpointWriter(dest, **options) as writer:
        for unit, tensors in list(units.items())[:after]:
            writer.write_unit(unit, tensors, report={"unit": unit})
        raise Stop
