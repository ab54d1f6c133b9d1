"""Tasks of lm-evaluation-harness (extra "eval") on a model that is already loaded.

The model object is handed over, so packed weights stay packed and the harness loads nothing. Its tasks read
their data sets through the `datasets` package: from a hub when online, or from local files that a task file in
`task_path` names.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import CalibrationError, UsageError, did_you_mean
from quantkit.eval.results import TaskScore
from quantkit.eval.scoring import model_positions

_HINT = "pip install 'quantkit[eval]'"


def check_tasks(tasks: Sequence[str], task_path: str | Path | None = None) -> None:
    """UsageError when lm-eval is missing or does not know a task; nothing is downloaded."""
    manager = _manager(task_path)
    known = list(manager.all_tasks)
    for name in tasks:
        if name not in known and not manager.match_tasks([name]):
            close = did_you_mean(name, known)
            hint = close if close.startswith("Did") and len(close) < 200 else close.split(" Known:")[0]
            more = "" if hint.startswith("Did") else " lm-eval ls tasks lists them."
            raise UsageError(
                f"lm-eval has no task {name!r}", hint=(hint if hint.startswith("Did") else "") + more
            )


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_path: str | Path | None = None,
    limit: int | None = None,
    batch: int = 1,
) -> list[TaskScore]:
    """Every metric of `tasks` for a transformers model; `limit` examples of each.

    CalibrationError when a task's data cannot be read (the harness's own message follows).
    """
    manager = _manager(task_path)
    import lm_eval

    with _quiet():
        wrapped = harness_model(model, tokenizer, batch=batch)
        try:
            found = lm_eval.simple_evaluate(
                model=wrapped,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                batch_size=batch,
                log_samples=False,
                bootstrap_iters=1000,
            )
        except Exception as error:
            first = next(iter(str(error).splitlines()), "")
            raise CalibrationError(
                f"lm-eval: {type(error).__name__}: {first}",
                hint="Offline, a task's data must be in local files.",
            ) from error
    return _scores(found or {})


def harness_model(model: Any, tokenizer: Any, *, batch: int = 1, max_length: int | None = None) -> Any:
    """lm-eval's wrapper around a model object."""
    _require()
    from lm_eval.models.huggingface import HFLM

    length = max_length or min(model_positions(model) or 2048, 2048)
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch,
        max_length=length,
        device=str(model.get_input_embeddings().weight.device),
    )


def _scores(found: dict[str, Any]) -> list[TaskScore]:
    out = []
    samples = found.get("n-samples", {})
    versions = found.get("versions", {})
    for task, metrics in found.get("results", {}).items():
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            out.append(
                TaskScore(
                    task,
                    metric if filtered == "none" else f"{metric} ({filtered})",
                    float(value),
                    float(error) if isinstance(error, int | float) else None,
                    samples.get(task, {}).get("effective"),
                    str(versions.get(task, "")),
                )
            )
    return out


def _manager(task_path: str | Path | None) -> Any:
    _require()
    if task_path is not None and not Path(task_path).is_dir():
        raise UsageError(f"{task_path} is no directory with lm-eval task files")
    return _read_tasks(None if task_path is None else os.fspath(task_path))


@functools.lru_cache(maxsize=1)  # reading the harness's thousands of task files takes seconds
def _read_tasks(task_path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task_path)


def _require() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UsageError("tasks are run by lm-eval, which is not installed", hint=_HINT) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness logs and draws bars on its own; our progress says enough."""
    before = logging.root.manager.disable
    bars = os.environ.get("TQDM_DISABLE")
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        logging.disable(before)
        if bars is None:
            os.environ.pop("TQDM_DISABLE", None)
        else:
            os.environ["TQDM_DISABLE"] = bars
