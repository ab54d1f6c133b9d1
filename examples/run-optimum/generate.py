"""Greedy generation from `quantkit export CHECKPOINT --to onnx -o OUT` with Hugging Face's ORT model classes.

pip install 'optimum-onnx[onnxruntime]'
python generate.py OUT 1,484,769,347 20        token ids in, token ids out
"""

import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM


def main(folder: str, prompt: str, count: str) -> None:
    """Print at most `count` new tokens; generation ends at the model's end-of-text token."""
    model = ORTModelForCausalLM.from_pretrained(folder, use_io_binding=False)
    ids = torch.tensor([[int(token) for token in prompt.split(",")]])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(count), do_sample=False
    )
    print(",".join(map(str, made[0, ids.shape[1] :].tolist())))


if __name__ == "__main__":
    main(*sys.argv[1:])
