"""What a cache of predictions holds: rows for scored tokens, recorded from a running model.

Form "hidden": the states that enter the output embedding. Form "codes": log-probabilities as 16-bit codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import CheckpointError
from quantkit.eval.protocols import Window
from quantkit.eval.scoring import Scorer
from quantkit.shards import spec_of, write_safetensors
from quantkit.untrusted import show

_FILE_BYTES = 64 << 20
_RANGE = 40.0  # nats below the likeliest token that 16-bit codes cover; less likely ones count as impossible
_LEVELS = 65534  # code 0 is "impossible"
_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Recorder(Scorer):
    """A scorer that turns each batch into rows to keep."""

    def __init__(self, model: Any, name: str) -> None:
        super().__init__(model, name)
        get = getattr(model, "get_output_embeddings", None)
        head = get() if get is not None else None
        plain = type(head) is nn.Linear and head.weight.dtype in _FLOATS.values()
        self._head: nn.Linear | None = head if plain else None
        self.form = ""  # decided by the first batch
        self.vocabulary = 0
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        cap = getattr(config, "final_logit_softcapping", None)
        self.softcap: float | None = float(cap) if cap else None
        self._seen: list[Tensor] = []
        self._handle = (
            self._head.register_forward_pre_hook(lambda _, args: self._seen.append(args[0]))
            if self._head is not None
            else None
        )

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def rows(self, ids: Tensor, window: Window) -> Iterator[dict[str, Tensor]]:
        """The scored rows of a batch of windows, as tensors for a file (on the CPU)."""
        self._seen.clear()
        logits = self.logits(ids, window)
        count = window.length - window.first
        hidden = self._hidden(window.fed - window.first + 1, count)
        if not self.form:
            self.vocabulary = logits.shape[-1]
            same = hidden is not None and self._same(hidden, logits)
            self.form = "hidden" if same else "codes"
        if self.form == "hidden":
            assert hidden is not None
            yield {"hidden": hidden.flatten(0, 1).cpu()}
            return
        flat = logits.flatten(0, 1)
        step = max(1, _FILE_BYTES // (4 * flat.shape[1]))
        for at in range(0, len(flat), step):
            yield encode(flat[at : at + step])

    def _hidden(self, kept: int, count: int) -> Tensor | None:
        if len(self._seen) != 1 or self._seen[0].dim() != 3:
            return None
        return self._seen[0][:, -kept:][:, :count]

    def _same(self, hidden: Tensor, logits: Tensor) -> bool:
        """Whether the logits are the head's outputs, perhaps soft-capped (to the dtype's rounding)."""
        assert self._head is not None
        with torch.inference_mode():
            again = nn.functional.linear(hidden[:1], self._head.weight, self._head.bias).float()
        want = logits[:1].float()
        scale = float(want.abs().max())
        tolerance = 4 * torch.finfo(hidden.dtype).eps * max(scale, 1e-6)
        if (
            self.softcap
            and float((torch.tanh(again / self.softcap) * self.softcap - want).abs().max()) < tolerance
        ):
            return True
        self.softcap = None
        return float((again - want).abs().max()) < tolerance

    def write_head(self, writer: RowWriter) -> None:
        if self.form == "hidden":
            assert self._head is not None
            own = {name: parameter.detach() for name, parameter in self._head.named_parameters()}
            writer.write("head.safetensors", own)


class RowWriter:
    """Collects rows into files of about 64 MB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}
        self.rows = 0
        self._waiting: list[dict[str, Tensor]] = []
        self._bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        self._waiting.append(tensors)
        self._bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        self.rows += len(next(iter(tensors.values())))
        if self._bytes >= _FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            merged = {name: torch.cat([t[name] for t in self._waiting]) for name in self._waiting[0]}
            self._waiting, self._bytes = [], 0
            self.write(f"rows-{len(self.files):05d}.safetensors", merged)

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        specs = {key: spec_of(tensor) for key, tensor in tensors.items()}
        digest, size = write_safetensors(self.folder / name, specs, tensors.__getitem__)
        self.files[name] = {"sha256": digest, "size": size}


def encode(logits: Tensor) -> dict[str, Tensor]:
    """Log-probabilities of logits `[n, V]` as 16-bit codes (int16 `[n, V]`), with `low` and `step` `[n]`."""
    logp = torch.log_softmax(logits.float(), dim=-1)
    high = logp.amax(-1, keepdim=True)
    kept = logp >= high - _RANGE
    low = torch.where(kept, logp, high).amin(-1, keepdim=True)
    step = ((high - low) / (_LEVELS - 1)).clamp_min(1e-30)
    codes = torch.where(kept, ((logp - low) / step).round().clamp(0, _LEVELS - 1) + 1, 0.0)
    return {
        "codes": (codes - 32768).to(torch.int16).cpu(),
        "low": low[:, 0].cpu(),
        "step": step[:, 0].cpu(),
    }


def decode(tensors: Mapping[str, Tensor], vocabulary: int, path: Path) -> Tensor:
    """Logits float32 `[n, V]` (normalised by whoever takes their softmax)."""
    codes, low, step = (tensors.get(key) for key in ("codes", "low", "step"))
    if (
        codes is None
        or low is None
        or step is None
        or (codes.dtype, low.dtype, step.dtype) != (torch.int16, torch.float32, torch.float32)
        or codes.shape != (len(low), vocabulary)
        or step.shape != low.shape
    ):
        raise CheckpointError(f"{show(path)} holds no codes", hint="Delete the directory.")
    level = codes.float() + 32768
    return torch.where(level > 0, low[:, None] + (level - 1) * step[:, None], -torch.inf)
