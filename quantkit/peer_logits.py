"""Logits of one checkpoint as quantkit computes them and as the format's owner does.

The owner runs in a process of its own (scripts/peers/logits.py), in the interpreter where it is
installed: this one, or one of the environments under `QUANTKIT_PEERS` (default `.peers`), which
`make peers` creates.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from quantkit.errors import UsageError, did_you_mean

#: quant_method -> (loader of scripts/peers/logits.py, module that must be importable).
OWNERS = {
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "awq": ("gptqmodel", "gptqmodel"),
    "hqq": ("hqq", "hqq"),
    "fp8": ("transformers", "transformers"),
    "bitnet": ("transformers", "transformers"),
    "compressed-tensors": ("compressed-tensors", "compressed_tensors"),
    None: ("transformers", "transformers"),
}
LOADERS = {
    "transformers": "transformers",
    "gptqmodel": "gptqmodel",
    "autoawq": "awq",
    "hqq": "hqq",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
}
#: Relative L2 distance of logits that counts as the same: owners round weights and activations to
#: their own dtypes on the way.
TOLERANCE = 0.02
_ARGUMENTS = {"compressed-tensors": ("--run-compressed",)}  # rounds activations, as the layout asks
_SHAPE = (2, 24)
_TIMEOUT = 1800


def fixed_ids(vocab_size: int, shape: tuple[int, int] = _SHAPE) -> Tensor:
    """The token ids on which logits are compared: always the same for one vocabulary."""
    generator = torch.Generator().manual_seed(20240229)
    return torch.randint(0, vocab_size, shape, generator=generator)


def compare_logits(
    path: Path,
    quant_method: str | None,
    loader: str | None,
    device: str | torch.device,
    trust_remote_code: bool,
) -> tuple[str, bool | None, str]:
    """(name of the check, verdict, detail); the verdict is None when the owner is not at hand.

    UsageError when a `loader` was asked for that is unknown or not installed.
    """
    asked = loader is not None
    if loader is None:
        loader, module = OWNERS.get(quant_method, OWNERS[None])
    else:
        check_loader(loader)
        module = LOADERS[loader]
    title = f"logits against {loader}"
    python, script = find_interpreter(loader, module), find_script()
    if python is None or script is None:
        missing = f"{loader} is not installed" if python is None else "scripts/peers/logits.py is not here"
        if asked:
            raise UsageError(missing, hint="Run `make peers` in a checkout, or set QUANTKIT_PEERS.")
        return title, None, f"not compared: {missing}"
    ours, ids = our_logits(path, device, trust_remote_code)
    theirs = peer_logits(python, script, loader, path, ids)
    if isinstance(theirs, str):
        return title, False if asked else None, f"{loader} failed: {theirs}"
    if theirs.shape != ours.shape:
        return (
            title,
            False,
            f"{loader} gives logits of shape {list(theirs.shape)}, quantkit {list(ours.shape)}",
        )
    ok, detail = _judge(ours, theirs)
    if not ok:
        # Some owners dequantize where a kernel is missing (fp8 on a CPU), and then do not round
        # activations as the layout asks.
        plain, _ = our_logits(path, device, trust_remote_code, dequantize_weights=True)
        if _judge(plain, theirs)[0]:
            return (
                title,
                True,
                f"{_judge(plain, theirs)[1]}, with activations left unrounded as {loader} does here",
            )
    return title, ok, detail


def check_loader(loader: str | None) -> None:
    """UsageError unless `loader` is one that `compare_logits` knows, "none" or None."""
    if loader is not None and loader not in (*LOADERS, "none"):
        raise UsageError(f"unknown loader {loader!r}", hint=did_you_mean(loader, [*LOADERS, "none"]))


def _judge(ours: Tensor, theirs: Tensor) -> tuple[bool, str]:
    distance = float(
        torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs).clamp_min(1e-30)
    )
    same = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    return distance <= TOLERANCE, (
        f"relative distance {distance:.2e} (at most {TOLERANCE}), same first choice {same:.1%}"
    )


def our_logits(
    path: Path, device: str | torch.device, trust_remote_code: bool, dequantize_weights: bool = False
) -> tuple[Tensor, Tensor]:
    """(float32 logits on the CPU, the ids) of a checkpoint loaded by quantkit in float32."""
    from quantkit.load import load

    model = load(
        path,
        device=device,
        dtype=torch.float32,
        dequantize_weights=dequantize_weights,
        trust_remote_code=trust_remote_code,
    )
    ids = fixed_ids(int(model.config.get_text_config().vocab_size))
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return logits.float().cpu(), ids


def peer_logits(python: Path, script: Path, loader: str, path: Path, ids: Tensor) -> Tensor | str:
    """The owner's logits, or the last line of what it said when it failed."""
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="quantkit-verify-") as folder:
        ids_file, out = Path(folder, "ids.npy"), Path(folder, "logits.npy")
        np.save(ids_file, ids.numpy().astype(np.int64))
        command = [str(python), str(script), "--loader", loader, "--model", str(path)]
        command += ["--ids", str(ids_file), "--out", str(out), *_ARGUMENTS.get(loader, ())]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            return f"no answer in {_TIMEOUT} s"
        if done.returncode != 0 or not out.is_file():
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            return lines[-1][:300] if lines else f"exit code {done.returncode}"
        return torch.from_numpy(np.load(out, allow_pickle=False)).float()


def find_interpreter(loader: str, module: str) -> Path | None:
    """The Python that has `loader`: this one, or one of the peers' environments."""
    if importlib.util.find_spec(module) is not None:
        return Path(sys.executable)
    root = os.environ.get("QUANTKIT_PEERS") or str(_repository() / ".peers")
    for python in sorted(Path(root).glob("*/bin/python")):
        site = sorted(python.parents[1].glob(f"lib/python3*/site-packages/{module}"))
        if site:
            return python
    return None


def find_script() -> Path | None:
    """scripts/peers/logits.py of the checkout that this package runs from."""
    script = _repository() / "scripts" / "peers" / "logits.py"
    return script if script.is_file() else None


def _repository() -> Path:
    return Path(__file__).resolve().parents[1]
