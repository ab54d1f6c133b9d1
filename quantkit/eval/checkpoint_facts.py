"""What an evaluation knows of a checkpoint without loading its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantkit.errors import CheckpointError, UsageError
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


def _vocabulary(path: str) -> int | None:
    """Rows of logits that config.json promises; None when it does not say."""
    from quantkit.checkpoint import CheckpointReader
    from quantkit.hub import resolve_model

    with CheckpointReader(resolve_model(path)) as reader:
        scopes = (reader.config, reader.config.get("text_config"))
    found = (scope.get("vocab_size") for scope in scopes if isinstance(scope, dict))
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool)), None)


def same_vocabulary(paths: Sequence[str], against: str) -> None:
    """UsageError when a configuration says that its predictions cannot be compared with the reference's; what
    configurations do not say, the logits show later."""
    wanted = _vocabulary(against)
    for path in paths:
        found = _vocabulary(path)
        if found is not None and wanted is not None and found != wanted:
            raise UsageError(
                f"{path} has a vocabulary of {found}, {against} one of {wanted}, so their predictions do not compare",
                hint="Leave the reference out, or name the model it was made from.",
            )


def new_row(path: str, facts: Any, seconds: float | None, is_reference: bool = False) -> EvalRow:
    """A row with what `inspect` found; measurements are missing."""
    bits = facts.bits_per_weight if facts.bits_per_weight is not None else facts.bits_per_weight_model
    row = EvalRow(path, facts.format, bits, facts.bits_per_weight_model, facts.size, None)  # type: ignore[arg-type]
    row.options = {k: v for k, v in facts.options.items() if v is not None}
    row.load_seconds, row.is_reference = seconds, is_reference
    return row
