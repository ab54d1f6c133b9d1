"""Limits that fail a run: so that somebody's continuous integration can guard a model's quality."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantkit.errors import QuantkitError, UsageError
from quantkit.eval.results import EvalResult


class GateError(QuantkitError):
    """A checkpoint is worse than a limit allows."""

    exit_code = 1


@dataclass(frozen=True)
class Gates:
    """Limits on every candidate against the reference; None asks nothing."""

    max_ppl_ratio: float | None = None  # perplexity / reference's perplexity
    max_kl: float | None = None  # mean KL in nats per token

    def check_request(self, reference: str | None) -> None:
        """UsageError for limits that cannot be met or measured."""
        for name, limit in (("--max-ppl-ratio", self.max_ppl_ratio), ("--max-kl", self.max_kl)):
            if limit is None:
                continue
            if not (math.isfinite(limit) and limit > 0):
                raise UsageError(f"{name} {limit} is no limit", hint="Give a positive number.")
            if reference is None:
                raise UsageError(f"{name} compares with a reference", hint="Name one with --reference.")

    def failures(self, result: EvalResult) -> list[str]:
        """What breaks a limit, one line each; the comparison is with the measured value, not its error."""
        out = []
        for row in result.candidates:
            found = row.divergence
            if found is None:
                continue
            if self.max_ppl_ratio is not None and not found.ppl_ratio <= self.max_ppl_ratio:
                out.append(
                    f"{row.checkpoint}: perplexity ratio {found.ppl_ratio:.5g} > {self.max_ppl_ratio:g}"
                )
            if self.max_kl is not None and not found.kl_mean <= self.max_kl:
                out.append(f"{row.checkpoint}: KL {found.kl_mean:.5g} > {self.max_kl:g} nats")
        return out

    def enforce(self, result: EvalResult) -> None:
        """GateError naming every limit that is broken."""
        broken = self.failures(result)
        if broken:
            raise GateError("; ".join(broken))
