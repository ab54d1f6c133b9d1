"""The result in words: what each checkpoint lost and gained, and which to take.

The words follow from the perplexity ratio r (or, without a reference, are left out):

    r < 1.005  practically lossless      r < 1.02  a small loss      r < 1.1  a noticeable loss
    above      a heavy loss

A checkpoint is on the front when no other is both smaller and closer to the reference.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from quantkit.eval.results import EvalResult, EvalRow

GRADES = ((1.005, "practically lossless"), (1.02, "a small loss"), (1.1, "a noticeable loss"))
WORST = "a heavy loss"


@dataclass(frozen=True)
class Verdict:
    """One sentence on the whole, and one on every candidate (in the rows' order)."""

    headline: str
    details: tuple[str, ...]
    grades: tuple[str, ...]


def display_names(result: EvalResult) -> list[str]:
    """Last components of the checkpoints' paths where these differ, else the whole paths, without
    characters that do not print."""
    from quantkit.untrusted import show

    short = [os.path.basename(os.path.normpath(row.checkpoint)) or row.checkpoint for row in result.rows]
    names = short if len(set(short)) == len(short) else [row.checkpoint for row in result.rows]
    return [show(name, 80) for name in names]


def grade(row: EvalRow) -> str:
    """The word for a candidate's loss; "" without a reference."""
    if row.divergence is None:
        return ""
    for limit, word in GRADES:
        if row.divergence.ppl_ratio < limit:
            return word
    return WORST


def cost(row: EvalRow) -> float:
    """What the front is drawn by: KL where there is one, else perplexity."""
    return row.divergence.kl_mean if row.divergence is not None else row.perplexity.ppl


def front(result: EvalResult) -> list[EvalRow]:
    """The candidates that no other beats in both size and quality, smallest first."""
    rows = result.candidates
    kept = [
        row
        for row in rows
        if not any(
            other.size <= row.size
            and cost(other) <= cost(row)
            and (other.size, cost(other)) != (row.size, cost(row))
            for other in rows
        )
    ]
    return sorted(kept, key=lambda row: row.size)


def judge(result: EvalResult) -> Verdict:
    """The verdict on an evaluation."""
    names = {id(row): name for row, name in zip(result.rows, display_names(result), strict=True)}
    reference = next((row for row in result.rows if row.is_reference), None)
    details = tuple(_detail(row, reference) for row in result.candidates)
    grades = tuple(grade(row) for row in result.candidates)
    if not result.candidates:
        return Verdict("Only the reference was measured.", details, grades)
    best = front(result)
    closest = min(result.candidates, key=cost)
    if reference is None:
        head = f"{names[id(closest)]} has the lowest perplexity, {closest.perplexity.ppl:.4g}."
        return Verdict(head, details, grades)
    good = [row for row in best if row.divergence is not None and row.divergence.ppl_ratio < GRADES[1][0]]
    if len(result.candidates) == 1:
        head = f"{names[id(closest)]}: {grades[0]} at {_share(closest, reference)} of the size."
    elif good:
        smallest = good[0]
        head = f"{names[id(smallest)]} is the smallest with at most a small loss"
        head += f" ({_share(smallest, reference)} of the size, perplexity {_percent(smallest)})"
        if closest is not smallest:
            head += f"; {names[id(closest)]} stays closest to the original ({_percent(closest)})"
        head += "."
    else:
        head = f"Every checkpoint loses noticeably; {names[id(closest)]} stays closest to the original"
        head += f" ({_percent(closest)})."
    return Verdict(head, details, grades)


def _share(row: EvalRow, reference: EvalRow) -> str:
    return f"{100 * row.size / max(reference.size, 1):.0f} %"


def _percent(row: EvalRow) -> str:
    assert row.divergence is not None
    change = 100 * (row.divergence.ppl_ratio - 1)
    return f"{change:+.2g} %" if abs(change) >= 0.005 else "unchanged"


def _detail(row: EvalRow, reference: EvalRow | None) -> str:
    if row.divergence is None or reference is None:
        return f"perplexity {row.perplexity.ppl:.4g} at {row.bits_per_weight:.2f} bits per weight"
    found = row.divergence
    parts = [
        f"{_share(row, reference)} of the size at {row.bits_per_weight:.2f} bits per weight",
        f"perplexity {_percent(row)}",
        f"the likeliest token is the same for {100 * found.top1:.1f} % of tokens",
    ]
    drops = [
        f"{check.name} {100 * base.accuracy:.0f} → {100 * check.accuracy:.0f} %"
        for check in row.checks
        for base in reference.checks
        if base.name == check.name
        and base.accuracy - check.accuracy > 2 * max(base.stderr, check.stderr, 0.02)
    ]
    if drops:
        parts.append("lost on " + ", ".join(drops))
    if row.speed is not None and reference.speed is not None:
        ours = max((p for p in row.speed.points if p.phase == "decode"), key=lambda p: -p.batch, default=None)
        theirs = ours and reference.speed.find("decode", ours.batch, ours.context)
        if ours and theirs:
            parts.append(
                f"decodes at {ours.tokens_per_second / theirs.tokens_per_second:.2f}× the original's speed"
            )
    return "; ".join(parts)
