"""ONNX exports beside dense torch and onnxruntime-genai's own int4 builder: decode and prefill speed.

    python scripts/bench_export.py prepare --genai .peers/genai/bin/python
    python scripts/bench_export.py measure --genai .peers/genai/bin/python --rounds 7
    python scripts/bench_export.py table
    python scripts/bench_export.py quality --text FILE       # KL divergence of the same files from the dense model

`prepare` makes the models (the shipped example; a Llama of 4 layers and hidden size 2048 with random weights),
converts and exports them, and runs the builder. `measure` times everything, each variant and round in a
process of its own (`bench_export_worker.py`), forwards and backwards through the variants, and appends to
`results.jsonl` in the work directory; `--models`, `--only`, `--engines` choose a piece of it. `table` prints
medians over all rounds, with the quartiles. GENAI is a Python environment with onnxruntime-genai, transformers
and torch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples/pydoc-llama-7m"
WORKER = ROOT / "scripts/bench_export_worker.py"
#: model -> ways to convert it: (name, arguments of `quantkit convert`)
RECIPES = {
    "7m": {
        "gptq": "--format gptq --group-size 32 --samples 16 --seqlen 256",
        "gptq-default": "--format gptq --samples 16 --seqlen 256",
        "hqq-head": "--format hqq --group-size 32 --set round_zero=true --override lm_head:bits=4",
    },
    "2048": {
        "hqq-head": "--format hqq --group-size 32 --set round_zero=true --override lm_head:bits=4",
        "hqq-128": "--format hqq --group-size 128 --set round_zero=true",
        "hqq-head-128": "--format hqq --group-size 128 --set round_zero=true --override lm_head:bits=4",
    },
    # For what falls back: plain rounding to convert quickly, since codes do not change the speed.
    "1024": {
        "hqq": "--format hqq --set round_zero=true --set optimize=false",
        "hqq-float-zeros": "--format hqq --set optimize=false",
        "hqq-3": "--format hqq --bits 3 --set optimize=false",
        "hqq-8": "--format hqq --bits 8 --set round_zero=true --set optimize=false",
        "hqq-g24": "--format hqq --group-size 24 --set round_zero=true --set optimize=false",
        "nf4": "--format nf4",
        "fp8": "--format fp8",
        "fp8-channel": "--format fp8 --set scheme=channel --set layout=compressed-tensors",
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
            if args.recipes and recipe not in args.recipes:
                continue
            checkpoint = args.work / f"{model}-{recipe}"
            if not checkpoint.is_dir():
                quantkit("convert", dense, "-o", checkpoint, *flags.split())
            for level in args.levels or LEVELS:
                folder = args.work / f"{model}-{recipe}-onnx{level}"
                if args.again or not folder.is_dir():
                    quantkit("export", checkpoint, "-o", folder, f"--accuracy-level={level}", "--overwrite")
        for level in args.levels or LEVELS:
            if model == "1024":
                break
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
        vocab_size=32000 if hidden == 2048 else 4096,
        max_position_embeddings=8192 if hidden == 2048 else 2048,
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
    """Append one line of results for each variant and round."""
    started = int(time.time())
    for model in args.models:
        chosen = [v for v in variants(args.work, model) if not args.only or v[0] in args.only]
        chosen = [v for v in chosen if not args.engines or v[1] in args.engines]
        chosen = [v for v in chosen if not args.levels or v[3] in args.levels or v[1] == "torch"]
        for number in range(args.rounds):
            for name, engine, folder, level in chosen if number % 2 == 0 else reversed(chosen):
                python = args.genai if engine == "genai" else sys.executable
                words = [engine, folder, args.context, args.steps, args.threads]
                command = [str(w) for w in (python, WORKER, *words)]
                environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
                before = cpu_seconds()
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                busy, own, wall = (b - a for a, b in zip(before, cpu_seconds()))
                if done.returncode:
                    sys.exit(f"{folder}: {done.stderr[-2000:]}")
                size = sum(
                    f.stat().st_size for f in folder.iterdir() if f.suffix in (".data", ".safetensors")
                )
                line = {"model": model, "name": name, "engine": engine, "level": level, "bytes": size}
                line["round"] = f"{started} {number}"
                line |= {"context": args.context, "threads": args.threads, "steps": args.steps}
                line["others"] = round(max(0.0, busy - own) / wall, 3)
                line |= json.loads(done.stdout.splitlines()[-1])
                with open(args.work / "results.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    table(args)


def cpu_seconds() -> tuple[float, float, float]:
    """CPU time of the whole machine (what a hypervisor took from it included) and of children; wall time."""
    words = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = map(int, words[:8])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    times = os.times()
    return busy, times.children_user + times.children_system, times.elapsed


def table(args: argparse.Namespace) -> None:
    """Markdown: medians over the rounds so far, quartiles in brackets, of each model and length of prompt.

    Runs beside which other processes had more than `--others` CPUs on average are left out.
    """
    lines = [json.loads(line) for line in (args.work / "results.jsonl").read_text().splitlines()]
    disturbed = [x for x in lines if x["others"] > args.others]
    lines = [x for x in lines if x["others"] <= args.others]
    print(f"{len(disturbed)} runs left out: other processes had more than {args.others} CPUs")
    for model, context in dict.fromkeys(
        (x["model"], x["context"]) for x in lines if x["model"] in args.models
    ):
        here = [x for x in lines if (x["model"], x["context"]) == (model, context)]
        print(f"\n{model}: prompt of {context} tokens, {here[0]['threads']} threads\n")
        print(
            "| model | runtime | accuracy level | weights, MB | rounds | decode, tokens/s | x dense "
            "| x builder, same round | prefill, tokens/s | x builder |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        rows: dict[tuple[str, str, int], list[dict[str, float]]] = {}
        for x in here:
            rows.setdefault((x["name"], x["engine"], x["level"]), []).append(x)
        dense = [x["decode"] for x in here if x["engine"] == "torch"]
        for (name, engine, level), got in sorted(
            rows.items(), key=lambda row: (row[0][1] != "torch", row[0])
        ):
            decode, low, high = spread([x["decode"] for x in got])
            prefill = statistics.median(x["prefill"] for x in got)
            runtime = {"torch": "torch", "ort": "onnxruntime", "genai": "onnxruntime-genai"}[engine]
            times = f"{decode / statistics.median(dense):.2f}" if dense else ""
            print(
                f"| {name} | {runtime} | {level or ''} | {got[0]['bytes'] / 1e6:.1f} | {len(got)} "
                f"| {decode:.1f} ({low:.1f} to {high:.1f}) | {times} | {beside_builder(here, got, 'decode')} "
                f"| {prefill:.0f} | {beside_builder(here, got, 'prefill')} |"
            )


def beside_builder(lines: list[dict], ours: list[dict], key: str) -> str:
    """Our figures over the builder's of the same round, runtime and level: median and quartiles of the ratios.

    A round's processes follow one another, so that both meet the machine at much the same speed.
    """
    if ours[0]["name"].startswith("builder"):
        return ""
    head = "builder int4" if "head" in ours[0]["name"] else "builder int4-head16"
    theirs = {
        (x.get("round"), x["engine"], x["level"]): x[key] for x in lines if x["name"] == head and "round" in x
    }
    pairs = [x[key] / theirs[at] for x in ours if (at := (x.get("round"), x["engine"], x["level"])) in theirs]
    return "{:.2f} ({:.2f} to {:.2f})".format(*spread(pairs)) if pairs else ""


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


# -- quality: how far the same files are from the dense model ------------------------------------------


def quality(args: argparse.Namespace) -> None:
    """KL divergence of each artifact's next-token distribution from the dense model's, over windows of a text."""
    import numpy as np
    import onnxruntime as ort
    import torch
    import transformers

    for model in args.models:
        folder = source(args.work, model)
        tokens = transformers.AutoTokenizer.from_pretrained(folder)(args.text.read_text(encoding="utf-8"))
        length, found = 256, tokens["input_ids"]
        windows = torch.tensor(found[: min(24, len(found) // length) * length]).view(-1, length)
        dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            right = torch.log_softmax(dense(windows).logits.double(), -1)
        print(
            f"{model}: {windows.numel()} tokens\n\n| model | level | KL, nats/token | same first choice |\n"
            "|---|---|---|---|"
        )
        for name, engine, artifact, level in variants(args.work, model):
            if engine != "ort" or (args.only and name not in args.only):
                continue
            session = ort.InferenceSession(f"{artifact}/model.onnx", providers=["CPUExecutionProvider"])
            decoder = json.loads((artifact / "genai_config.json").read_text())["model"]["decoder"]
            empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
            names = [i.name for i in session.get_inputs()]
            rows = []
            for window in windows:
                feeds = {n: empty for n in names if n.startswith("past")}
                feeds |= {"input_ids": window[None].numpy(), "attention_mask": np.ones((1, length), np.int64)}
                if "position_ids" in names:
                    feeds["position_ids"] = np.arange(length)[None]
                rows.append(torch.from_numpy(session.run(["logits"], feeds)[0]))
            got = torch.log_softmax(torch.cat(rows).double(), -1)
            kl = (right.exp() * (right - got)).sum(-1).mean()
            same = (right.argmax(-1) == got.argmax(-1)).double().mean()
            print(f"| {name} | {level} | {kl:.4f} | {same:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("action", choices=["prepare", "measure", "table", "quality"])
    parser.add_argument("--work", type=Path, default=ROOT / "build/bench")
    parser.add_argument("--genai", default=str(ROOT / ".peers/genai/bin/python"))
    parser.add_argument("--models", nargs="+", default=["7m", "2048"], choices=list(RECIPES))
    parser.add_argument("--recipes", nargs="*", help="prepare: only these")
    parser.add_argument(
        "--levels", nargs="*", type=int, choices=LEVELS, help="accuracy levels; all by default"
    )
    parser.add_argument("--only", nargs="*", help="names of variants")
    parser.add_argument("--engines", nargs="*", choices=["torch", "ort", "genai"])
    parser.add_argument("--again", action="store_true", help="prepare: export again")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--text", type=Path, help="quality: a text that the model was not trained on")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--others", type=float, default=0.1, help="CPUs that others may have during a run")
    args = parser.parse_args()
    {"prepare": prepare, "measure": measure, "table": table, "quality": quality}[args.action](args)


if __name__ == "__main__":
    main()
