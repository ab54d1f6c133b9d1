"""ONNX exports beside dense torch and onnxruntime-genai's own int4 builder: decode and prefill speed.

    python scripts/bench_export.py prepare --work build/bench --genai .peers/genai/bin/python
    python scripts/bench_export.py measure --work build/bench --genai .peers/genai/bin/python

`prepare` makes the models (the shipped example; a Llama of 4 layers and hidden size 2048 with random weights),
converts and exports them, and runs the builder. `measure` times everything, one process at a time, the
variants taking turns, and prints a Markdown table of medians over the rounds. GENAI is a Python environment
with onnxruntime-genai, transformers and torch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples/pydoc-llama-7m"
#: model -> ways to convert it: (name, arguments of `quantkit convert`)
RECIPES = {
    "7m": {
        "gptq": "--format gptq --group-size 32 --samples 16 --seqlen 256",
        "hqq": "--format hqq --group-size 32 --set round_zero=true",
        "hqq-head": "--format hqq --group-size 32 --set round_zero=true --override lm_head:bits=4",
        "hqq-3": "--format hqq --bits 3 --group-size 64",
        "hqq-g24": "--format hqq --bits 4 --group-size 24",
        "nf4": "--format nf4",
        "fp8": "--format fp8",
    },
    "2048": {
        "hqq": "--format hqq --group-size 32 --set round_zero=true",
        "hqq-head": "--format hqq --group-size 32 --set round_zero=true --override lm_head:bits=4",
        "nf4": "--format nf4",
    },
}
LEVELS = (1, 4)


def variants(work: Path, model: str) -> list[tuple[str, str, Path, int]]:
    """(name, engine, directory, accuracy level) of everything that is timed for a model."""
    out = [("dense float32, torch eager", "torch", source(work, model), 0)]
    for recipe in RECIPES[model]:
        for level in LEVELS:
            folder = work / f"{model}-{recipe}-onnx{level}"
            if folder.is_dir():
                out += [(f"quantkit {recipe}", engine, folder, level) for engine in ("ort", "genai")]
    for head in ("", "-head16"):
        for level in LEVELS:
            folder = work / f"{model}-builder{level}{head}"
            if folder.is_dir():
                out += [(f"builder int4{head}", engine, folder, level) for engine in ("ort", "genai")]
    return out


def source(work: Path, model: str) -> Path:
    return EXAMPLE if model == "7m" else work / f"llama-{model}"


# -- prepare ------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        dense = source(args.work, model)
        if not dense.is_dir():
            random_llama(dense, int(model))
        for recipe, flags in RECIPES[model].items():
            checkpoint = args.work / f"{model}-{recipe}"
            if not checkpoint.is_dir():
                quantkit("convert", dense, "-o", checkpoint, *flags.split())
            for level in LEVELS:
                folder = args.work / f"{model}-{recipe}-onnx{level}"
                if args.again or not folder.is_dir():
                    quantkit("export", checkpoint, "-o", folder, f"--accuracy-level={level}", "--overwrite")
        for level in LEVELS:
            for head, extra in (("", []), ("-head16", ["nodes_to_exclude=/lm_head/MatMul"])):
                folder = args.work / f"{model}-builder{level}{head}"
                if not folder.is_dir():
                    command = [
                        args.genai,
                        "-m",
                        "onnxruntime_genai.models.builder",
                        "-i",
                        dense,
                        "-o",
                        folder,
                    ]
                    command += ["-p", "int4", "-e", "cpu", "-c", args.work / "cache", "--extra_options"]
                    run([*command, f"accuracy_level={level}", *extra])


def random_llama(folder: Path, hidden: int) -> None:
    import shutil

    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_hidden_layers=4,
        vocab_size=32000,
        max_position_embeddings=2048,
    )
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(EXAMPLE / name, folder / name)


def quantkit(*arguments: object) -> None:
    run([sys.executable, "-m", "quantkit", *arguments])


def run(command: list[object]) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


# -- measure: one process per variant and round ---------------------------------------------------------


def measure(args: argparse.Namespace) -> None:
    for model in args.models:
        chosen = [v for v in variants(args.work, model) if not args.only or any(o in v[0] for o in args.only)]
        if args.engines:
            chosen = [v for v in chosen if v[1] in args.engines]
        got: dict[int, list[dict[str, float]]] = {i: [] for i in range(len(chosen))}
        for _ in range(args.rounds):
            for i, (_, engine, folder, _) in enumerate(chosen):
                python = args.genai if engine == "genai" else sys.executable
                words = [engine, folder, args.context, args.steps, args.threads]
                command = [python, __file__, "worker", *words]
                environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
                done = subprocess.run(
                    [str(w) for w in command], capture_output=True, text=True, env=environment
                )
                if done.returncode:
                    sys.exit(f"{folder}: {done.stderr[-2000:]}")
                got[i].append(json.loads(done.stdout.splitlines()[-1]))
        table(model, chosen, got, args)


def table(
    model: str,
    chosen: list[tuple[str, str, Path, int]],
    got: dict[int, list[dict[str, float]]],
    args: argparse.Namespace,
) -> None:
    print(
        f"\n{model}: {args.threads} threads, prompt of {args.context} tokens, then {args.steps} decode steps "
        f"(median step), medians of {args.rounds} rounds\n"
    )
    print(
        "| model | runtime | accuracy level | weights, MB | decode, tokens/s | x dense | prefill, tokens/s |"
    )
    print("|---|---|---|---|---|---|---|")
    base = None
    for i, (name, engine, folder, level) in enumerate(chosen):
        decode = statistics.median(r["decode"] for r in got[i])
        prefill = statistics.median(r["prefill"] for r in got[i])
        base = base or decode
        size = sum(f.stat().st_size for f in folder.iterdir() if f.suffix in (".data", ".safetensors")) / 1e6
        runtime = {"torch": "torch", "ort": "onnxruntime", "genai": "onnxruntime-genai"}[engine]
        print(
            f"| {name} | {runtime} | {level or ''} | {size:.1f} | {decode:.1f} | {decode / base:.2f} | {prefill:.0f} |"
        )


def worker(engine: str, folder: str, context: int, steps: int, threads: int) -> None:
    times = {"torch": torch_times, "ort": ort_times, "genai": genai_times}[engine](
        folder, context, steps, threads
    )
    prefill = statistics.median(p for p, _ in times)
    decode = statistics.median(t for _, ts in times for t in ts)
    print(json.dumps({"prefill": context / prefill, "decode": 1 / decode}))


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
    import time

    start = time.perf_counter()
    out = call()
    return out, time.perf_counter() - start


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("action", choices=["prepare", "measure"])
    parser.add_argument("--work", type=Path, default=ROOT / "build/bench")
    parser.add_argument("--genai", default=str(ROOT / ".peers/genai/bin/python"))
    parser.add_argument("--models", nargs="+", default=["7m", "2048"], choices=list(RECIPES))
    parser.add_argument("--only", nargs="*", help="names of variants, or parts of them")
    parser.add_argument("--engines", nargs="*", choices=["torch", "ort", "genai"])
    parser.add_argument("--again", action="store_true", help="prepare: export again")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    (prepare if args.action == "prepare" else measure)(args)


if __name__ == "__main__":
    main()
