#!/usr/bin/env python3
"""Train the small example checkpoints on the built-in offline text.

``--arch llama`` trains a Llama model of 6.8 M parameters, ``--arch qwen2`` a Qwen2 model
of 3.3 M with biases, tied embeddings and an intermediate size that 128 does not divide.
Both use a byte-level BPE tokenizer of 4096 tokens trained on the same text::

    python scripts/train_example.py --arch llama --out examples/pydoc-llama-7m
    python scripts/train_example.py --arch qwen2 --out examples/pydoc-qwen2-3m

The text depends on the Python version.  To train elsewhere on the text of this machine,
write it out with ``--dump-corpus DIR``, carry ``DIR`` there and pass ``--corpus DIR``.

The model is trained on the ``train`` split; the kept weights are those with the lowest
loss on the ``calibration`` split; the ``eval`` split is only used for the final figures.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

Split = Literal["train", "calibration", "eval"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "eval")
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
VOCAB_SIZE = 4096
SEQ_LEN = 512
MAX_POSITION = 1024
ROPE_THETA = 50000.0


class Recipe(NamedTuple):
    """The tuned training length and regularization of one architecture."""

    steps: int
    lr: float
    weight_decay: float


RECIPES = {
    "llama": Recipe(steps=2000, lr=2e-3, weight_decay=3.0),
    "qwen2": Recipe(steps=2600, lr=3e-3, weight_decay=3.0),
}


def main() -> None:
    args = parse_args()
    if args.dump_corpus is not None:
        dump_corpus(args.dump_corpus)
        return
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = pick_device(args.device)
    corpus, corpus_python = load_corpus(args.corpus)
    tokenizer = train_tokenizer(corpus["train"])
    ids = {split: encode(tokenizer, corpus[split]) for split in SPLITS}
    print(", ".join(f"{split} {len(ids[split])} tokens" for split in SPLITS), flush=True)

    model = build_model(args.arch).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.arch}: {parameters} parameters on {device_name(device)}", flush=True)
    save_tokenizer(tokenizer, model, args.out)
    check_tokenizer(args.out, corpus["eval"], ids["eval"])
    report = train(model, ids["train"], ids["calibration"], args, device)
    model.to(torch.bfloat16).float()  # the figures are those of the weights as saved
    report |= {
        "train_loss": mean_loss(model, ids["train"][: len(ids["eval"])], device),
        "calibration_loss": mean_loss(model, ids["calibration"], device),
        "eval_loss": mean_loss(model, ids["eval"], device),
        "unigram_perplexity": unigram_perplexity(ids["train"], ids["eval"]),
        "eval_chars": sum(map(len, corpus["eval"])),
        "eval_tokens": len(ids["eval"]),
        "train_tokens": len(ids["train"]),
        "parameters": parameters,
        "corpus_python": corpus_python,
        "hardware": device_name(device),
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=2), flush=True)
    model.to("cpu", torch.bfloat16).save_pretrained(args.out)
    # Transformers 4 and some other readers know these two settings by their old names.
    patch_json(args.out / "config.json", {"rope_theta": ROPE_THETA, "torch_dtype": "bfloat16"})
    (args.out / "README.md").write_text(model_card(args, report), encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=sorted(RECIPES), default="llama")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimizer steps (default: by architecture)")
    length.add_argument("--minutes", type=float, help="train for this long instead")
    parser.add_argument("--batch", type=int, default=32, help="sequences of 512 tokens per step")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--eval-every", type=int, default=100, help="steps between validations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="use torch.compile (default: on an accelerator)",
    )
    parser.add_argument("--corpus", type=Path, help="folder that --dump-corpus wrote")
    parser.add_argument("--dump-corpus", type=Path, help="write the corpus there and stop")
    args = parser.parse_args()
    if args.out is None and args.dump_corpus is None:
        parser.error("--out is required")
    recipe = RECIPES[args.arch]
    args.steps = args.steps or recipe.steps
    args.lr = recipe.lr if args.lr is None else args.lr
    if args.weight_decay is None:
        args.weight_decay = recipe.weight_decay
    return args


def builtin_corpus() -> dict[Split, list[str]]:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from quantkit import builtin_text

    return {split: [doc.text for doc in builtin_text.documents(split)] for split in SPLITS}


def dump_corpus(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in builtin_corpus().items():
        lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{split}: {len(texts)} documents, {sum(map(len, texts))} characters")
    (folder / "python_version.txt").write_text(platform.python_version() + "\n")


def load_corpus(folder: Path | None) -> tuple[dict[Split, list[str]], str]:
    """Return the texts of every split and the Python version that they come from."""
    if folder is None:
        return builtin_corpus(), platform.python_version()
    corpus: dict[Split, list[str]] = {}
    for split in SPLITS:
        with open(folder / f"{split}.jsonl", encoding="utf-8") as lines:
            corpus[split] = [json.loads(line) for line in lines]
    return corpus, (folder / "python_version.txt").read_text().strip()


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # Transformers splits the text of every qwen2 checkpoint like this, whatever the
    # checkpoint's tokenizer.json says; a tokenizer trained otherwise would be misread.
    qwen2 = Qwen2Tokenizer().backend_tokenizer
    tokenizer.normalizer = qwen2.normalizer
    tokenizer.pre_tokenizer = qwen2.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = ("<s>", SPECIAL_TOKENS.index("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITION,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return the token ids of the documents, each between ``<s>`` and ``</s>``."""
    rows = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    end = SPECIAL_TOKENS.index("</s>")
    return torch.tensor([token for row in rows for token in (*row, end)], dtype=torch.long)


def build_model(arch: str) -> PreTrainedModel:
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "max_position_embeddings": MAX_POSITION,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "pad_token_id": SPECIAL_TOKENS.index("<pad>"),
        "bos_token_id": SPECIAL_TOKENS.index("<s>"),
        "eos_token_id": SPECIAL_TOKENS.index("</s>"),
    }
    if arch == "llama":
        common |= {"intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 32}
        common |= {"num_attention_heads": 8, "num_key_value_heads": 4}
        return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **common))
    common |= {"intermediate_size": 480, "num_hidden_layers": 4}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **common))


def pick_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU ({platform.machine()})"
    return str(torch.get_device_module(device).get_device_name())


def autocast(device: torch.device) -> torch.autocast:
    """Compute in bf16 on an accelerator; CPUs without bf16 arithmetic are slow at it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type != "cpu")


def token_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of predicting each next token."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def batches(ids: torch.Tensor, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield batches of windows for ever; an epoch shifts the windows and shuffles them."""
    while True:
        shift = int(torch.randint(SEQ_LEN, (), generator=generator))
        starts = torch.arange(shift, len(ids) - SEQ_LEN, SEQ_LEN)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for chosen in starts[: len(starts) // batch * batch].split(batch):
            offsets = chosen.to(ids.device)[:, None] + torch.arange(SEQ_LEN + 1, device=ids.device)
            yield ids[offsets]


def train(
    model: torch.nn.Module,
    train_ids: torch.Tensor,
    validation_ids: torch.Tensor,
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Train in bf16 autocast with fp32 weights and leave the best weights in ``model``."""
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type != "cpu")
    use_compile = device.type != "cpu" if args.compile is None else args.compile
    step_loss = torch.compile(token_loss) if use_compile else token_loss
    source = batches(train_ids.to(device), args.batch, torch.Generator().manual_seed(args.seed))
    best_loss, best_step = math.inf, 0
    best_state = copy.deepcopy(model.state_dict())
    start = time.monotonic()
    step, progress = 0, 0.0
    while progress < 1:
        rate = args.lr * learning_rate_factor(progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with autocast(device):
            loss = step_loss(model, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if args.minutes is None:
            progress = step / args.steps
        else:
            progress = (time.monotonic() - start) / (60 * args.minutes)
        if step % args.eval_every == 0 or progress >= 1:
            validation = mean_loss(model, validation_ids, device)
            if validation < best_loss:
                best_loss, best_step = validation, step
                best_state = copy.deepcopy(model.state_dict())
            print(
                f"step {step}  lr {rate:.2e}  train {loss.item():.4f}  "
                f"validation {validation:.4f}  {time.monotonic() - start:.0f} s",
                flush=True,
            )
    model.load_state_dict(best_state)
    return {
        "steps": step,
        "best_step": best_step,
        "tokens_seen": step * args.batch * SEQ_LEN,
        "seconds": round(time.monotonic() - start, 1),
    }


def learning_rate_factor(progress: float) -> float:
    """Warm up linearly over 4 % of the run, then follow a cosine to zero."""
    if progress < 0.04:
        return max(progress, 1e-3) / 0.04
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.04) / 0.96))


@torch.no_grad()
def mean_loss(model: torch.nn.Module, ids: torch.Tensor, device: torch.device) -> float:
    """Return the mean loss per token over whole windows that do not overlap."""
    windows = ids[: 1 + (len(ids) - 1) // SEQ_LEN * SEQ_LEN].to(device)
    windows = windows.unfold(0, SEQ_LEN + 1, SEQ_LEN)
    total = 0.0
    for chunk in windows.split(32):
        with autocast(device):
            total += float(token_loss(model, chunk)) * len(chunk)
    return total / len(windows)


def unigram_perplexity(train_ids: torch.Tensor, eval_ids: torch.Tensor) -> float:
    """Return the perplexity of add-one smoothed token frequencies."""
    counts = torch.bincount(train_ids, minlength=VOCAB_SIZE).double() + 1
    return math.exp(-float((counts / counts.sum()).log()[eval_ids].mean()))


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, model: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    patch_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def check_tokenizer(folder: Path, texts: list[str], expected: torch.Tensor) -> None:
    """Make sure that the checkpoint's users get the token ids that the model is trained on."""
    loaded = AutoTokenizer.from_pretrained(folder)
    if len(loaded) != VOCAB_SIZE or not torch.equal(encode(loaded, texts), expected):
        raise RuntimeError(f"the tokenizer in {folder} does not load as it was trained")


def patch_json(path: Path, changes: dict[str, Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_card(args: argparse.Namespace, report: dict[str, Any]) -> str:
    loss = report["eval_loss"]
    bits = loss / math.log(2) * report["eval_tokens"] / report["eval_chars"]
    seen, size = report["tokens_seen"], report["train_tokens"]
    rows = {
        "corpus": f"`quantkit.builtin_text` of CPython {report['corpus_python']}, {size:,} tokens",
        "steps": f"{report['steps']} of {args.batch} x {SEQ_LEN} tokens: {seen:,} tokens, "
        f"{seen / size:.1f} epochs; the weights are those of step {report['best_step']}",
        "optimizer": f"AdamW, peak learning rate {args.lr:g} with a cosine schedule, "
        f"weight decay {args.weight_decay:g}, seed {args.seed}",
        "precision": "bf16 autocast (on an accelerator) over fp32 weights, saved as bf16",
        "loss per token, train split": f"{report['train_loss']:.4f} (its first tokens)",
        "loss per token, calibration split": f"{report['calibration_loss']:.4f} (chose the step)",
        "loss per token, eval split": f"{loss:.4f} ({report['eval_tokens']:,} tokens, windows of {SEQ_LEN})",
        "**perplexity, eval split**": f"**{math.exp(loss):.2f}** ({bits:.3f} bits per character)",
        "perplexity of unigrams, eval split": f"{report['unigram_perplexity']:.1f}",
        "training": f"{report['seconds']:.0f} s on {report['hardware']}, torch {report['torch']}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""# {args.out.name}

A {args.arch.capitalize()} language model of {report["parameters"]:,} parameters, trained from
scratch on Python's documentation topics, docstrings and standard-library sources, so that
quantkit has a checkpoint to work on offline. It imitates such text and has no other use.

| | |
| --- | --- |
{table}

Trained with `{shlex.join(["python", *sys.argv])}`.
`--corpus` names a folder that `python scripts/train_example.py --dump-corpus DIR` wrote under
the Python version above; without it the text of the running Python is used.

Licence: the weights are under Apache-2.0. The training text, from which the tokenizer's
vocabulary and the weights derive, is part of CPython and stands under the PSF licence.
"""


if __name__ == "__main__":
    main()
