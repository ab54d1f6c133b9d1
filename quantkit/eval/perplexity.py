"""Perplexity under a named protocol, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.eval.protocols import DEFAULT_PROTOCOL, Protocol, resolve_protocol
from quantkit.eval.scoring import (
    Scorer,
    batches,
    check_finite,
    check_ids,
    chunks,
    model_positions,
    with_prefix,
)
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
    nll_total: float = 0.0  # summed over the scored tokens, unweighted
    word_ppl: float | None = None  # lm-eval's word_perplexity, where its protocol was asked for
    byte_ppl: float | None = None
    bits_per_byte: float | None = None

    def per_text(self, words: int, nbytes: int) -> None:
        """Fill lm-eval's figures for a text of `words` words and `nbytes` UTF-8 bytes."""
        per_byte = self.nll_total / max(nbytes, 1)
        per_word = self.nll_total / max(words, 1)
        self.word_ppl = math.exp(per_word) if per_word < 700 else math.inf
        self.byte_ppl = math.exp(per_byte) if per_byte < 700 else math.inf
        self.bits_per_byte = per_byte / math.log(2)


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

    `protocol`: "gptq", "hqq", "llama.cpp", "lm-eval" or a `Protocol`; see `quantkit.eval.protocols`. `batch`
    windows run at once. `bos_token_id`: what llama.cpp's protocol puts first in a window, and lm-eval's
    before the text (None: nothing).
    CalibrationError when the text is too short, NumericsError when the model gives NaN.
    """
    ids = check_ids(token_ids, model, name)
    protocol, _ = resolve_protocol(protocol, model_positions(model), len(ids))
    ids = with_prefix(ids, protocol, bos_token_id)
    total = len(protocol.windows(len(ids)))
    scorer, done = Scorer(model, name), 0
    losses: list[Tensor] = []
    weights: list[Tensor] = []
    for inputs, targets, window in batches(ids, protocol, batch, bos_token_id):
        losses.append(token_losses(scorer.logits(inputs, window).flatten(0, 1), targets.flatten()))
        weights.append(torch.full_like(losses[-1], window.weight))
        done += len(inputs)
        if on_progress is not None:
            on_progress(done, total)
    nll = torch.cat(losses)
    check_finite(nll, name)
    return summarize(nll, torch.cat(weights), total, protocol, scorer)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood float64 `[R]` (CPU) of `targets` int64 `[R]` under logits `[R, V]`.

    log sum exp runs in float32 (its error is about 1e-6 for one token and averages out), a few rows at a
    time; logits that are float32 already are not copied.
    """
    out = torch.empty(len(targets), dtype=torch.float64)
    for rows in chunks(logits):
        part = logits[rows].float()
        true = part.gather(1, targets[rows, None].to(part.device))[:, 0]
        out[rows] = (torch.logsumexp(part, dim=1) - true).cpu().double()
    return out


def summarize(nll: Tensor, weights: Tensor, windows: int, protocol: Protocol, scorer: Any) -> Perplexity:
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
        nll_total=float(nll.sum()),
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
