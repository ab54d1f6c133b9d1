"""`quantkit.evaluate`: perplexity of checkpoints, and how far they are from their source."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import CheckpointError, UsageError
from quantkit.eval.divergence import Divergence, divergence
from quantkit.eval.perplexity import Perplexity, perplexity
from quantkit.eval.protocols import DEFAULT_PROTOCOL, Protocol, resolve_protocol
from quantkit.eval.scoring import model_positions
from quantkit.eval.text import EvalText, load_text
from quantkit.progress import NullProgress, Progress
from quantkit.report_types import Report

Checkpoint = str | os.PathLike[str]


@dataclass
class EvalRow(Report):
    """One checkpoint."""

    checkpoint: str
    format: str | None  # None: not quantized
    bits_per_weight: float  # of the quantized layers; of the whole model when none is quantized
    bits_per_weight_model: float
    size: int  # bytes of all tensors
    perplexity: Perplexity
    divergence: Divergence | None = None  # from the reference
    is_reference: bool = False


@dataclass
class EvalResult(Report):
    """What `quantkit eval` prints; the reference, where there is one, is the first row."""

    data: str
    protocol: str
    tokens: int  # of the text
    device: str
    reference: str | None
    rows: list[EvalRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_text(self) -> str:
        """The table as plain text."""
        from quantkit.eval.table import to_text

        return to_text(self)


def evaluate(
    checkpoints: Checkpoint | Sequence[Checkpoint],
    reference: Checkpoint | None = None,
    *,
    data: str | Path = "builtin",
    tokens: int | None = None,
    protocol: str | Protocol = DEFAULT_PROTOCOL,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    batch: int = 1,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> EvalResult:
    """Measure `checkpoints` (directories or hub ids, quantized or not) on one text.

    With a `reference` (usually the unquantized source) every checkpoint is also compared with its
    predictions, window by window: two models are in memory at once. `tokens` limits the text (default:
    16384 of "builtin", all of another); `protocol` is "gptq", "hqq", "llama.cpp" or a `Protocol`.

    UsageError, CalibrationError or CheckpointError say what does not fit before any model runs.
    """
    if isinstance(checkpoints, str | os.PathLike):
        checkpoints = [checkpoints]
    paths = [os.fspath(path) for path in checkpoints]
    against = None if reference is None else os.fspath(reference)
    if not paths:
        raise UsageError("there is no checkpoint to evaluate", hint="Give at least one.")
    if batch < 1:
        raise UsageError(f"batch must be at least 1, not {batch}", hint="Leave it out.")
    run = _Run(
        data, tokens, protocol, str(device), dtype, batch, trust_remote_code, progress or NullProgress()
    )
    try:
        return run.evaluate(paths, against)
    finally:
        run.progress.finish()


@dataclass
class _Run:
    """The settings of one evaluation, and what it has found so far."""

    data: str | Path
    tokens: int | None
    protocol: str | Protocol
    device: str
    dtype: torch.dtype | str | None
    batch: int
    trust_remote_code: bool
    progress: Progress
    warnings: list[str] = field(default_factory=list)

    def evaluate(self, paths: list[str], against: str | None) -> EvalResult:
        from quantkit.inspect import inspect

        facts = {path: inspect(path) for path in dict.fromkeys([*paths, *([against] if against else [])])}
        self.progress.stage("reading text")
        base = against or paths[0]
        texts = self._texts(base, paths, compared=against is not None)
        protocol, _ = resolve_protocol(self.protocol, _positions(base), len(texts[base].ids))
        protocol.windows(len(texts[base].ids))  # is the text long enough?
        original = None if against is None else self._load(against)
        result = EvalResult(texts[base].source, "", len(texts[base].ids), self.device, against)
        rows: list[EvalRow] = []
        for path in paths:
            if path == against:
                continue
            ppl, kl = self._measure(path, texts[path], original, against)
            rows.append(_row(path, facts[path], ppl, kl))
            if kl is not None and against is not None and len(rows) == 1:
                result.rows.append(_row(against, facts[against], kl.reference, None, is_reference=True))
        if against is not None and not rows:  # the reference alone
            ppl = self._perplexity(original, against, texts[against])
            rows.append(_row(against, facts[against], ppl, None, is_reference=True))
        result.rows.extend(rows)
        result.protocol = rows[0].perplexity.protocol
        result.warnings.extend(dict.fromkeys(self.warnings))
        return result

    def _texts(self, base: str, paths: list[str], compared: bool) -> dict[str, EvalText]:
        """The text as each checkpoint's own tokenizer reads it; one object where they agree."""
        from quantkit.load import load_tokenizer

        own = load_text(
            self.data, load_tokenizer(base, trust_remote_code=self.trust_remote_code), self.tokens
        )
        texts = {base: own}
        for path in paths:
            if path in texts:
                continue
            texts[path] = own
            try:
                tokenizer = load_tokenizer(path, trust_remote_code=self.trust_remote_code)
            except CheckpointError:
                self.warnings.append(f"{path} has no tokenizer: using that of {base}")
                continue
            other = load_text(self.data, tokenizer, self.tokens)
            if not torch.equal(other.ids, own.ids):
                if compared:
                    raise UsageError(
                        f"{path} and {base} tokenize the text differently, so their predictions do not compare",
                        hint="Leave the reference out, or name the model it was made from.",
                    )
                texts[path] = other
                self.warnings.append(
                    f"{path} tokenizes the text differently from {base}: their perplexities are not comparable"
                )
        return texts

    def _load(self, path: str) -> Any:
        from quantkit.load import load

        self.progress.stage(f"loading {path}")
        return load(path, device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code)

    def _measure(
        self, path: str, text: EvalText, original: Any, against: str | None
    ) -> tuple[Perplexity, Divergence | None]:
        """Perplexity of a checkpoint, and its divergence where there is a reference."""
        model = self._load(path)
        try:
            if against is None:
                return self._perplexity(model, path, text), None
            self.progress.stage(f"comparing {path} with {against}")
            self._note_protocol(model, text)
            found = divergence(
                original,
                model,
                text.ids,
                self.protocol,
                batch=self.batch,
                bos_token_id=text.bos_token_id,
                names=(against, path),
            )
            return found.candidate, found
        finally:
            del model
            gc.collect()

    def _perplexity(self, model: Any, path: str, text: EvalText) -> Perplexity:
        self.progress.stage(f"measuring {path}")
        self._note_protocol(model, text)
        return perplexity(
            model, text.ids, self.protocol, batch=self.batch, bos_token_id=text.bos_token_id, name=path
        )

    def _note_protocol(self, model: Any, text: EvalText) -> None:
        protocol, remark = resolve_protocol(self.protocol, model_positions(model), len(text.ids))
        if remark:
            self.warnings.append(f"protocol {protocol.name}: {remark}, so compare only within this table")


def _positions(path: str) -> int | None:
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


def _row(
    path: str, facts: Any, ppl: Perplexity, kl: Divergence | None, is_reference: bool = False
) -> EvalRow:
    bits = facts.bits_per_weight if facts.bits_per_weight is not None else facts.bits_per_weight_model
    return EvalRow(path, facts.format, bits, facts.bits_per_weight_model, facts.size, ppl, kl, is_reference)
