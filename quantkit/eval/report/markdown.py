"""report.md: the same as the page, for a repository or a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence

from quantkit.eval.report import FIGURES
from quantkit.eval.report.page import describe
from quantkit.eval.report.plots import Figure
from quantkit.eval.report.tables import Table
from quantkit.eval.results import EvalResult


def to_markdown(result: EvalResult, figures: Sequence[Figure], title: str | None = None) -> str:
    """The report as Markdown; the figures are files beside it."""
    found = describe(result, title)
    out = [f"# {escape(found['title'])}", f"**{escape(found['headline'])}**"]
    out.append(
        "\n".join(f"- **{escape(n)}**{f' ({g})' if g else ''}: {escape(d)}" for n, g, d in found["details"])
    )
    facts = [*found["facts"], ("date", found["date"])]
    out.append(" · ".join(f"{key}: {escape(value)}" for key, value in facts))
    out += [_table(found["summary"]), *_figures(figures, "quality")]
    if found["lm_eval"]:
        out.append(_table(found["lm_eval"]))
    if found["worst"]:
        out += ["## Layers", _table(found["worst"]), *_figures(figures, "layers")]
    if found["checks"]:
        out += [
            "## Checks",
            _table(found["checks"]),
            "\n".join(f"- {escape(n)}" for n in found["check_notes"]),
        ]
    if found["tasks"]:
        out += ["## Tasks", _table(found["tasks"])]
    if found["speed"]:
        out += ["## Speed", _table(found["speed"]), *_figures(figures, "speed")]
    out += ["## How it was measured"]
    if found["commands"]:
        out.append("\n".join(f"    {command}" for command in found["commands"]))
    out.append(", ".join(f"{key} {escape(value)}" for key, value in found["environment"]))
    if found["hashes"]:
        out.append(_table(found["hashes"]))
    for key in ("warnings", "notes"):
        if found[key]:
            out += [f"## {key.capitalize()}", "\n".join(f"- {escape(text)}" for text in found[key])]
    return "\n\n".join(part for part in out if part) + "\n"


def escape(text: str) -> str:
    """`text` without meaning for Markdown, tables or HTML."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)


def _table(table: Table) -> str:
    lines = ["| " + " | ".join(escape(h) for h in table.headings) + " |"]
    lines.append(
        "|" + "|".join("---" if i in table.text else "---:" for i in range(len(table.headings))) + "|"
    )
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    value, line, small = text.partition("\n")
    if not line:
        return escape(text)
    return (
        f"{escape(value)} {escape(small)}" if small.startswith("±") else f"{escape(value)} ({escape(small)})"
    )


def _figures(figures: Sequence[Figure], section: str) -> list[str]:
    return [
        f"![{escape(f.title)}]({FIGURES}/{f.id}.svg)\n\n{escape(f'{f.title}. {f.caption}'.strip())}"
        for f in figures
        if f.section == section
    ]
