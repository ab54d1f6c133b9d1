"""Greedy generation from `quantkit export CHECKPOINT --to torch -o OUT`, with nothing but torch.

    python generate.py OUT 1,484,769,347 20        token ids in, token ids out

Neither quantkit nor triton nor transformers is needed (unless the file was made with --keep-ops).
"""

import json
import sys
from pathlib import Path

import torch


def main(folder: str, prompt: str, count: str) -> None:
    """Print `count` new tokens."""
    program = torch.export.load(Path(folder) / "model.pt2").module()
    config = json.loads((Path(folder) / "config.json").read_text())
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    kv_heads = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or config["hidden_size"] // heads
    tokens = [int(t) for t in prompt.split(",")]
    length = len(tokens) + int(count)

    cache = [tuple(torch.zeros(1, kv_heads, length, size) for _ in range(2)) for _ in range(layers)]
    step, done, made = torch.tensor([tokens]), 0, []
    with torch.no_grad():
        for _ in range(int(count)):
            places = torch.arange(done, done + step.shape[1])
            done += step.shape[1]
            mask = (torch.arange(length) < done).long()[None]
            logits, *flat = program(step, mask, places[None], places, cache)
            cache = list(zip(flat[::2], flat[1::2]))
            step = logits[:, -1:].argmax(-1)
            made.append(int(step))
    print(",".join(map(str, made)))


if __name__ == "__main__":
    main(*sys.argv[1:])
