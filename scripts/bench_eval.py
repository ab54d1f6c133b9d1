#!/usr/bin/env python3
"""Tokens per second of our perplexity against lm-evaluation-harness's own loop, and the cache's error.

Both sides get the same loaded model, the same token ids and the same windows, one after another, several times; the
sums of log-likelihoods are compared. Run it with a Python that has lm-eval:

    python scripts/bench_eval.py examples/pydoc-llama-7m --tokens 16384 --threads 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def timed(work: Callable[[], Any], runs: int) -> tuple[Any, list[float]]:
    work()
    times, result = [], None
    for _ in range(runs):
        began = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - began)
    return result, times


def rates(tokens: int, times: list[float]) -> str:
    return (
        f"{tokens / statistics.median(times):.0f} tokens/s "
        f"({tokens / max(times):.0f} to {tokens / min(times):.0f})"
    )


def against_harness(args: argparse.Namespace, model: Any, tokenizer: Any) -> None:
    import lm_eval
    from lm_eval.api.instance import Instance

    from quantkit.eval import protocols
    from quantkit.eval.perplexity import perplexity
    from quantkit.eval.tasks import harness_model
    from quantkit.eval.text import load_text

    text = tokenizer.decode(load_text("builtin", tokenizer, args.tokens).ids, skip_special_tokens=True)
    print(f"lm-eval {lm_eval.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for batch in args.batches:
        wrapped = harness_model(model, tokenizer, batch=batch, max_length=args.length)
        ids = torch.tensor(wrapped.tok_encode(text))
        request = [Instance("loglikelihood_rolling", {}, (text,), 0)]
        protocol = protocols.lm_eval(args.length)

        def theirs(wrapped: Any = wrapped, request: Any = request) -> float:
            return float(wrapped.loglikelihood_rolling(request, disable_tqdm=True)[0])

        def ours(
            wrapped: Any = wrapped, ids: Any = ids, protocol: Any = protocol, batch: int = batch
        ) -> float:
            return -perplexity(
                model, ids, protocol, bos_token_id=wrapped.prefix_token_id, batch=batch
            ).nll_total

        first, first_times = timed(theirs, args.runs)
        second, second_times = timed(ours, args.runs)
        ratio = statistics.median(first_times) / statistics.median(second_times)
        print(
            f"batch {batch}: lm-eval {rates(len(ids), first_times)}, quantkit {rates(len(ids), second_times)}, "
            f"ratio {ratio:.2f}; log-likelihoods {first:.4f} and {second:.4f}, "
            f"relative difference {abs(first / second - 1):.1e}"
        )


def cache_error(args: argparse.Namespace, model: Any, tokenizer: Any) -> None:
    from quantkit.eval import protocols, reference_cache, reference_rows
    from quantkit.eval.divergence import divergence
    from quantkit.eval.text import load_text
    from quantkit.load import load

    ids = load_text("builtin", tokenizer, args.tokens).ids
    protocol = protocols.gptq(args.length)
    candidate = load(args.candidate, dtype="float32")
    direct = divergence(model, candidate, ids, protocol)
    same = reference_rows.Recorder._same
    print(f"direct: KL {direct.kl_mean:.8f}, median {direct.kl_median:.8f}, 99.9 % {direct.kl_p999:.6f}")
    for form in ("hidden", "codes"):
        reference_rows.Recorder._same = same if form == "hidden" else lambda *_: False  # type: ignore[assignment]
        with tempfile.TemporaryDirectory() as folder:
            cached = reference_cache.record_reference(model, ids, protocol, Path(folder) / "c", {})
            found = divergence(cached, candidate, ids, protocol)
            assert cached.form == form
            print(
                f"{form}: {cached.nbytes / 1e6:.1f} MB for {cached.rows} tokens; relative error of the mean KL "
                f"{abs(found.kl_mean / direct.kl_mean - 1):.1e}, of the median "
                f"{abs(found.kl_median / direct.kl_median - 1):.1e}, of the 99.9 % "
                f"{abs(found.kl_p999 / direct.kl_p999 - 1):.1e}"
            )
    reference_rows.Recorder._same = same  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--candidate", type=Path, help="a quantized checkpoint: measure the cache's error too"
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batches", type=json.loads, default=[1, 4])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from quantkit.load import load, load_tokenizer

    model, tokenizer = load(args.model, dtype="float32"), load_tokenizer(args.model)
    if args.candidate:
        cache_error(args, model, tokenizer)
    against_harness(args, model, tokenizer)


if __name__ == "__main__":
    main()
