#!/usr/bin/env python3
"""What `quantkit eval --speed` says about quantized models on an accelerator, without a network.

Writes a random Llama checkpoint (bf16; the tokenizer is the shipped example's), converts it in several formats, runs
the command on all of them with the original as reference, and prints a short table last. Random weights say nothing
about quality: read the speed and the memory, and that every figure is finite.

    python scripts/bench_gpu_eval.py --json bench-gpu-eval.json
    python scripts/bench_gpu_eval.py --device cpu --hidden 128 --layers 2 --tokens 1024 --contexts 32   # a dry run
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "examples" / "pydoc-llama-7m"
SETTINGS = "nf4,gptq:4:sweeps=0,hqq:4:g64,fp8"


def make_model(
    path: Path, *, layers: int, hidden: int, intermediate: int, vocabulary: int, where: str
) -> None:
    """A random Llama of that shape, drawn on `where`, with a tokenizer whose ids it knows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(where):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(path)
    for file in TOKENIZER.glob("*token*.json"):
        shutil.copy(file, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, help="default: 2.75 times hidden, a multiple of 128")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--settings", default=SETTINGS, help=f"as `quantkit sweep` takes them ({SETTINGS})")
    parser.add_argument("--samples", type=int, default=8, help="calibration samples of 512 tokens")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text for KL")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--contexts", default="512")
    parser.add_argument("--device", help="default: the accelerator, else the CPU")
    parser.add_argument("--report", type=Path, help="keep the report in this directory (needs matplotlib)")
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(ROOT))
    import torch

    import quantkit
    from quantkit.sweep import parse_settings

    device = args.device or str(torch.accelerator.current_accelerator() or "cpu")
    intermediate = args.intermediate or (args.hidden * 11 // 4 + 127) // 128 * 128
    folder = Path(tempfile.mkdtemp(prefix="quantkit-bench-"))
    began = time.perf_counter()
    try:
        source = folder / "source"
        shape = {"layers": args.layers, "hidden": args.hidden, "vocabulary": args.vocabulary}
        make_model(source, intermediate=intermediate, where=device, **shape)
        print(f"[{time.perf_counter() - began:5.0f} s] source written", flush=True)
        done, seconds = [], {}
        for setting in parse_settings(args.settings):
            start = time.perf_counter()
            try:
                quantkit.convert(
                    source,
                    folder / setting.name,
                    format=setting.format,
                    options=setting.options,
                    samples=args.samples,
                    seqlen=512,
                    device=device,
                )
            except Exception as error:  # one format's failure should not cost the others' figures
                print(f"{setting.name}: {type(error).__name__}: {error}", flush=True)
                continue
            done.append(setting.name)
            seconds[setting.name] = time.perf_counter() - start
            print(f"[{time.perf_counter() - began:5.0f} s] {setting.name} converted", flush=True)
        found = evaluate(folder, done, device, args)
        print(f"[{time.perf_counter() - began:5.0f} s] evaluated\n", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found["convert_seconds"] = seconds
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    show(found, args, intermediate)


def evaluate(folder: Path, names: list[str], device: str, args: argparse.Namespace) -> dict[str, Any]:
    """The JSON document of one `quantkit eval`; with a report where one was asked for and can be drawn."""
    command = [sys.executable, "-m", "quantkit", "eval", *names, "--reference", "source", "--device", device]
    command += ["--tokens", str(args.tokens), "--cache", "none", "--json", "--speed"]
    command += ["--speed-batches", args.batches, "--speed-contexts", args.contexts]
    if args.report and importlib.util.find_spec("matplotlib"):
        command += ["--report", str(args.report.resolve()), "--overwrite"]
    ran = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        sys.exit(f"quantkit eval: exit code {ran.returncode}")
    return dict(json.loads(ran.stdout))


def show(found: dict[str, Any], args: argparse.Namespace, intermediate: int) -> None:
    """The table, one line per model, batch and context; ratios are to the unquantized model."""
    env = found["environment"]
    print(
        f"{env.get('device')}, torch {env.get('torch')}, triton {env.get('triton', '-')}, transformers"
        f" {env.get('transformers')}, python {env.get('python')}; {found['date']}"
    )
    print(
        f"Llama of {args.layers} layers, hidden {args.hidden}, intermediate {intermediate}, vocabulary"
        f" {args.vocabulary}, bf16, random; medians of 5 runs after a warm-up\n"
    )
    print(
        "| checkpoint | KL mean | batch | context | prefill tok/s | decode tok/s (slowest to fastest) | x bf16 |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    points = {
        (row["checkpoint"], p["phase"], p["batch"], p["context"]): p
        for row in found["rows"]
        for p in row["speed"]["points"]
    }
    for row in found["rows"]:
        kl = f"{row['divergence']['kl_mean']:.4g}" if row["divergence"] else "-"
        for p in row["speed"]["points"]:
            if p["phase"] != "decode":
                continue
            at = (p["batch"], p["context"])
            fill = points[row["checkpoint"], "prefill", *at]["tokens_per_second"]
            base = points.get((found["rows"][0]["checkpoint"], "decode", *at))
            ratio = f"{p['tokens_per_second'] / base['tokens_per_second']:.2f}" if base else "-"
            rate = f"{p['tokens_per_second']:.1f} ({p['low']:.1f} to {p['high']:.1f})"
            print(f"| {row['checkpoint']} | {kl} | {at[0]} | {at[1]} | {fill:.0f} | {rate} | {ratio} |")
    print(
        "\n| checkpoint | weights in memory | peak | load | first token | share of bandwidth, batch 1 | convert |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in found["rows"]:
        s = row["speed"]
        one = next((p for p in s["points"] if p["phase"] == "decode" and p["batch"] == 1), None)
        share = (
            "-" if one is None or one["bandwidth_share"] is None else f"{100 * one['bandwidth_share']:.1f} %"
        )
        first = "-" if s["time_to_first_token"] is None else f"{1000 * s['time_to_first_token']:.1f} ms"
        took = found["convert_seconds"].get(row["checkpoint"])
        print(
            f"| {row['checkpoint']} | {s['weight_bytes'] / 1e6:.0f} MB | {s['peak_memory'] / 1e6:.0f} MB"
            f" | {s['load_seconds']:.1f} s | {first} | {share} | {'-' if took is None else f'{took:.0f} s'} |"
        )
    bandwidth = found["rows"][0]["speed"]["bandwidth"]
    print(
        f"\nreading memory: {bandwidth / 1e9:.0f} GB/s (measured); warnings: {'; '.join(found['warnings']) or 'none'}"
    )


if __name__ == "__main__":
    main()
