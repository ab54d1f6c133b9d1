"""Peak memory of conversions against the number of layers: it must not grow.

Makes random Llama checkpoints of several depths (one shard per layer), converts each in a process of its
own, and prints the peak resident memory over what the interpreter holds after its imports, with the
slope per layer.

    python scripts/bench_memory.py --formats nf4 hqq fp8 gptq awq --depths 4 8 16
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--formats", nargs="+", default=["nf4", "hqq", "fp8", "gptq", "awq"])
    parser.add_argument("--depths", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for depth in args.depths:
            model = Path(folder) / f"llama-{depth}"
            model.mkdir()
            make_model(model, depth, args.hidden, args.intermediate)
            for fmt in args.formats:
                command = [sys.executable, "-c", WORKER, str(model), str(Path(folder) / "out"), fmt, "128"]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stderr)
                row = {"format": fmt, "layers": depth, **json.loads(done.stdout.splitlines()[-1])}
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    print(f"\nhidden {args.hidden}, intermediate {args.intermediate}, bf16; peak RSS over base in MB\n")
    print(
        "| format | "
        + " | ".join(f"{d} layers" for d in args.depths)
        + " | slope, MB per layer | source, MB |"
    )
    print("|---|" + "---:|" * (len(args.depths) + 2))
    for fmt in args.formats:
        over = [(r["peak"] - r["base"]) / 1e6 for r in rows if r["format"] == fmt]
        slope = (over[-1] - over[0]) / (args.depths[-1] - args.depths[0])
        sources = ", ".join(f"{r['before'] / 1e6:.0f}" for r in rows if r["format"] == fmt)
        print(f"| {fmt} | " + " | ".join(f"{o:.0f}" for o in over) + f" | {slope:+.2f} | {sources} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
