"""The README's table of formats, from the table in `quantkit.formats`.

    python scripts/format_table.py [--write]

Without `--write` it prints the table; with it, README.md is brought up to date between its markers.
`make check` fails when the two differ.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from quantkit.formats import FORMATS, get_format
from quantkit.formats.base import Needs

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- formats: begin (scripts/format_table.py --write) -->", "<!-- formats: end -->"
_NEEDS = {Needs.NONE: "no", Needs.HESSIAN: "yes", Needs.SMOOTHING: "yes"}


def format_table() -> str:
    """One row per format, in markdown."""
    lines = ["| `--format` | what it is | calibrated | read by |", "|---|---|---|---|"]
    for name in FORMATS:
        fmt = get_format(name)
        calibrated = _NEEDS[fmt.needs(fmt.Config())]
        lines.append(f"| `{name}` | {fmt.summary} | {calibrated} | {', '.join(fmt.loaders)} |")
    return "\n".join(lines)


def updated(text: str) -> str:
    """`text` with the part between the markers replaced."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{format_table()}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="update README.md")
    if parser.parse_args().write:
        README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(format_table())


if __name__ == "__main__":
    main()
