"""Greedy generation from `quantkit export CHECKPOINT --to onnx -o OUT` with onnxruntime and numpy alone.

pip install onnxruntime numpy
python generate.py OUT 1,484,769,347 20        token ids in, token ids out
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


def main(folder: str, prompt: str, count: str) -> None:
    """Print `count` new tokens."""
    decoder = json.loads(Path(folder, "genai_config.json").read_text())["model"]["decoder"]
    session = ort.InferenceSession(str(Path(folder, "model.onnx")), providers=["CPUExecutionProvider"])
    inputs = [i.name for i in session.get_inputs()]
    empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
    cache = {name: empty for name in inputs if name.startswith("past_key_values")}
    ids, total, made = np.array([[int(t) for t in prompt.split(",")]]), 0, []
    for _ in range(int(count)):
        start, total = total, total + ids.shape[1]
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64), **cache}
        if "position_ids" in inputs:  # graphs that rotate inside the attention operator have none
            feeds["position_ids"] = np.arange(start, total)[None]
        logits, *present = session.run(None, feeds)
        cache = dict(zip(cache, present))  # in the same order: key and value, layer by layer
        ids = logits[:, -1:].argmax(-1)
        made.append(int(ids[0, 0]))
    print(",".join(map(str, made)))


if __name__ == "__main__":
    main(*sys.argv[1:])
