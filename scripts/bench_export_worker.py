"""One measurement of `bench_export.py`, in a process of its own: an engine, a model, prefill and decode.

    python scripts/bench_export_worker.py ort build/bench/1024-nf4-onnx1 128 24 2

ENGINE (torch, ort, genai), the model's directory, tokens of the prompt, decode steps, threads; the last line printed is
JSON, medians in tokens per second: `{"prefill": ..., "decode": ...}`. Runs in the engine's Python environment, which
need not have quantkit.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path


def prompt(context: int) -> list[int]:
    return [(7 * i) % 4000 + 3 for i in range(context)]


def torch_times(folder: str, context: int, steps: int, threads: int) -> list[tuple[float, list[float]]]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def once(steps: int) -> tuple[float, list[float]]:
        ids, times = torch.tensor([prompt(context)]), []
        with torch.inference_mode():
            out, first = timed(lambda: model(input_ids=ids, use_cache=True))
            for _ in range(steps):
                ids = out.logits[:, -1:].argmax(-1)
                cache = out.past_key_values
                out, took = timed(
                    lambda i=ids, c=cache: model(input_ids=i, past_key_values=c, use_cache=True)
                )
                times.append(took)
        return first, times

    once(2)
    return [once(steps) for _ in range(2)]


def ort_times(folder: str, context: int, steps: int, threads: int) -> list[tuple[float, list[float]]]:
    """Plain onnxruntime: the cache goes out of one call and into the next without a copy in Python."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
    inputs = {i.name: i for i in session.get_inputs()}
    outputs = [o.name for o in session.get_outputs()]
    past = [name for name in inputs if name.startswith("past")]
    decoder = json.loads(Path(folder, "genai_config.json").read_text())["model"]["decoder"]
    heads, size = decoder["num_key_value_heads"], decoder["head_size"]
    value = ort.OrtValue.ortvalue_from_numpy

    def once(steps: int) -> tuple[float, list[float]]:
        cache = {n: value(np.zeros((1, heads, 0, size), np.float32)) for n in past}
        ids, done, times = np.array([prompt(context)], dtype=np.int64), 0, []
        for _ in range(steps + 1):
            new = ids.shape[1]
            feeds = {"input_ids": value(ids), "attention_mask": value(np.ones((1, done + new), np.int64))}
            if "position_ids" in inputs:
                feeds["position_ids"] = value(np.arange(done, done + new, dtype=np.int64)[None])
            out, took = timed(lambda f=feeds, c=cache: session.run_with_ort_values(outputs, {**f, **c}))
            got = dict(zip(outputs, out))
            cache = {n: got[n.replace("past_key_values", "present")] for n in past}
            ids = got["logits"].numpy()[:, -1:].argmax(-1).astype(np.int64)
            done += new
            times.append(took)
        return times[0], times[1:]

    once(2)
    return [once(steps) for _ in range(2)]


def genai_times(folder: str, context: int, steps: int, threads: int) -> list[tuple[float, list[float]]]:
    import onnxruntime_genai as og

    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def once(steps: int) -> tuple[float, list[float]]:
        params = og.GeneratorParams(model)
        length = context + steps + 2
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        _, first = timed(lambda: generator.append_tokens(prompt(context)))
        generator.generate_next_token()  # takes its token from the prompt's logits
        return first, [timed(generator.generate_next_token)[1] for _ in range(steps)]

    once(2)
    return [once(steps) for _ in range(2)]


def timed(call):  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    out = call()
    return out, time.perf_counter() - start


def main() -> None:
    engine, folder = sys.argv[1:3]
    context, steps, threads = map(int, sys.argv[3:])
    measure = {"torch": torch_times, "ort": ort_times, "genai": genai_times}[engine]
    times = measure(folder, context, steps, threads)
    prefill = statistics.median(p for p, _ in times)
    decode = statistics.median(t for _, ts in times for t in ts)
    print(json.dumps({"prefill": context / prefill, "decode": 1 / decode}))


if __name__ == "__main__":
    main()
