"""Perplexity under a named protocol, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.eval.protocols import DEFAULT_PROTOCOL, Protocol, resolve_protocol
from quantkit.eval.scoring import Scorer, batches, check_finite, check_ids, log_prob_chunks, model_positions
from quantkit.report_types import Report

OnProgress = Callable[[int, int], None]  # (windows done, windows in all)


@dataclass
class Perplexity(Report):
    """`ppl = exp(nll)`; `stderr` takes the scored tokens as independent, as llama.cpp does."""

    ppl: float
    stderr: float
    nll: float  # mean negative log-likelihood in nats, weighted as the protocol says
    tokens: int  # scored
    windows: int
    protocol: str
    seconds: float  # in the model
    tokens_per_second: float  # fed through the model


def perplexity(
    model: Any,
    token_ids: Tensor,
    protocol: str | Protocol = DEFAULT_PROTOCOL,
    *,
    batch: int = 1,
    bos_token_id: int | None = None,
    on_progress: OnProgress | None = None,
    name: str = "the model",
) -> Perplexity:
    """Perplexity of a causal transformers model on `token_ids` (int64 `[T]`).

    `protocol`: "gptq", "hqq", "llama.cpp" or a `Protocol`; see `quantkit.eval.protocols`. `batch` windows
    run at once. `bos_token_id`: what llama.cpp's protocol puts first in a window (None: nothing).
    CalibrationError when the text is too short, NumericsError when the model gives NaN.
    """
    ids = check_ids(token_ids, model, name)
    protocol, _ = resolve_protocol(protocol, model_positions(model), len(ids))
    total = len(protocol.windows(len(ids)))
    scorer, done = Scorer(model, name), 0
    losses: list[Tensor] = []
    weights: list[Tensor] = []
    for inputs, targets, window in batches(ids, protocol, batch, bos_token_id):
        losses.append(token_losses(scorer.logits(inputs, window.first).flatten(0, 1), targets.flatten()))
        weights.append(torch.full_like(losses[-1], window.weight))
        done += len(inputs)
        if on_progress is not None:
            on_progress(done, total)
    nll = torch.cat(losses)
    check_finite(nll, name)
    return summarize(nll, torch.cat(weights), total, protocol, scorer)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood float64 `[R]` (CPU) of `targets` int64 `[R]` under logits `[R, V]`."""
    out = torch.empty(len(targets), dtype=torch.float64)
    for rows, (logp,) in log_prob_chunks(logits):
        out[rows] = -logp.gather(1, targets[rows, None].to(logp.device))[:, 0].cpu().double()
    return out


def summarize(nll: Tensor, weights: Tensor, windows: int, protocol: Protocol, scorer: Scorer) -> Perplexity:
    """Perplexity from the losses and weights of all scored tokens (float64 `[n]`)."""
    mean, error = weighted_mean(nll, weights)
    ppl = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(
        ppl=ppl,
        stderr=ppl * error,
        nll=mean,
        tokens=len(nll),
        windows=windows,
        protocol=protocol.describe(),
        seconds=scorer.seconds,
        tokens_per_second=scorer.fed / max(scorer.seconds, 1e-9),
    )


def weighted_mean(values: Tensor, weights: Tensor) -> tuple[float, float]:
    """Weighted mean of independent `values` and its standard error (0 for a single value)."""
    total = weights.sum()
    mean = (values * weights).sum() / total
    count = len(values)
    if count < 2 or not bool(torch.isfinite(mean)):
        return float(mean), 0.0
    spread = ((values - mean) * weights).square().sum() * (count / (count - 1))
    return float(mean), float(spread.sqrt() / total)
