"""Time and memory of converting Llama-8B-shaped layers on the accelerator.

Writes a random checkpoint of a few layers (bf16) and converts it in every format, on the accelerator and
(with --cpu-layers) on the CPU for the ratio. Codes are compared with the CPU's on one small layer.

    python scripts/bench_gpu_convert.py --layers 2 --samples 128 --seqlen 1024
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path

import torch
from bench_memory import make_model

import quantkit

CASES: list[tuple[str, str, dict[str, object]]] = [
    ("nf4", "nf4", {}),
    ("fp8 block", "fp8", {}),
    ("hqq 4 bit g64", "hqq", {}),
    ("gptq 4 bit g128", "gptq", {}),
    ("awq 4 bit g128", "awq", {}),
    ("ternary", "ternary", {}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--cases", nargs="*")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator()
    name = torch.cuda.get_device_name() if device is not None and device.type == "cuda" else str(device)
    folder = Path(tempfile.mkdtemp())
    source = folder / "source"
    source.mkdir()
    make_model(source, args.layers, args.hidden, args.intermediate)
    ids = torch.randint(0, 1000, (args.samples, args.seqlen), generator=torch.Generator().manual_seed(0))
    rows = []
    for label, fmt, options in CASES:
        if args.cases and fmt not in args.cases:
            continue
        gc.collect()
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()
        begun = time.perf_counter()
        try:
            result = quantkit.convert(
                source, folder / "out", format=fmt, options=options, calibration=ids, samples=args.samples,
                seqlen=args.seqlen, overwrite=True,
            )  # fmt: skip
        except Exception as error:
            print(f"{label}: {type(error).__name__}: {error}", flush=True)
            continue
        seconds = time.perf_counter() - begun
        codes = sum(r.seconds for r in result.quantized)
        row = {
            "case": label,
            "seconds": seconds,
            "per_layer": seconds / args.layers,
            "codes_per_layer": codes / args.layers,
            "device_gb": (result.peak_device_memory or 0) / 1e9,
            "worst": result.worst_layers(1)[0].worst,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    shutil.rmtree(folder)
    print(
        f"\n{name}, torch {torch.__version__}, python {platform.python_version()}; {args.layers} layers of hidden"
    )
    print(
        f"{args.hidden}, intermediate {args.intermediate}, bf16; {args.samples} x {args.seqlen} calibration tokens\n"
    )
    print(
        "| setting | s per layer | of it choosing codes | 32 layers, min | peak device memory, GB |\n"
        "|---|---:|---:|---:|---:|"
    )
    for r in rows:
        print(
            f"| {r['case']} | {r['per_layer']:.2f} | {r['codes_per_layer']:.2f} | {r['per_layer'] * 32 / 60:.1f} "
            f"| {r['device_gb']:.1f} |"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
