"""Helpers shared by tests (importable as `tests_support`)."""

from __future__ import annotations

import torch
from conftest import CAUSAL, FAMILIES

import quantkit

__all__ = ["CAUSAL", "FAMILIES", "bitsandbytes_reads_straddling_blocks", "kl", "logits"]


def logits(path, ids):
    """float32 logits `[B, T, V]` of a checkpoint, computed by quantkit."""
    model = quantkit.load(path, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def kl(reference, candidate) -> float:
    """Mean KL divergence per token in nats."""
    p, q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def bitsandbytes_reads_straddling_blocks() -> bool:
    """Does bitsandbytes undo its own quantization where a block of 64 spans two rows?

    0.50.2 does not on CPUs with AVX512 (relative error 0.24 instead of 0.09 at 96 inputs); on others it does.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, 96)
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return bool((dequantize_4bit(codes, state) - weight).norm() < 0.15 * weight.norm())
