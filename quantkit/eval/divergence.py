"""KL(reference || candidate): how far a quantized model's predictions are from the original's.

    KL_t = sum_v p_t(v) * (log p_t(v) - log q_t(v))      for every scored token t, in nats

Unlike a difference of perplexities it is zero only for equal predictions and cannot cancel between
tokens. Both models see the same windows, side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UsageError
from quantkit.eval.perplexity import OnProgress, Perplexity, summarize, weighted_mean
from quantkit.eval.protocols import DEFAULT_PROTOCOL, Protocol, resolve_protocol
from quantkit.eval.scoring import Scorer, batches, check_finite, check_ids, log_prob_chunks, model_positions
from quantkit.report_types import Report


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

    The models may sit on different devices; logits are compared on the reference's. UsageError when
    their vocabularies differ.
    """
    ids = check_ids(check_ids(token_ids, reference, names[0]), candidate, names[1])
    limits = [n for n in (model_positions(reference), model_positions(candidate)) if n]
    protocol, _ = resolve_protocol(protocol, min(limits, default=None), len(ids))
    total = len(protocol.windows(len(ids)))
    scorers = (Scorer(reference, names[0]), Scorer(candidate, names[1]))
    parts: list[Tensor] = []  # float64 [5, n]: KL, same top-1, losses of both, weight
    done = 0
    for inputs, targets, window in batches(ids, protocol, batch, bos_token_id):
        ours, theirs = (scorer.logits(inputs, window.first).flatten(0, 1) for scorer in scorers)
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
    scorers: tuple[Scorer, Scorer],
) -> Divergence:
    kl = kl.clamp_min(0.0)  # rounding can leave -1e-17
    mean, error = weighted_mean(kl, torch.ones_like(kl))
    agreement = float(same.mean())
    shift, shift_error = weighted_mean(nll_candidate - nll, weights)
    ratio = math.exp(shift) if shift < 700 else math.inf
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
    )


def quantile(ordered: Tensor, share: float) -> float:
    """Linearly interpolated quantile of sorted values `[n]` (torch.quantile stops at 16 million)."""
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    below, above = float(ordered[low]), float(ordered[high])
    return below if position == low else below + (above - below) * (position - low)
