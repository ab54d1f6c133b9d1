"""One window through a model, and log-probabilities in chunks: no float copy of all logits is ever made.

A window's logits exist once, in the model's dtype and only for scored positions where the model can leave
the others out (`logits_to_keep`). Where two distributions are compared the log-softmax runs in float64 on CPU
and CUDA devices (float32 where a device has no float64), over a few rows at a time.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import NumericsError, UsageError
from quantkit.eval.protocols import Protocol, Window
from quantkit.memory import release_freed

_TRIM_EVERY = (
    4  # windows after which freed memory is given back: gaps in the heap add up to whole texts otherwise
)
_CHUNK = 1 << 20  # logits turned into log-probabilities at once
_HEADS_WITHOUT_NEXT_TOKEN = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")


class Scorer:
    """Feeds windows to one model and keeps the time it takes."""

    def __init__(self, model: Any, name: str = "the model") -> None:
        kind = type(model).__name__
        if kind.endswith(_HEADS_WITHOUT_NEXT_TOKEN):
            raise UsageError(
                f"{name} is a {kind}, which predicts no next token", hint="Use a causal language model."
            )
        self.model = model
        self.name = name
        self.seconds = 0.0
        self.fed = 0
        self._calls = 0
        self.device = _device(model)
        parameters = inspect.signature(model.forward).parameters
        self.keeps = "logits_to_keep" in parameters
        self._cache = {"use_cache": False} if "use_cache" in parameters else {}

    def logits(self, ids: Tensor, window: Window) -> Tensor:
        """Logits `[B, n, V]` that predict the `n` scored tokens of windows like `window`, for what is fed
        of them, `ids` int64 `[B, window.fed]`."""
        kept = window.fed - window.first + 1
        more = {**self._cache, **({"logits_to_keep": kept} if self.keeps else {})}
        begin = time.perf_counter()
        with torch.inference_mode():
            out: Tensor = self.model(input_ids=ids.to(self.device), **more).logits
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
        self.seconds += time.perf_counter() - begin
        self.fed += ids.numel()
        self._calls += 1
        if self._calls % _TRIM_EVERY == 0 and self.device.type == "cpu":
            release_freed()
        return out[:, -kept:][:, : window.length - window.first]


def model_positions(model: Any) -> int | None:
    """How many positions the model was built for, None when its config does not say."""
    config = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key in ("max_position_embeddings", "n_positions"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 1:
            return value
    return None


def check_ids(ids: Tensor, model: Any, name: str) -> Tensor:
    """Token ids as int64 `[T]` on the CPU; UsageError unless each is in the model's vocabulary."""
    ids = ids.reshape(-1).to("cpu", torch.int64)
    embeddings = model.get_input_embeddings()
    size = int(embeddings.weight.shape[0])
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < size):
        raise UsageError(
            f"token id {int(ids.max())} is outside the {size} tokens of {name}",
            hint="The tokenizer does not belong to this model.",
        )
    return ids


def with_prefix(ids: Tensor, protocol: Protocol, bos_token_id: int | None) -> Tensor:
    """`ids` after the prefix token that the protocol asks for; alone where it is not known."""
    if not protocol.prefix or bos_token_id is None:
        return ids
    return torch.cat([torch.tensor([bos_token_id], dtype=ids.dtype), ids])


def batches(
    ids: Tensor, protocol: Protocol, batch: int, bos_token_id: int | None
) -> Iterator[tuple[Tensor, Tensor, Window]]:
    """(inputs `[B, fed]`, targets `[B, L - first]`, one of the windows) for up to `batch` equal windows."""
    waiting: list[Window] = []
    for window in [*protocol.windows(len(ids)), None]:
        alike = waiting and window and window.kind() == waiting[0].kind()
        if waiting and (not alike or len(waiting) == max(1, batch)):
            whole = torch.stack([ids[w.start : w.stop] for w in waiting])
            targets = whole[:, waiting[0].first :].clone()
            inputs = whole[:, : waiting[0].fed]
            if protocol.bos and bos_token_id is not None:
                inputs[:, 0] = bos_token_id
            yield inputs, targets, waiting[0]
            waiting = []
        if window:
            waiting.append(window)


def chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of the rows of logits `[R, V]` that are few enough to be converted at once."""
    rows, vocabulary = logits.shape
    step = max(1, _CHUNK // vocabulary)
    for at in range(0, rows, step):
        yield slice(at, min(at + step, rows))


def log_prob_chunks(*logits: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """(rows, log-probabilities of those rows) for logits `[R, V]` of one or two models."""
    exact = torch.float64 if logits[0].device.type in ("cpu", "cuda") else torch.float32
    for part in chunks(logits[0]):
        yield part, tuple(torch.log_softmax(t[part].to(logits[0].device, exact), dim=-1) for t in logits)


def check_finite(losses: Tensor, name: str) -> None:
    """NumericsError when a model's losses (float64 `[n]`) contain NaN."""
    if bool(torch.isnan(losses).any()):
        raise NumericsError(
            f"{name} gives NaN for {int(torch.isnan(losses).sum())} of {len(losses)} tokens",
            hint="Try another dtype, or check the checkpoint with `quantkit verify`.",
        )


def _device(model: Any) -> torch.device:
    device = model.get_input_embeddings().weight.device
    return device if isinstance(device, torch.device) else torch.device(device)
