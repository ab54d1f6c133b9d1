"""What a measurement was made on: versions, the machine, hashes of the checkpoints."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.hub import resolve_model
from quantkit.shards import sha256_file


def environment(device: str | torch.device = "cpu") -> dict[str, str]:
    """Versions and the machine, as a report shows them."""
    found = {
        "quantkit": quantkit.__version__,
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "device": device_name(device),
    }
    return {name: value for name, value in found.items() if value}


def device_name(device: str | torch.device) -> str:
    """ "cpu", or the accelerator's own name."""
    where = torch.device(device)
    module = getattr(torch, where.type, None)
    get = getattr(module, "get_device_name", None)
    return where.type if where.type == "cpu" or get is None else f"{get(where)} ({where})"


def checkpoint_hash(checkpoint: str | os.PathLike[str]) -> str:
    """sha256 over the names and sha256 of config.json and every weight file of a checkpoint."""
    with CheckpointReader(resolve_model(checkpoint)) as reader:
        files = {reader.info(name).file for name in reader.names()} | {reader.path / "config.json"}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
