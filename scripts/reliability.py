"""Everything that docs/reliability.md states, measured again in bounded time, and that page written from it.

    python scripts/reliability.py [--quick] [--only attacks memory ...]

Attacks, properties (nightly number of cases), fuzzing (a short budget), memory, faults. Each part is stored in
docs/benchmarks/reliability.json with date, command and commit when it is done, and the page is rendered from
what is stored: parts that were not run now keep the figures, and the date, of the run that made them. Fuzzing runs are
collected in docs/benchmarks/fuzz.jsonl; longer ones (`make fuzz`) add to it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_memory import make_model, over, slope

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "benchmarks" / "reliability.json"
FUZZ_LOG = ROOT / "docs" / "benchmarks" / "fuzz.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
TEMPLATE = Path(__file__).with_name("reliability.md.j2")
Figures = dict[str, Any]

OURS = """
import sys, quantkit
quantkit.convert(sys.argv[1], sys.argv[2], format="nf4")
"""
LOADS_ALL = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
print(sum(p.numel() for p in model.parameters()))
"""


def pytest(*arguments: str, **environment: str) -> Figures:
    """Run tests; how many of each file passed, what did not, and seconds."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=3000"]
        done = subprocess.run(
            [*command, f"--junitxml={report.name}", *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        suite = ElementTree.parse(report.name).getroot()
    passed: Counter[str] = Counter()
    other: Counter[str] = Counter()
    for case in suite.iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        if kinds:
            other[kinds.pop()] += 1
        else:
            passed[str(case.get("classname")).rpartition(".")[2]] += 1
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
    return {"passed": dict(passed), **other, "exit": done.returncode}


def under_limit(code: str, limit: int, *arguments: object) -> Figures:
    """Run Python code with at most `limit` bytes of private memory (RLIMIT_DATA)."""

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=restrict,
        check=False,
    )
    last = (done.stderr.strip().splitlines() or [""])[-1][:200]
    return {"exit": done.returncode, "last line": last, "seconds": round(time.perf_counter() - began, 1)}


def memory_limit(limit: int) -> Figures:
    """A conversion, and loading the whole model, under one hard limit that is smaller than the model."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        make_model(model, 40, 1024, 2816)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        return {
            "model": size,
            "limit": limit,
            "ours": under_limit(OURS, limit, model, Path(folder) / "out"),
            "theirs": under_limit(LOADS_ALL, limit, model),
        }


def script(name: str, *arguments: str) -> Figures:
    """A script of this folder in a process of its own; what it writes with --json."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, ROOT / "scripts" / name, *arguments, "--json", file.name]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        text = " ".join(["python", f"scripts/{name}", *arguments])
        return {**json.loads(Path(file.name).read_bytes()), "command": text}


def growth(quick: bool) -> Figures:
    """Peak memory over three depths (sizes) and three widths, for a streaming and a calibrated format; smaller
    models for the latter, which takes minutes where the former takes seconds."""
    parts = {
        "nf4": (["12", "24", "48"], ["512", "1024", "2048"]),
        "gptq": (["3", "6", "12"], ["256", "512", "1024"]),
    }
    if quick:
        parts = {
            "nf4": (["4", "8", "12"], ["256", "512", "1024"]),
            "gptq": (["1", "2", "3"], ["128", "256", "512"]),
        }
    found = [
        script("bench_memory.py", "--formats", fmt, "--depths", *depths, "--widths", *widths)
        for fmt, (depths, widths) in parts.items()
    ]
    return {
        "command": [part["command"] for part in found],
        "depths": [row for part in found for row in part["depths"]],
        "widths": [row for part in found for row in part["widths"]],
    }


def fuzz(seconds: str) -> Figures:
    """A short run of each target; findings end in the log, as those of longer runs do."""
    if subprocess.run([sys.executable, "-c", "import atheris"], capture_output=True).returncode:
        return {"not run": "atheris is not installed (`make fuzz` installs it)"}
    crashed = []
    with tempfile.TemporaryDirectory() as folder:
        for target in ("reader", "index", "quantization_config", "journal"):
            command = [sys.executable, ROOT / "tests" / "fuzz" / "fuzz.py", target, "--cpu-seconds", seconds]
            done = subprocess.run([*command, "--log", FUZZ_LOG], cwd=folder, capture_output=True, text=True)
            if done.returncode:
                crashed.append(target)
                print(done.stderr[-2000:], file=sys.stderr)
    return {"seconds for each": seconds, "crashed": crashed}


def fuzz_rows() -> list[Figures]:
    """The log of all fuzzing runs, summed by target."""
    lines = [json.loads(line) for line in FUZZ_LOG.read_text().splitlines()] if FUZZ_LOG.exists() else []
    rows = []
    for target in dict.fromkeys(line["target"] for line in lines):
        mine = [line for line in lines if line["target"] == target]
        rows.append(
            {
                "target": target,
                "runs": len(mine),
                "executions": sum(line["executions"] for line in mine),
                "cpu_seconds": sum(line["cpu_seconds"] for line in mine),
                "findings": sum(line["finding"] is not None for line in mine),
                "first": min(line["date"] for line in mine),
                "last": max(line["date"] for line in mine),
            }
        )
    return rows


def matrix() -> Figures:
    """The families and commands of tests/attacks/test_every_command.py."""
    sys.path[:0] = [str(ROOT / "tests" / "attacks"), str(ROOT / "tests")]
    import test_every_command as table

    cells = {}
    for name in table.FAMILIES:
        for command in table.COMMANDS:
            word = "not looked at" if (name, command) in table.UNSEEN else "refused"
            cells[name, command] = "-" if command == "convert" and name in table.QUANTIZED else word
    return {"families": list(table.FAMILIES), "commands": table.COMMANDS, "cells": cells}


def fault_rows(figures: Figures) -> list[Figures]:
    """The rows of the page's table: one for each disturbance and subject."""
    rows = []
    for title, row in figures.items():
        if not isinstance(row, dict) or title in ("bad", "about"):
            continue
        fault, _, subject = title.partition(", ")
        if "not run" in row:
            rows.append({"fault": fault, "subject": subject, "not_run": row["not run"]})
            continue
        exits = [f"{k.removeprefix('exit ')}: {v}" for k, v in sorted(row.items()) if k.startswith("exit ")]
        bad = sum(row.get(key, 0) for key in ("mixed", "lost", "unloadable"))
        rows.append(
            {
                "fault": f"{fault} ({sum(row['calls'].values())} calls, k = {row['k']})"
                if "calls" in row
                else fault,
                "subject": subject,
                "runs": row["runs"],
                "old": row.get("old", 0),
                "new": row.get("new", 0),
                "bad": bad,
                "again": row["resumed to the same bytes"],
                "leftovers": row["leftovers"],
                "exits": ", ".join(exits),
            }
        )
        if "read-only runs" in row:
            number = row["read-only runs"]
            code = next(k.rpartition(" ")[2] for k in row if k.startswith("read-only: exit"))
            old = row["read-only: old"]
            rows.append(
                {"fault": "read-only", "subject": subject, "runs": number, "old": old, "new": 0,
                 "bad": number - old, "again": row["read-only: resumed"], "leftovers": 0, "exits": f"{code}: {number}"}
            )  # fmt: skip
    return rows


def environment() -> str:
    """One line about the machine and the libraries."""
    import torch
    import transformers

    return (
        f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def commit() -> str:
    """The commit that is measured, marked where the code (not the figures) differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "quantkit", "scripts", "tests")
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("-dirty" if changed else "")


def render(results: Figures) -> str:
    """The page."""
    import jinja2

    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return template.from_string(TEMPLATE.read_text()).render(
        results=results,
        faults=fault_rows(results.get("faults", {})),
        fuzz=fuzz_rows(),
        matrix=matrix(),
        over=over,
        slope=slope,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few minutes instead of half an hour")
    parts = ["attacks", "properties", "fuzz", "limit", "growth", "faults"]
    parser.add_argument("--only", nargs="*", choices=parts)
    parser.add_argument(
        "--faults-json",
        nargs=2,
        metavar=("FILE", "COMMIT"),
        help="take figures that scripts/faults.py wrote there",
    )
    parser.add_argument("--fuzz-seconds", default="60", help="CPU seconds for each target")
    args = parser.parse_args()
    quick = args.quick
    fewer = ["--kills", "40", "--every", "10", "--disks", "6", "--rounds", "2", "--exports", "2"]
    steps: dict[str, Callable[[], Figures]] = {
        "attacks": lambda: pytest(
            "tests/attacks", "tests/test_publish_resume.py", "tests/eval/test_reference_cache.py"
        ),
        "properties": lambda: pytest("tests/properties", HYPOTHESIS_PROFILE="ci" if quick else "nightly"),
        "fuzz": lambda: fuzz("5" if quick else args.fuzz_seconds),
        "limit": lambda: memory_limit(900 << 20),
        "growth": lambda: growth(quick),
        "faults": lambda: script("faults.py", *(fewer if quick else [])),
    }
    if args.faults_json:
        steps["faults"] = lambda: json.loads(Path(args.faults_json[0]).read_text())
    results: Figures = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, step in steps.items():
        if args.only is not None and name not in args.only:
            continue
        began, code = time.perf_counter(), commit()
        figures = step()
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": code,
            "machine": environment(),
            "seconds": round(time.perf_counter() - began),
            "quick": quick,
        }
        if name == "faults" and args.faults_json:
            about |= {"commit": args.faults_json[1], "seconds": round(figures["seconds"])}
        results[name] = {**figures, "about": about}
        print(f"{name}: {json.dumps(results[name])[:400]}", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(render(results))
    print(f"written: {PAGE}")
    failed = [name for name in ("attacks", "properties") if results.get(name, {}).get("exit")]
    failed += ["faults"] * bool(results.get("faults", {}).get("bad"))
    failed += ["fuzz"] * bool(results.get("fuzz", {}).get("crashed"))
    sys.exit(f"not as promised: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
