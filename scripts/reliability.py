"""Everything that docs/reliability.md states, measured again in bounded time (`make reliability`).

    python scripts/reliability.py --out reliability.json [--quick]

Runs the attacks, the properties (nightly number of cases), the fault driver and a conversion under a memory
limit; prints one line for each and writes the figures as JSON. The page's tables are filled from that file
by hand: a figure that nobody looked at proves nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_memory import make_model

ROOT = Path(__file__).resolve().parents[1]

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


def pytest(folder: str, **environment: str) -> dict[str, Any]:
    """Run a folder of tests; how many passed and failed, and seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=3000", folder]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
    return {**found, "exit": done.returncode, "seconds": round(time.perf_counter() - began, 1)}


def under_limit(code: str, limit: int, *arguments: object) -> dict[str, Any]:
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


def memory_limit(limit: int) -> dict[str, Any]:
    """A conversion, and loading the whole model, under one hard limit that is smaller than the model."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        make_model(model, 40, 1024, 2816)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        return {
            "model bytes (bf16)": size,
            "limit bytes": limit,
            "quantkit convert nf4": under_limit(OURS, limit, model, Path(folder) / "out"),
            "from_pretrained, float32": under_limit(LOADS_ALL, limit, model),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reliability.json"))
    parser.add_argument("--quick", action="store_true", help="a few minutes instead of half an hour")
    parser.add_argument("--only", nargs="*", choices=["attacks", "properties", "memory", "faults"])
    args = parser.parse_args()
    profile = "ci" if args.quick else "nightly"
    steps: dict[str, Any] = {
        "attacks": lambda: pytest("tests/attacks"),
        "properties": lambda: pytest("tests/properties", HYPOTHESIS_PROFILE=profile),
        "memory": lambda: memory_limit(900 << 20),
        "faults": lambda: faults("40" if args.quick else "500", "30" if args.quick else "130"),
    }
    figures: dict[str, Any] = {"date": time.strftime("%Y-%m-%d")}
    for name, step in steps.items():
        if not args.only or name in args.only:
            figures[name] = step()
            print(f"{name}: {json.dumps(figures[name])}", flush=True)
    args.out.write_text(json.dumps(figures, indent=1) + "\n")


def faults(kills: str, errors: str) -> dict[str, Any]:
    """scripts/faults.py in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, ROOT / "scripts" / "faults.py", "--kills", kills, "--errors", errors]
        subprocess.run([*command, "--json", file.name], stdout=subprocess.DEVNULL, check=False)
        return dict(json.loads(Path(file.name).read_bytes()))


if __name__ == "__main__":
    main()
