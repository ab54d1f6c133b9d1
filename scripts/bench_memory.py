"""Peak memory of conversions against the size of the model: it must not grow with the number of layers.

Makes random Llama checkpoints of several depths, and of several widths (one shard per layer), converts each in a
process of its own, and prints the peak resident memory over what the interpreter holds after its imports,
with the slope in MB for each GB of source. Wider models have larger tensors, and of those one (streaming formats)
or a layer's worth (calibrated formats) is in memory: over widths the peak follows the layer, not the model.

    python scripts/bench_memory.py --formats nf4 hqq fp8 gptq awq --depths 4 8 16 --widths 512 1024 2048
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import linear_regression
from typing import Any

WORKER = """
import json, resource, sys
import torch, transformers.models.llama.modeling_llama, quantkit.convert, quantkit.calibrated, quantkit.model_card
from quantkit.formats import get_format
source, out, fmt, group = sys.argv[1:5]
get_format(fmt)
with open("/proc/self/status") as f:
    base = next(int(l.split()[1]) for l in f if l.startswith("VmRSS")) * 1024
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # forget the peak of the imports
ids = torch.randint(0, 1000, (8, 128), generator=torch.Generator().manual_seed(0))
options = {} if fmt in ("nf4", "fp8", "ternary") else {"group_size": int(group)}
r = quantkit.convert(source, out, format=fmt, options=options, calibration=ids, samples=8, seqlen=128, overwrite=True)
with open("/proc/self/status") as f:
    peak = next(int(l.split()[1]) for l in f if l.startswith("VmHWM")) * 1024
print(json.dumps({"base": base, "peak": peak, "seconds": r.seconds, "before": r.size_before, "after": r.size_after}))
"""


def make_model(path: Path, layers: int, hidden: int, intermediate: int) -> None:
    """A random Llama checkpoint, one shard per layer, never in memory whole."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=1000,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(path)
    index: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, path / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) * 0.02).to(torch.bfloat16)

    for i in range(layers):
        p = f"model.layers.{i}."
        kv = hidden // 2
        shapes = {
            "q_proj": (hidden, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, hidden),
        }
        tensors = {f"{p}self_attn.{n}.weight": random(*s) for n, s in shapes.items()}
        for name in ("gate_proj", "up_proj"):
            tensors[f"{p}mlp.{name}.weight"] = random(intermediate, hidden)
        tensors[f"{p}mlp.down_proj.weight"] = random(hidden, intermediate)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{p}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        save(f"layer-{i:03d}.safetensors", tensors)
    head = {"model.embed_tokens.weight": random(1000, hidden), "lm_head.weight": random(1000, hidden)}
    save("head.safetensors", {**head, "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def peak_of(fmt: str, layers: int, hidden: int, intermediate: int, folder: Path) -> dict[str, Any]:
    """Convert one random model in a process of its own; its memory, in bytes."""
    model = folder / f"llama-{layers}-{hidden}-{intermediate}"
    if not model.is_dir():
        model.mkdir()
        make_model(model, layers, hidden, intermediate)
    command = [sys.executable, "-c", WORKER, str(model), str(folder / "out"), fmt, "128"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    row = {"format": fmt, "layers": layers, "hidden": hidden, **json.loads(done.stdout.splitlines()[-1])}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def over(row: dict[str, Any]) -> float:
    """Peak resident memory above that of the imports, MB."""
    return float(row["peak"] - row["base"]) / 1e6


def slope(rows: list[dict[str, Any]]) -> float:
    """MB of peak for each GB of source, by least squares."""
    return linear_regression([r["before"] / 1e9 for r in rows], [over(r) for r in rows]).slope


def print_table(rows: list[dict[str, Any]], key: str, title: str) -> None:
    """Formats against depths or widths."""
    values = list(dict.fromkeys(r[key] for r in rows))
    print(f"\n{title}; peak RSS over base in MB\n")
    print("| format | " + " | ".join(f"{key} {v}" for v in values) + " | MB per GB of source | source, MB |")
    print("|---|" + "---:|" * (len(values) + 2))
    for fmt in dict.fromkeys(r["format"] for r in rows):
        mine = [r for r in rows if r["format"] == fmt]
        sizes = ", ".join(f"{r['before'] / 1e6:.0f}" for r in mine)
        cells = " | ".join(f"{over(r):.0f}" for r in mine)
        print(f"| {fmt} | {cells} | {slope(mine):+.1f} | {sizes} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--formats", nargs="+", default=["nf4", "hqq", "fp8", "gptq", "awq"])
    parser.add_argument("--depths", nargs="*", type=int, default=[4, 8, 16], help="layers, at --hidden")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--widths", nargs="*", type=int, default=[], help="hidden sizes, at --width-depth")
    parser.add_argument("--width-depth", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    depths, widths = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for depth in args.depths:
            for fmt in args.formats:
                depths.append(peak_of(fmt, depth, args.hidden, args.intermediate, folder))
        for width in args.widths:
            for fmt in args.formats:
                widths.append(peak_of(fmt, args.width_depth, width, width * 11 // 4, folder))
    if depths:
        print_table(depths, "layers", f"hidden {args.hidden}, intermediate {args.intermediate}, bf16")
    if widths:
        print_table(widths, "hidden", f"{args.width_depth} layers, intermediate 2.75 times hidden, bf16")
    if args.json:
        args.json.write_text(json.dumps({"depths": depths, "widths": widths}, indent=1))


if __name__ == "__main__":
    main()
