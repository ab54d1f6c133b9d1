"""Greedy generation from `quantkit export CHECKPOINT --to onnx -o OUT` with onnxruntime-genai.

pip install onnxruntime-genai
python generate.py OUT 1,484,769,347 20        token ids in, token ids out
"""

import sys

import onnxruntime_genai as og


def main(folder: str, prompt: str, count: str) -> None:
    """Print `count` new tokens."""
    model = og.Model(folder)
    tokens = [int(t) for t in prompt.split(",")]
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(tokens) + int(count), do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(tokens)
    made = []
    while not generator.is_done():
        generator.generate_next_token()
        made.append(int(generator.get_next_tokens()[0]))
    print(",".join(map(str, made)))


if __name__ == "__main__":
    main(*sys.argv[1:])
