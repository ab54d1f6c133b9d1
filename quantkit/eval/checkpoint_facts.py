"""What an evaluation knows of a checkpoint without loading its model."""

from __future__ import annotations

from typing import Any

from quantkit.errors import CheckpointError
from quantkit.eval.results import CheckScore, EvalRow, from_plain


def restore_checks(values: Any) -> list[CheckScore]:
    """The check scores that a cache of predictions holds; CheckpointError when they are damaged."""
    try:
        return [from_plain(CheckScore, value) for value in values]
    except (TypeError, ValueError):
        raise CheckpointError("the cached checks are damaged", hint="Delete the cache directory.") from None


def fingerprint(path: str) -> str:
    """The reader's fingerprint of a directory or hub id."""
    from quantkit.checkpoint import CheckpointReader
    from quantkit.hub import resolve_model

    with CheckpointReader(resolve_model(path)) as reader:
        return reader.fingerprint()


def positions(path: str) -> int | None:
    """Positions that config.json gives, before a model is built."""
    from quantkit.checkpoint import CheckpointReader
    from quantkit.hub import resolve_model

    with CheckpointReader(resolve_model(path)) as reader:
        scopes = (reader.config, reader.config.get("text_config"))
    for scope in scopes:
        for key in ("max_position_embeddings", "n_positions"):
            value = scope.get(key) if isinstance(scope, dict) else None
            if isinstance(value, int) and value > 1:
                return value
    return None


def new_row(path: str, facts: Any, seconds: float | None, is_reference: bool = False) -> EvalRow:
    """A row with what `inspect` found; measurements are missing."""
    bits = facts.bits_per_weight if facts.bits_per_weight is not None else facts.bits_per_weight_model
    row = EvalRow(path, facts.format, bits, facts.bits_per_weight_model, facts.size, None)  # type: ignore[arg-type]
    row.options = {k: v for k, v in facts.options.items() if v is not None}
    row.load_seconds, row.is_reference = seconds, is_reference
    return row
