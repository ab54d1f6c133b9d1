"""Quality, time and memory of every format, side by side with the tool that owns it.

For each model and setting the same calibration tokens go to quantkit and to the peer (run by the
peer's own python, see scripts/peers/); both results are loaded by quantkit, so only the chosen codes
differ, and compared with the source on held-out text.

    make peers                                     # once: the peers' environments in .peers
    python scripts/bench_quality.py --peers .peers --out build/quality
    python scripts/bench_quality.py --peers .peers --out build/quality --models stories260k --cases gptq-4

Finished cells are kept in --out and not repeated. Prints docs/benchmarks/quality.md and convert.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@dataclass(frozen=True)
class Model:
    """A source checkpoint with the text it is calibrated and evaluated on."""

    name: str
    path: Path
    group: int  # group_size of GPTQ and AWQ
    text: Path | None = None  # None: the built-in text, else a file whose last 40 % is held out


@dataclass(frozen=True)
class Case:
    """One setting of ours and the peer's command that means the same."""

    name: str
    format: str
    options: dict[str, Any]
    tool: str
    venv: str
    arguments: list[str]


def models() -> list[Model]:
    """The example checkpoints, and stories260k where ../shared is there."""
    found = [
        Model("pydoc-llama-7m", ROOT / "examples/pydoc-llama-7m", 128),
        Model("pydoc-qwen2-3m", ROOT / "examples/pydoc-qwen2-3m", 64),
    ]
    stories = SHARED / "checkpoints/stories260k"
    if stories.is_dir():
        found.append(Model("stories260k", stories, 32, SHARED / "data/tinystories-samples.txt"))
    return found


def cases(model: Model) -> list[Case]:
    """GPTQ and HQQ at 4, 3, 2 bits, AWQ at 4, NF4."""
    g = model.group
    out = []
    small = 32 if g == 64 else g  # AutoAWQ stops where a layer's inputs do not divide
    arguments = ["--bits", "4", "--group-size", str(small), "--dtype", "float32"]
    if model.name == "stories260k":  # 172 inputs: neither side's file holds those layers
        arguments += ["--skip", "mlp", "--no-clip"]
    if g == 64:  # its clip search asserts that a layer's outputs are a multiple of 64
        arguments.append("--no-clip")
    out.append(Case("awq-4", "awq", {"group_size": small}, "autoawq", "autoawq", arguments))
    for bits in (4, 3, 2):
        options = {"bits": bits, "group_size": 64}
        out.append(
            Case(f"hqq-{bits}", "hqq", options, "hqq", "new", ["--bits", str(bits), "--group-size", "64"])
        )
    out.append(Case("nf4", "nf4", {}, "bitsandbytes", "new", ["--double-quant"]))
    out.append(Case("nf4-search", "nf4", {"scale_search": True}, "bitsandbytes", "new", ["--double-quant"]))
    for sym in (True, False):
        for bits in (4, 3, 2):
            flag = "--sym" if sym else "--asym"
            # Equal bits: gptqmodel ends a row in a short group, where we would take smaller ones.
            options = {"bits": bits, "group_size": g, "sym": sym, "ragged": True}
            name = f"gptq-{bits}{'' if sym else '-asym'}"
            arguments = ["--bits", str(bits), "--group-size", str(g), flag, "--batch-size", "8"]
            if not sym:
                arguments += ["--format", "gptq_v2"]
            if model.name == "stories260k" and bits == 3:  # gptqmodel cannot pack 172 outputs, we refuse
                arguments += ["--skip", "mlp"]
            out.append(Case(name, "gptq", options, "gptqmodel", "new", arguments))
    return out


def calibration(model: Model, folder: Path, samples: int, seqlen: int) -> tuple[Path, str]:
    """(jsonl of calibration ids, evaluation text) of a model."""
    from quantkit.calibration_data import load_calibration
    from quantkit.load import load_tokenizer

    tokenizer = load_tokenizer(model.path)
    config = json.loads((model.path / "config.json").read_text())
    source, data = "builtin", "builtin"
    if model.text is not None:
        text = model.text.read_text(encoding="utf-8")
        cut = int(len(text) * 0.6)
        (folder / f"{model.name}-calibration.txt").write_text(text[:cut], encoding="utf-8")
        (folder / f"{model.name}-eval.txt").write_text(text[cut:], encoding="utf-8")
        source, data = str(folder / f"{model.name}-calibration.txt"), str(folder / f"{model.name}-eval.txt")
    limit = min(seqlen, config["max_position_embeddings"])
    chosen = load_calibration(
        source, tokenizer, samples=samples, seqlen=limit, seed=0, vocab_size=config["vocab_size"]
    )
    path = folder / f"{model.name}.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in chosen.ids.tolist()))
    return path, data


OURS = """
import json, sys, time, torch, quantkit, quantkit.calibrated, quantkit.convert
from quantkit.formats import get_format
from quantkit.load import load_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
source, out, fmt, options, calibration, samples, seqlen = sys.argv[1:8]
get_format(fmt)
with torch.device("meta"):  # what transformers imports lazily is not counted for the peers either
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
load_tokenizer(source)
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
read = lambda key: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024
base, begun = read("VmRSS"), time.perf_counter()
r = quantkit.convert(source, out, format=fmt, options=json.loads(options), calibration=calibration,
                     samples=int(samples), seqlen=int(seqlen), overwrite=True)
print(json.dumps({"seconds": time.perf_counter() - begun, "peak_over_base": read("VmHWM") - base}))
"""


def run_ours(model: Model, case: Case, out: Path, jsonl: Path, rows: int, seqlen: int) -> dict[str, float]:
    command = [sys.executable, "-c", OURS, str(model.path), str(out), case.format, json.dumps(case.options)]
    done = subprocess.run(
        [*command, str(jsonl), str(rows), str(seqlen)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def run_peer(model: Model, case: Case, out: Path, jsonl: Path, peers: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    python = peers / case.venv / "bin/python"
    command = [str(python), str(ROOT / "scripts/peers/quantize.py"), case.tool, "--model", str(model.path)]
    command += ["--out", str(out), "--calibration", str(jsonl), *case.arguments]
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"}
    timing = json.loads((out / "timing.json").read_text())
    return {
        "seconds": sum(timing["seconds"].values()),  # load, quantize and save, as ours
        "peak_over_base": timing["peak_rss_over_base_mib"] * 2**20,
    }


def measure(out: Path, model: Model, data: str, tokens: int) -> dict[str, float]:
    import quantkit

    row = quantkit.evaluate([out], model.path, data=data, tokens=tokens, dtype="float32").rows[-1]
    assert row.divergence is not None
    return {
        "kl": row.divergence.kl_mean,
        "kl_se": row.divergence.kl_stderr,
        "top1": row.divergence.top1,
        "ppl": row.perplexity.ppl,
        "bits": quantkit.inspect(out).bits_per_weight,  # of the quantized weights, scales and zeros included
    }


def cell(args: argparse.Namespace, model: Model, case: Case, jsonl: Path, data: str) -> dict[str, Any]:
    store = args.out / f"{model.name}--{case.name}.json"
    if store.exists():
        return json.loads(store.read_text())
    rows = jsonl.read_text().splitlines()
    seqlen = len(json.loads(rows[0])["input_ids"])
    ours, theirs = args.out / f"{model.name}--{case.name}-ours", args.out / f"{model.name}--{case.name}-peer"
    result: dict[str, Any] = {"model": model.name, "case": case.name, "tool": case.tool}
    result["ours"] = run_ours(model, case, ours, jsonl, len(rows), seqlen)
    result["ours"] |= measure(ours, model, data, args.tokens)
    result["peer"] = run_peer(model, case, theirs, jsonl, args.peers)
    if "failed" not in result["peer"]:
        result["peer"] |= measure(theirs, model, data, args.tokens)
    store.write_text(json.dumps(result, indent=1))
    return result


def tables(results: list[dict[str, Any]]) -> str:
    quality = [
        "| model | setting | peer | KL ours | KL peer | ratio | ppl ours | ppl peer | bits ours | bits peer |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    speed = [
        "| model | setting | peer | seconds ours | seconds peer | peak MB over base, ours | peer |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for r in results:
        a, b = r["ours"], r["peer"]
        if "failed" in b:
            why = b["failed"][:60]
            ours = f"{a['kl']:.5f} | {why} | | {a['ppl']:.3f} | | {a['bits']:.3f} | |"
            quality.append(f"| {r['model']} | {r['case']} | {r['tool']} | {ours}")
            continue
        quality.append(
            f"| {r['model']} | {r['case']} | {r['tool']} | {a['kl']:.5f} ± {a['kl_se']:.5f} "
            f"| {b['kl']:.5f} ± {b['kl_se']:.5f} "
            f"| **{a['kl'] / b['kl']:.3f}** | {a['ppl']:.3f} | {b['ppl']:.3f} | {a['bits']:.3f} | {b['bits']:.3f} |"
        )
        speed.append(
            f"| {r['model']} | {r['case']} | {r['tool']} | {a['seconds']:.1f} | {b['seconds']:.1f} "
            f"| {a['peak_over_base'] / 1e6:.0f} | {b['peak_over_base'] / 1e6:.0f} |"
        )
    return "\n".join(quality) + "\n\n" + "\n".join(speed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers")
    parser.add_argument("--out", type=Path, default=ROOT / "build/quality")
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--cases", nargs="*")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16384)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for model in models():
        if args.models and model.name not in args.models:
            continue
        jsonl, data = calibration(model, args.out, args.samples, args.seqlen)
        for case in cases(model):
            if args.cases and case.name not in args.cases:
                continue
            begun = time.perf_counter()
            results.append(cell(args, model, case, jsonl, data))
            print(
                f"{model.name} {case.name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True
            )
    print(tables(results))


if __name__ == "__main__":
    main()
