"""Helpers shared by tests (importable as `tests_support`)."""

from __future__ import annotations

import torch
from conftest import CAUSAL, FAMILIES

import quantkit

__all__ = ["CAUSAL", "FAMILIES", "kl", "logits"]


def logits(path, ids):
    """float32 logits `[B, T, V]` of a checkpoint, computed by quantkit."""
    model = quantkit.load(path, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def kl(reference, candidate) -> float:
    """Mean KL divergence per token in nats."""
    p, q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
