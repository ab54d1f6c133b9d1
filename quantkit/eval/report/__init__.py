"""An evaluation as files: report.html (one self-contained page), report.md with figures/, report.json."""

from __future__ import annotations

import json
import os
from pathlib import Path

from quantkit.errors import DestinationError, UsageError
from quantkit.eval.results import EvalResult
from quantkit.staging import new_directory
from quantkit.untrusted import show

FILES = ("report.html", "report.md", "report.json")
FIGURES = "figures"

__all__ = ["check_destination", "write_report"]


def check_destination(directory: str | os.PathLike[str], overwrite: bool = False) -> None:
    """DestinationError unless a report may be written to `directory`: absent, empty, or (with `overwrite`)
    holding a report; UsageError when the plotting library is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "reports are drawn with matplotlib, which is not installed",
            hint="pip install 'quantkit[report]'.",
        ) from None
    path = Path(directory)
    try:
        present = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    except NotADirectoryError:
        raise DestinationError(f"{show(path)} is a file", hint="Name a directory for the report.") from None
    except OSError as error:
        raise DestinationError(f"{show(path)}: {error.strerror}", hint="Name another directory.") from None
    if not present:
        return
    if not set(present) <= {*FILES, FIGURES}:
        other = next(name for name in present if name not in (*FILES, FIGURES))
        raise DestinationError(
            f"{show(path)} exists and holds {show(other)}", hint="Name a new directory for the report."
        )
    if not overwrite:
        raise DestinationError(f"{show(path)} holds a report", hint="Use --overwrite to replace it.")


def write_report(
    result: EvalResult,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    title: str | None = None,
) -> Path:
    """Write the report files for `result` into `directory` and return the path of report.html.

    Everything is rendered before anything is written, and the directory appears or is replaced in one step.
    DestinationError as `check_destination`.
    """
    from quantkit.eval.report.markdown import to_markdown
    from quantkit.eval.report.page import to_html
    from quantkit.eval.report.plots import draw, plain_svg

    path = Path(directory)
    check_destination(path, overwrite)
    figures = draw(result)
    contents = {
        "report.html": to_html(result, figures, title),
        "report.md": to_markdown(result, figures, title),
        "report.json": json.dumps(result.to_json(), indent=1, ensure_ascii=False) + "\n",
    }
    dest = Path(os.path.realpath(path.expanduser()))
    with new_directory(dest, lambda: check_destination(dest, overwrite), kind="report") as folder:
        for name, text in contents.items():
            # half of a surrogate pair, from a hostile name, becomes its escape
            (folder / name).write_bytes(text.encode("utf-8", "backslashreplace"))
        (folder / FIGURES).mkdir()
        for figure in figures:
            (folder / FIGURES / f"{figure.id}.svg").write_text(plain_svg(figure.svg), encoding="utf-8")
    return path / "report.html"
