"""`quantkit eval`: thin over `quantkit.evaluate`."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import typer


def run_evaluation(
    checkpoints: list[str],
    reference: str | None,
    data: str,
    tokens: int | None,
    protocol: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Evaluate and print a table, or one JSON document."""
    import quantkit

    asked: dict[str, Any] = {"reference": reference, "tokens": tokens, "protocol": protocol}
    with contextlib.redirect_stdout(sys.stderr):
        report = quantkit.evaluate(
            checkpoints, data=data, device=device, **{k: v for k, v in asked.items() if v is not None}
        )
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        typer.echo(report.to_text())
