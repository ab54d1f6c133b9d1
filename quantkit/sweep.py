"""`quantkit.sweep`: one model in many settings, converted, evaluated, and compared in one report.

    OUT/<setting>/          the checkpoint
    OUT/<setting>.json      its evaluation, with what it was measured with
    OUT/report/             report.html, report.md, report.json

A setting whose checkpoint and evaluation are there, made from the same source with the same options, is not done
again; an interrupted conversion goes on where it stopped. With several workers every one takes whole settings:
`jobs` processes of this machine, or the processes that torchrun started.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError, DestinationError, QuantkitError, UsageError
from quantkit.formats import get_format
from quantkit.options import build_config, collect_options, parse_assignments
from quantkit.progress import NullProgress, Progress
from quantkit.staging import disk_errors, write_durably
from quantkit.untrusted import plain_file, read_json

_VERSION = 1
_NAME = re.compile(r"[^A-Za-z0-9.=-]+")


@dataclass(frozen=True)
class Setting:
    """A format with options; `name` is its directory."""

    name: str
    format: str
    options: dict[str, Any] = field(hash=False)


@dataclass(frozen=True)
class _Job:
    """Everything a worker needs for one setting (it may be another process)."""

    source: str
    out: str
    setting: Setting
    convert: dict[str, Any]
    evaluate: dict[str, Any]
    key: str


class SweepError(QuantkitError):
    """Some settings failed; the others are done and in the report."""


def parse_setting(text: str) -> Setting:
    """ "gptq:3:g64:asym", "hqq:4:g64", "nf4", "nf4:double_quant=false" -> a Setting.

    After the format: a number is `bits`, gN the group size, sym and asym symmetry, KEY=VALUE any option.
    UsageError for what the format does not have.
    """
    head, *parts = [part.strip() for part in text.strip().split(":")]
    fmt = get_format(head)
    flags: dict[str, Any] = {}
    rest: list[str] = []
    for part in parts:
        if re.fullmatch(r"\d+", part):
            _once(flags, "bits", int(part), text)
        elif re.fullmatch(r"g-?\d+", part):
            _once(flags, "group_size", int(part[1:]), text)
        elif part in ("sym", "asym"):
            _once(flags, "sym", part == "sym", text)
        elif "=" in part:
            rest.append(part)
        else:
            raise UsageError(
                f"setting {text!r}: {part!r} is not understood",
                hint="Write FORMAT[:BITS][:gN][:asym][:KEY=VALUE].",
            )
    options = collect_options(fmt, **flags, settings=parse_assignments(rest, f"setting {text!r}:"))
    build_config(fmt, options, f"setting {text!r}: ")
    name = _NAME.sub("_", "-".join([fmt.name, *parts]).replace("/", "_")).strip("._")
    return Setting(name, fmt.name, options)


def _once(flags: dict[str, Any], key: str, value: Any, text: str) -> None:
    if key in flags:
        raise UsageError(f"setting {text!r} gives {key} twice")
    flags[key] = value


def parse_settings(text: str) -> list[Setting]:
    """A comma-separated list of settings; UsageError when two are the same."""
    found = [parse_setting(part) for part in text.split(",") if part.strip()]
    if not found:
        raise UsageError("there is no setting to try", hint="Example: --formats awq:4,gptq:3,hqq:4:g64,nf4.")
    names = [setting.name for setting in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"setting {twice!r} appears twice")
    return found


def sweep(
    source: str | os.PathLike[str],
    formats: str | Sequence[str | Setting],
    out: str | os.PathLike[str],
    *,
    jobs: int = 1,
    convert: Mapping[str, Any] | None = None,
    report: str | os.PathLike[str] | None = None,
    commands: Sequence[str] = (),
    progress: Progress | None = None,
    **evaluate: Any,
) -> Any:
    """Convert `source` into every setting below `out`, evaluate all, write a report.

    Parameters
    ----------
    formats: settings as text (see `parse_setting`), comma-separated or a sequence.
    jobs: processes that work at the same time; with accelerators each takes the next one. Under torchrun its
        processes share the settings instead, and rank 0 writes the report.
    convert: further arguments of `quantkit.convert` (calibration, samples, seqlen, seed, skip, ...).
    report: directory of the report; default `out`/report. evaluate: further arguments of `quantkit.evaluate`.

    Returns the EvalResult of all settings that worked (None on torchrun's other ranks); SweepError after the
    report is written when some did not. UsageError and DestinationError come before any work.
    """
    settings = (
        parse_settings(formats)
        if isinstance(formats, str)
        else [s if isinstance(s, Setting) else parse_setting(s) for s in formats]
    )
    folder = Path(out)
    if jobs < 1:
        raise UsageError(f"{jobs} jobs do nothing", hint="Ask for at least 1.")
    if evaluate.get("speed") and jobs > max(1, _accelerators()):
        raise UsageError("several jobs on one device would disturb each other's speed", hint="Use --jobs 1.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DestinationError(f"{folder}: {error.strerror}", hint="Name another directory.") from None
    made = _jobs(os.fspath(source), folder, settings, dict(convert or {}), evaluate)
    progress = progress or NullProgress()
    with _ranks() as (rank, world):
        before = [job.setting.name for job in made if read_row(Path(f"{job.out}.json"), job.key) is not None]
        if rank == 0:
            reference = _reference(os.fspath(source), evaluate, progress)
        _barrier(world)
        failed = _run(made[rank::world], jobs if world == 1 else 1, rank if world > 1 else None, progress)
        failed = _gather(failed, world)
        if rank != 0:
            return None
    if before and evaluate.get("speed"):
        reference.warnings.append(
            f"the speed of {', '.join(before)} was measured in an earlier run than the original's"
        )
    return _finish(reference, made, failed, Path(report) if report else folder / "report", commands)


def _jobs(
    source: str, folder: Path, settings: list[Setting], convert: dict[str, Any], evaluate: dict[str, Any]
) -> list[_Job]:
    from quantkit.checkpoint import CheckpointReader
    from quantkit.hub import resolve_model
    from quantkit.report_types import to_plain

    with CheckpointReader(resolve_model(source)) as reader:
        fingerprint = reader.fingerprint()
    measured = {key: value for key, value in evaluate.items() if key not in ("batch", "cache", "device")}
    jobs = []
    for setting in settings:
        facts = {
            "version": _VERSION,
            "source": fingerprint,
            "format": setting.format,
            "options": setting.options,
            "convert": to_plain({k: v for k, v in convert.items() if k != "device"}),
            "evaluate": to_plain(measured),
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        jobs.append(_Job(source, str(folder / setting.name), setting, convert, evaluate, key))
    return jobs


def _reference(source: str, evaluate: dict[str, Any], progress: Progress) -> Any:
    """The source's own row; its predictions are cached for all settings."""
    import quantkit

    return quantkit.evaluate([source], source, progress=progress, **{**evaluate, "hashes": True})


def _run(jobs: list[_Job], count: int, rank: int | None, progress: Progress) -> dict[str, str]:
    """Do the jobs; returns what failed: name -> why."""
    failed: dict[str, str] = {}
    if count == 1 or len(jobs) < 2:
        for job in jobs:
            try:
                _one(job, 0 if rank is None else rank, 1, progress)
            except QuantkitError as error:
                failed[job.setting.name] = str(error)
        return failed
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(count):
        numbers.put(number)
    with concurrent.futures.ProcessPoolExecutor(
        count, mp_context=context, initializer=_take_number, initargs=(numbers,)
    ) as pool:
        running = {pool.submit(_in_pool, job, count): job for job in jobs}
        for done in concurrent.futures.as_completed(running):
            name = running[done].setting.name
            try:
                done.result()
            except QuantkitError as error:
                failed[name] = str(error)
            except concurrent.futures.process.BrokenProcessPool:
                failed[name] = "its process died (out of memory?)"
            progress.stage(f"{name}: {'failed' if name in failed else 'done'}")
    return failed


_worker = 0  # of this process among the pool's


def _take_number(numbers: Any) -> None:
    """A process keeps its number, and so its device: two settings never meet on one."""
    global _worker
    _worker = numbers.get()


def _in_pool(job: _Job, workers: int) -> None:
    _one(job, _worker, workers, None)


def _one(job: _Job, worker: int, workers: int, progress: Progress | None) -> None:
    """Convert and evaluate one setting, unless that is done."""
    import torch

    import quantkit

    progress = progress or NullProgress()
    out, stored = Path(job.out), Path(f"{job.out}.json")
    if read_row(stored, job.key) is not None and (out / "config.json").is_file():
        progress.stage(f"{job.setting.name}: done before")
        return
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    device = _device(worker)
    converting = {"device": device or "auto", **job.convert}
    convert_once(job.source, out, job.setting, converting, progress)
    settings = dict(job.evaluate)
    if device is not None:
        settings.setdefault("device", device)
    settings["hashes"] = True
    result = quantkit.evaluate([job.out], job.source, reference_row=False, progress=progress, **settings)
    document = {"key": job.key, "warnings": result.warnings, "row": result.rows[0].to_json()}
    with disk_errors(stored):
        write_durably(stored, json.dumps(document, indent=1).encode("utf-8", "backslashreplace"))


def convert_once(
    source: str, out: Path, setting: Setting, arguments: Mapping[str, Any], progress: Progress
) -> None:
    """The checkpoint of a setting at `out`: kept when it is the one wanted, else made (or made anew), going on
    with what an interrupted run left."""
    import quantkit
    from quantkit.checkpoint import CheckpointReader
    from quantkit.hub import resolve_model

    with CheckpointReader(resolve_model(source)) as reader:
        facts: list[Any] = [reader.fingerprint(), setting.format, setting.options]
    facts.append(sorted((key, str(value)) for key, value in arguments.items() if key != "device"))
    mark, wanted = out.with_name(f".{out.name}.sweep"), hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    same = _read_mark(mark) == wanted
    if same and (out / "config.json").is_file():
        return
    settings = {**arguments, "format": setting.format, "options": setting.options, "progress": progress}
    if same:
        with contextlib.suppress(DestinationError):  # the device or a version has changed: start again
            quantkit.convert(source, out, resume=True, overwrite=True, **settings)
            return
    with disk_errors(mark):
        write_durably(mark, wanted.encode())  # before: an interrupted conversion can then be resumed
    try:
        quantkit.convert(source, out, overwrite=True, **settings)
    except QuantkitError:
        mark.unlink(missing_ok=True)
        raise


def _read_mark(mark: Path) -> str:
    """The hash of what a conversion was made from; "" for anything else under that name."""
    try:
        if plain_file(mark, mark.parent.resolve()).st_size > 200:
            return ""
        return mark.read_text(encoding="utf-8", errors="replace")
    except (CheckpointError, OSError):
        return ""


def _accelerators() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _device(worker: int) -> str | None:
    """The accelerator of a worker; None where there is none."""
    import torch

    if not torch.accelerator.is_available():
        return None
    kind = torch.accelerator.current_accelerator()
    return None if kind is None else f"{kind.type}:{worker % max(torch.accelerator.device_count(), 1)}"


def read_row(path: Path, key: str) -> Any:
    """The stored evaluation at `path` (an EvalRow); None when there is none for `key`."""
    from quantkit.eval.results import EvalRow, from_plain

    if not path.is_file():
        return None
    try:
        document = read_json(path, path.parent.resolve())
        if not isinstance(document, dict) or document.get("key") != key:
            return None
        return from_plain(EvalRow, document["row"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None


def _warnings(path: Path) -> list[str]:
    """What the evaluation stored at `path` warned of."""
    found = read_json(path, path.parent.resolve()).get("warnings")
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def _finish(
    reference: Any, jobs: list[_Job], failed: dict[str, str], report: Path, commands: Sequence[str]
) -> Any:
    from quantkit.eval.report import write_report

    result = reference
    result.commands = list(commands)
    for job in jobs:
        row = read_row(Path(f"{job.out}.json"), job.key)
        if row is not None and job.setting.name not in failed:
            result.rows.append(row)
            result.warnings += [
                text for text in _warnings(Path(f"{job.out}.json")) if text not in result.warnings
            ]
    for name, why in failed.items():
        result.warnings.append(f"{name} failed: {why}")
    write_report(result, report, overwrite=True)
    if failed:
        name, why = next(iter(failed.items()))
        more = f" (and {len(failed) - 1} more settings failed)" if failed.keys() - {name} else ""
        raise SweepError(f"{name}: {why}{more}", hint=f"The others are in {report / 'report.html'}.")
    return result


# -- torchrun -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _ranks() -> Iterator[tuple[int, int]]:
    """(rank, number) of torchrun's processes, which then work for themselves: conversion must not take them
    for the workers of one conversion."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world <= 1:
        yield 0, 1
        return
    import datetime

    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    rank = dist.get_rank()
    os.environ["WORLD_SIZE"] = "1"
    try:
        yield rank, world
    finally:
        os.environ["WORLD_SIZE"] = str(world)
        dist.destroy_process_group()


def _barrier(world: int) -> None:
    if world > 1:
        import torch.distributed as dist

        dist.barrier()


def _gather(failed: dict[str, str], world: int) -> dict[str, str]:
    if world == 1:
        return failed
    import torch.distributed as dist

    found: list[Any] = [None] * world
    dist.all_gather_object(found, failed)
    return {name: why for part in found for name, why in part.items()}
