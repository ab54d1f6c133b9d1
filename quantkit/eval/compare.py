"""`quantkit.evaluate`: what checkpoints lost against their source, what they gained, and where."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import CheckpointError, QuantkitError, UsageError
from quantkit.eval.checkpoint_facts import fingerprint, new_row, positions, restore_checks, same_vocabulary
from quantkit.eval.checks import run_checks
from quantkit.eval.divergence import divergence, perplexity_of_cached
from quantkit.eval.environment import checkpoint_hash, environment
from quantkit.eval.layer_errors import SourceWeights, advise, layer_errors
from quantkit.eval.perplexity import perplexity
from quantkit.eval.protocols import DEFAULT_PROTOCOL, Protocol, resolve_protocol
from quantkit.eval.reference_cache import (
    CachedReference,
    add_extra,
    cache_directory,
    cache_key,
    key_name,
    open_reference,
    prune,
    record_reference,
)
from quantkit.eval.results import EvalResult, EvalRow
from quantkit.eval.scoring import model_positions
from quantkit.eval.speed import SpeedPlan, measure_speed
from quantkit.eval.text import EvalText, texts_of
from quantkit.eval.watch import watch
from quantkit.memory import release_freed
from quantkit.progress import NullProgress, Progress
from quantkit.report_types import to_plain

__all__ = ["EvalResult", "EvalRow", "evaluate"]

Checkpoint = str | os.PathLike[str]
_FEW = 100  # scored tokens below which a warning says so
CACHE_LIMIT = 20 << 30  # bytes that the caches of all references may take


def evaluate(
    checkpoints: Checkpoint | Sequence[Checkpoint],
    reference: Checkpoint | None = None,
    *,
    data: str | Path = "builtin",
    tokens: int | None = None,
    protocol: str | Protocol = DEFAULT_PROTOCOL,
    window: int | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    batch: int = 1,
    layers: bool = True,
    checks: bool = True,
    tasks: Sequence[str] = (),
    task_path: str | Path | None = None,
    task_limit: int | None = None,
    speed: SpeedPlan | bool | None = None,
    hashes: bool = False,
    cache: str | Path | None = None,
    reference_row: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> EvalResult:
    """Measure `checkpoints` (directories or hub ids, quantized or not) on one text.

    With a `reference` (usually the unquantized source) every checkpoint is also compared with its
    predictions. The reference runs once and is freed; its predictions are kept on disk.

    Parameters
    ----------
    data, tokens: the text ("builtin", "wikitext2", "c4", a file, a dataset id) and at most how much of it
        (default: 16384 tokens of "builtin", all of another).
    protocol, window: "gptq", "hqq", "llama.cpp", "lm-eval" or a `Protocol`; `window` tokens instead of its own.
    device: "auto" takes the accelerator if there is one.
    batch: windows that run at once; logits of one batch are the largest thing in memory besides a model.
    layers: measure every quantized layer's output error (needs the reference). checks: passkey, copying and
        arithmetic. tasks, task_path, task_limit: lm-eval tasks by name (extra "eval"), a directory with
        further task files, and at most so many examples of each.
    speed: measure tokens/s, time to first token and memory; a `SpeedPlan` chooses batches and contexts.
    hashes: sha256 of every checkpoint.
    cache: directory for the reference's predictions; None: `$QUANTKIT_CACHE` or ~/.cache/quantkit, where
        the oldest are removed beyond 20 GB; "none": a temporary one.
    reference_row: False leaves out the reference's own row, with its checks, tasks and speed.

    UsageError, CalibrationError or CheckpointError say what does not fit before any model runs.
    """
    if isinstance(checkpoints, str | os.PathLike):
        checkpoints = [checkpoints]
    paths = list(dict.fromkeys(os.fspath(path) for path in checkpoints))
    against = None if reference is None else os.fspath(reference)
    if not paths:
        raise UsageError("there is no checkpoint to evaluate", hint="Give at least one.")
    if batch < 1:
        raise UsageError(f"batch must be at least 1, not {batch}", hint="Leave it out.")
    plan = SpeedPlan() if speed is True else (speed or None)
    from quantkit.convert import pick_device

    where = str(pick_device(str(device)))
    if tasks:
        from quantkit.eval.tasks import check_tasks

        check_tasks(tasks, task_path)
    run = _Run(
        data,
        tokens,
        protocol,
        window,
        where,
        dtype,
        batch,
        layers,
        checks,
        list(tasks),
        task_path,
        task_limit,
        plan,
        hashes,
        cache,
        reference_row,
        trust_remote_code,
        progress or NullProgress(),
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
    window: int | None
    device: str
    dtype: torch.dtype | str | None
    batch: int
    layers: bool
    checks: bool
    tasks: list[str]
    task_path: str | Path | None
    task_limit: int | None
    speed: SpeedPlan | None
    hashes: bool
    cache: str | Path | None
    reference_row: bool
    trust_remote_code: bool
    progress: Progress
    warnings: list[str] = field(default_factory=list)

    def evaluate(self, paths: list[str], against: str | None) -> EvalResult:
        from quantkit.inspect import inspect

        facts = {path: inspect(path) for path in dict.fromkeys([*paths, *([against] if against else [])])}
        if against is not None:
            same_vocabulary(paths, against)
        self.progress.stage("reading text")
        base = against or paths[0]
        texts, remarks = texts_of(
            self.data, self.tokens, base, paths, against is not None, self.trust_remote_code
        )
        self.warnings += remarks
        candidates = [path for path in paths if path != against]
        limits = [n for path in ([against] if against else paths[:1]) if (n := positions(path))]
        protocol, remark = resolve_protocol(
            self.protocol, min(limits, default=None), len(texts[base].ids), self.window
        )
        protocol.windows(len(texts[base].ids) + protocol.prefix)  # is the text long enough?
        if remark:
            self.warnings.append(f"protocol {protocol.name}: {remark}, so compare only within this table")
        if protocol.prefix and texts[base].prefix_token_id is None:
            self.warnings.append("the tokenizer has neither BOS nor EOS: the first token is not scored")
        result = EvalResult(
            texts[base].source, protocol.describe(), len(texts[base].ids), self.device, against
        )
        result.environment = environment(self.device)
        result.date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        with contextlib.ExitStack() as stack:
            cached = None
            if against is not None:
                folder = stack.enter_context(self._cache_folder())
                row, cached = self._reference(against, facts[against], texts[against], protocol, folder)
                if self.reference_row or not candidates:
                    result.rows.append(row)
                if not candidates:
                    row.perplexity = self._named(
                        perplexity_of_cached(
                            cached, texts[base].ids, protocol, self._bos(texts[base], protocol)
                        ),
                        texts[base],
                        protocol,
                    )
            for path in candidates:
                if facts[path].format is None and against is not None:
                    self.warnings.append(f"{path} is not quantized")
                row = self._candidate(path, facts[path], texts[path], protocol, cached, against)
                result.rows.append(row)
                first = len(result.rows) == 2 and result.rows[0].is_reference
                if first and row.divergence is not None:
                    result.rows[0].perplexity = self._named(row.divergence.reference, texts[base], protocol)
        result.warnings.extend(dict.fromkeys(self.warnings))
        return result

    # -- the text ---------------------------------------------------------------------------------

    @staticmethod
    def _bos(text: EvalText, protocol: Protocol) -> int | None:
        return text.prefix_token_id if protocol.prefix else text.bos_token_id

    def _named(self, found: Any, text: EvalText, protocol: Protocol) -> Any:
        """Perplexity with lm-eval's figures where its protocol was asked for; a warning where it says little."""
        if protocol.prefix:
            found.per_text(text.words, text.utf8_bytes)
        if found.tokens < _FEW:
            self.warnings.append(f"only {found.tokens} tokens were scored: too few to judge by")
        return found

    # -- models -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _model(self, path: str) -> Iterator[tuple[Any, float]]:
        """(model, seconds to load it); freed at the end."""
        from quantkit.load import load

        self.progress.stage(f"loading {path}")
        began = time.perf_counter()
        model = load(path, device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
        if torch.device(self.device).type != "cpu":
            torch.accelerator.synchronize()
        try:
            yield model, time.perf_counter() - began
        finally:
            del model
            gc.collect()
            release_freed()

    @contextlib.contextmanager
    def _cache_folder(self) -> Iterator[Path]:
        if self.cache == "none":
            made = Path(tempfile.mkdtemp(prefix="quantkit-eval-"))
            try:
                yield made
            finally:
                shutil.rmtree(made, ignore_errors=True)
        else:
            yield (Path(self.cache) if self.cache else cache_directory() / "reference")

    def _reference(
        self, path: str, facts: Any, text: EvalText, protocol: Protocol, folder: Path
    ) -> tuple[EvalRow, CachedReference]:
        """The reference's row, its perplexity still missing, and its predictions, cached ones if they fit."""
        bos = self._bos(text, protocol)
        key = cache_key(
            fingerprint(path),
            text.ids,
            protocol,
            bos,
            dtype=self.dtype,
            device=torch.device(self.device).type,
        )
        place = folder / key_name(key)
        cached: CachedReference | None = None
        try:
            cached = open_reference(place, key, self.device)
        except CheckpointError as error:
            self.warnings.append(f"cached predictions are made again: {error.what}")
        row = new_row(path, facts, None, is_reference=True)
        wanted = self.checks and "checks" not in (cached.extra if cached else {})
        wanted = self.reference_row and (wanted or bool(self.speed) or bool(self.tasks))
        if cached is None or wanted:
            with self._model(path) as (model, seconds):
                row.load_seconds = seconds
                if cached is None:
                    cached = record_reference(
                        model,
                        text.ids,
                        protocol,
                        place,
                        key,
                        batch=self.batch,
                        bos_token_id=bos,
                        name=path,
                        on_progress=watch(self.progress, f"running {path} once"),
                    )
                if wanted:
                    self._extras(model, path, row)
                if wanted and self.checks:
                    add_extra(cached, checks=to_plain(row.checks))
            prune(folder, place, CACHE_LIMIT)
        elif self.checks and "checks" in cached.extra:
            row.checks = restore_checks(cached.extra["checks"])
        if self.hashes:
            row.sha256 = checkpoint_hash(path)
        return row, cached

    def _candidate(
        self,
        path: str,
        facts: Any,
        text: EvalText,
        protocol: Protocol,
        cached: CachedReference | None,
        against: str | None,
    ) -> EvalRow:
        bos = self._bos(text, protocol)
        with self._model(path) as (model, seconds):
            row = new_row(path, facts, seconds)
            limit = model_positions(model)
            if cached is None and limit is not None and limit < protocol.fed:
                protocol, _ = resolve_protocol(self.protocol, limit, len(text.ids), self.window)
                self.warnings.append(f"{path} has {limit} positions: its windows are shorter")
            if cached is None:
                seen = watch(self.progress, f"measuring {path}")
                row.perplexity = perplexity(
                    model, text.ids, protocol, batch=self.batch, bos_token_id=bos, on_progress=seen, name=path
                )
            else:
                row.divergence = divergence(
                    cached,
                    model,
                    text.ids,
                    protocol,
                    batch=self.batch,
                    bos_token_id=bos,
                    on_progress=watch(self.progress, f"comparing {path} with {against}"),
                    names=(str(against), path),
                )
                row.perplexity = row.divergence.candidate
            self._named(row.perplexity, text, protocol)
            if self.layers and against is not None and facts.format is not None:
                self._layers(model, path, against, text, row)
            self._extras(model, path, row)
        if self.hashes:
            row.sha256 = checkpoint_hash(path)
        return row

    def _layers(self, model: Any, path: str, against: str, text: EvalText, row: EvalRow) -> None:
        self.progress.stage(f"layers of {path}")
        try:
            with SourceWeights(against, trust_remote_code=self.trust_remote_code) as source:
                row.layers = layer_errors(model, source, text.ids, layout=row.format)
        except QuantkitError as error:
            self.warnings.append(f"layers of {path} are not compared: {error.what}")
        advise(row.layers, path)

    def _extras(self, model: Any, path: str, row: EvalRow) -> None:
        """Checks, tasks and speed of a loaded model."""
        if not (self.checks or self.tasks or self.speed):
            return
        from quantkit.load import load_tokenizer

        tokenizer = None
        with contextlib.suppress(CheckpointError):
            tokenizer = load_tokenizer(path, trust_remote_code=self.trust_remote_code)
        if tokenizer is None:
            if self.checks or self.tasks:
                self.warnings.append(f"{path} has no tokenizer, so no checks or tasks ran")
        else:
            if self.checks:
                self.progress.stage(f"checks of {path}")
                row.checks = run_checks(model, tokenizer)
            if self.tasks:
                from quantkit.eval.tasks import run_tasks

                self.progress.stage(f"tasks of {path}")
                row.tasks = run_tasks(
                    model,
                    tokenizer,
                    self.tasks,
                    task_path=self.task_path,
                    limit=self.task_limit,
                    batch=self.batch,
                )
        if self.speed:
            self.progress.stage(f"speed of {path}")
            row.speed = measure_speed(model, self.speed, load_seconds=row.load_seconds or 0.0)
