"""report.html: one page without any outside resource, from a Jinja2 template that escapes everything.

Names come from checkpoints and paths, so nothing is marked safe but the figures, whose text matplotlib escapes.
A Content-Security-Policy in the page forbids scripts and loading anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from quantkit.eval.report import tables
from quantkit.eval.report.plots import Figure
from quantkit.eval.report.verdict import GRADES, WORST, display_names, judge
from quantkit.eval.results import EvalResult
from quantkit.untrusted import show


def to_html(result: EvalResult, figures: Sequence[Figure], title: str | None = None) -> str:
    """The whole page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    package = files("quantkit.eval.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((package / "template.html.j2").read_text(encoding="utf-8"))
    context = describe(result, title)
    context["style"] = Markup((package / "style.css").read_text(encoding="utf-8"))
    for section in ("quality", "layers", "speed"):
        context[f"{section}_figures"] = [
            {"id": f.id, "title": f.title, "caption": f.caption, "svg": Markup(f.svg)}
            for f in figures
            if f.section == section
        ]
    return template.render(**context)


def describe(result: EvalResult, title: str | None = None) -> dict[str, Any]:
    """What both HTML and Markdown say, as plain text."""
    verdict = judge(result)
    names = display_names(result)
    candidates = [name for name, row in zip(names, result.rows, strict=True) if not row.is_reference]
    limits = [f"{word} below a ratio of {limit:g}" for limit, word in GRADES]
    return {
        "title": show(title or _title(result)),
        "headline": verdict.headline,
        "details": list(zip(candidates, verdict.grades, verdict.details, strict=True)),
        "grading": f"By the perplexity ratio: {', '.join(limits)}, {WORST} above.",
        "facts": [
            ("text", f"{show(result.data)}, {result.tokens:,} tokens"),
            ("protocol", result.protocol),
            ("reference", show(result.reference or "none")),
            ("device", result.environment.get("device", result.device)),
        ],
        "date": result.date,
        "summary": tables.summary(result),
        "lm_eval": tables.lm_eval(result),
        "worst": tables.worst_layers(result),
        "checks": tables.checks(result),
        "check_notes": tables.check_notes(result),
        "tasks": tables.tasks(result),
        "speed": tables.speed(result),
        "hashes": tables.hashes(result),
        "environment": sorted(result.environment.items()),
        "commands": [show(command, 2000) for command in result.commands],
        "warnings": [show(warning, 500) for warning in result.warnings],
        "notes": [
            f"{name}: {show(row.note, 500)}" for name, row in zip(names, result.rows, strict=True) if row.note
        ],
    }


def _title(result: EvalResult) -> str:
    if result.reference:
        return f"{display_names(result)[0]}, quantized"
    return "Evaluation"
