"""Evaluation results made by hand, with every part filled in."""

from __future__ import annotations

import random

from quantkit.eval.divergence import QUANTILES, Divergence
from quantkit.eval.perplexity import Perplexity
from quantkit.eval.results import CheckScore, EvalResult, EvalRow, LayerError, Speed, SpeedPoint, TaskScore

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
HOSTILE = "<script>alert(1)</script>&\"'|`*_$x^2$[a](b) {{1234*4321}}"


def ppl(value: float) -> Perplexity:
    return Perplexity(value, 0.1, 3.0, 1000, 4, "gptq (windows of 256)", 1.0, 1000.0, 3000.0, 90.0, 2.5, 1.3)


def row(name: str, fmt: str | None, kl: float, *, size: int = 5_000_000, layers: int = 4) -> EvalRow:
    draw = random.Random(name)
    found = EvalRow(name, fmt, 4.5, 5.0, size, ppl(20 * (1 + kl)))
    if kl > 0:
        found.divergence = Divergence(
            tokens=1000,
            kl_mean=kl,
            kl_stderr=kl / 50,
            kl_median=kl / 2,
            kl_p99=5 * kl,
            kl_p999=9 * kl,
            kl_max=12 * kl,
            top1=0.9,
            top1_stderr=0.01,
            ppl_ratio=1 + kl,
            ppl_ratio_stderr=0.001,
            reference=ppl(20),
            candidate=found.perplexity,
            rms_dp=0.02,
            rms_dp_stderr=0.001,
            kl_quantiles=[kl * (0.01 + 4 * share**3) for share in QUANTILES],
        )
        found.layers = [
            LayerError(
                f"model.layers.{n}.{kind}",
                n,
                kind,
                4.5,
                kl * draw.uniform(1, 9),
                0.99,
                512,
                [f"--override model.layers.{n}.{kind}:bits=8", f"--skip model.layers.{n}.{kind}"],
            )
            for n in range(layers)
            for kind in KINDS
        ]
    found.is_reference = kl == 0
    found.checks = [CheckScore("passkey", 1.0 if kl < 0.2 else 0.3, 0.05, 0.5, 1.2, 12, "a number is found")]
    found.tasks = [TaskScore("arc_easy", "acc", 0.5, 0.01, 100, "1")]
    points = [
        SpeedPoint(phase, batch, 256, 100.0 * batch, 90.0 * batch, 110.0 * batch, 5, 0.01, 0.3)
        for phase in ("prefill", "decode")
        for batch in (1, 8)
    ]
    found.speed = Speed("cpu", "float32", 2, 0.5, size, 700_000_000, 0.02, 1e10, points)
    found.sha256 = "ab" * 32
    return found


def result(*rows: EvalRow, reference: bool = True) -> EvalResult:
    """The reference (if wanted) and `rows`; two candidates by default."""
    chosen = list(rows) or [row("out/awq", "awq", 0.01), row("out/ternary", "ternary", 0.4, size=3_000_000)]
    if reference:
        chosen.insert(0, row("models/source", None, 0.0, size=14_000_000))
    return EvalResult(
        "builtin",
        "gptq (windows of 256)",
        1000,
        "cpu",
        "models/source" if reference else None,
        chosen,
        ["a <b>warning</b>"],
        {"torch": "2.13.0", "device": "cpu"},
        ["quantkit eval out/awq --reference models/source"],
        "2026-11-24 00:00 UTC",
    )
