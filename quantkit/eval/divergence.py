"""KL(reference || candidate): how far a quantized model's predictions are from the original's.

    KL_t = sum_v p_t(v) * (log p_t(v) - log q_t(v))      for every scored token t, in nats

Unlike a difference of perplexities it is zero only for equal predictions and cannot cancel between
tokens. Both see the same windows: two models side by side, or one beside the other's cached predictions
(`quantkit.eval.reference_cache`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UsageError
from quantkit.eval.perplexity import OnProgress, Perplexity, summarize, token_losses, weighted_mean
from quantkit.eval.protocols import DEFAULT_PROTOCOL, Protocol, resolve_protocol
from quantkit.eval.reference_cache import CachedReference
from quantkit.eval.scoring import (
    Scorer,
    batches,
    check_finite,
    check_ids,
    log_prob_chunks,
    model_positions,
    with_prefix,
)
from quantkit.report_types import Report

#: Shares of tokens whose KL lies below `Divergence.kl_quantiles`: 0, 2.5, ..., 97.5, 99, 99.9, 100 %.
QUANTILES = (*(i / 40 for i in range(40)), 0.99, 0.999, 1.0)


@dataclass
class Divergence(Report):
    """Statistics over the scored tokens; standard errors take tokens as independent."""

    tokens: int
    kl_mean: float  # nats
    kl_stderr: float
    kl_median: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    top1: float  # share of tokens for which both models rank the same token first
    top1_stderr: float
    ppl_ratio: float  # candidate / reference
    ppl_ratio_stderr: float  # from the paired differences, so much smaller than either one's error
    reference: Perplexity
    candidate: Perplexity
    rms_dp: float = 0.0  # root mean square of q_t(true token) - p_t(true token), llama.cpp's "RMS Δp"
    rms_dp_stderr: float = 0.0
    kl_quantiles: list[float] = field(default_factory=list)  # at QUANTILES, nats


def divergence(
    reference: Any,
    candidate: Any,
    token_ids: Tensor,
    protocol: str | Protocol = DEFAULT_PROTOCOL,
    *,
    batch: int = 1,
    bos_token_id: int | None = None,
    on_progress: OnProgress | None = None,
    names: tuple[str, str] = ("the reference", "the candidate"),
) -> Divergence:
    """Compare two causal models on `token_ids` (int64 `[T]`); options as in `perplexity`.

    `reference` is a model or a `CachedReference` of the same text and protocol. The models may sit on different
    devices; logits are compared on the reference's. UsageError when their vocabularies differ.
    """
    cached = isinstance(reference, CachedReference)
    ids = token_ids if cached else check_ids(token_ids, reference, names[0])
    ids = check_ids(ids, candidate, names[1])
    limits = [reference.positions if cached else model_positions(reference), model_positions(candidate)]
    protocol, _ = resolve_protocol(protocol, min((n for n in limits if n), default=None), len(ids))
    ids = with_prefix(ids, protocol, bos_token_id)
    total = len(protocol.windows(len(ids)))
    if cached:
        reference.rewind()
    scorers = (reference if cached else Scorer(reference, names[0]), Scorer(candidate, names[1]))
    parts: list[Tensor] = []  # float64 [5, n]: KL, same top-1, losses of both, weight
    done = 0
    for inputs, targets, window in batches(ids, protocol, batch, bos_token_id):
        ours, theirs = (scorer.logits(inputs, window).flatten(0, 1) for scorer in scorers)
        if ours.shape[1] != theirs.shape[1]:
            raise UsageError(
                f"{names[0]} predicts {ours.shape[1]} tokens and {names[1]} {theirs.shape[1]}",
                hint="They are not versions of one model.",
            )
        parts.append(torch.cat([_compare(ours, theirs, targets.flatten()), _row(window.weight, targets)]))
        done += len(inputs)
        if on_progress is not None:
            on_progress(done, total)
    kl, same, nll, nll_candidate, weights = torch.cat(parts, dim=1)
    for losses, name in ((nll, names[0]), (nll_candidate, names[1])):
        check_finite(losses, name)
    return _summarize(kl, same, nll, nll_candidate, weights, total, protocol, scorers)


def perplexity_of_cached(
    cached: CachedReference, token_ids: Tensor, protocol: Protocol, bos_token_id: int | None
) -> Perplexity:
    """Perplexity of the model whose predictions are cached, without the model."""
    ids = with_prefix(token_ids, protocol, bos_token_id)
    cached.rewind()
    losses, weights = [], []
    for inputs, targets, window in batches(ids, protocol, 1, bos_token_id):
        losses.append(token_losses(cached.logits(inputs, window).flatten(0, 1), targets.flatten()))
        weights.append(torch.full_like(losses[-1], window.weight))
    nll = torch.cat(losses)
    check_finite(nll, cached.name)
    return summarize(nll, torch.cat(weights), len(protocol.windows(len(ids))), protocol, cached)


def _row(value: float, like: Tensor) -> Tensor:
    return torch.full((1, like.numel()), value, dtype=torch.float64)


def _compare(reference: Tensor, candidate: Tensor, targets: Tensor) -> Tensor:
    """float64 `[4, R]` on the CPU: KL, same top-1, both losses, from logits `[R, V]`."""
    out = torch.empty(4, len(targets), dtype=torch.float64)
    for rows, (logp, logq) in log_prob_chunks(reference, candidate):
        at = targets[rows, None].to(logp.device)
        p = logp.exp()
        out[0, rows] = torch.where(p > 0, p * (logp - logq), 0.0).sum(1).cpu().double()
        out[1, rows] = (logp.argmax(1) == logq.argmax(1)).cpu().double()
        out[2, rows] = -logp.gather(1, at)[:, 0].cpu().double()
        out[3, rows] = -logq.gather(1, at)[:, 0].cpu().double()
    return out


def _summarize(
    kl: Tensor,
    same: Tensor,
    nll: Tensor,
    nll_candidate: Tensor,
    weights: Tensor,
    windows: int,
    protocol: Protocol,
    scorers: tuple[Any, Scorer],
) -> Divergence:
    kl = kl.clamp_min(0.0)  # rounding can leave -1e-17
    mean, error = weighted_mean(kl, torch.ones_like(kl))
    agreement = float(same.mean())
    shift, shift_error = weighted_mean(nll_candidate - nll, weights)
    ratio = math.exp(shift) if shift < 700 else math.inf
    square, square_error = weighted_mean(
        ((-nll_candidate).exp() - (-nll).exp()).square(), torch.ones_like(kl)
    )
    rms = math.sqrt(square)
    ordered = kl.sort().values
    return Divergence(
        tokens=len(kl),
        kl_mean=mean,
        kl_stderr=error,
        kl_median=quantile(ordered, 0.5),
        kl_p99=quantile(ordered, 0.99),
        kl_p999=quantile(ordered, 0.999),
        kl_max=float(ordered[-1]),
        top1=agreement,
        top1_stderr=math.sqrt(agreement * (1 - agreement) / len(kl)),
        ppl_ratio=ratio,
        ppl_ratio_stderr=ratio * shift_error,
        reference=summarize(nll, weights, windows, protocol, scorers[0]),
        candidate=summarize(nll_candidate, weights, windows, protocol, scorers[1]),
        rms_dp=rms,
        rms_dp_stderr=square_error / (2 * rms) if rms > 0 else 0.0,
        kl_quantiles=[quantile(ordered, share) for share in QUANTILES],
    )


def quantile(ordered: Tensor, share: float) -> float:
    """Linearly interpolated quantile of sorted values `[n]` (torch.quantile stops at 16 million)."""
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    below, above = float(ordered[low]), float(ordered[high])
    return below if position == low else below + (above - below) * (position - low)
