"""The `quantkit` command: thin over the Python API."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code (SystemExit)."""
    from quantkit.cli.app import run

    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


__all__ = ["main"]
