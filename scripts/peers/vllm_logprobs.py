"""Log-probabilities of every next token as vLLM computes them, run by vLLM's own python; docs/peers.md.

    python vllm_logprobs.py --ids IDS.npy [--dtype bfloat16] MODEL [MODEL ...]

IDS.npy is int64 `[B, T]`. Writes `MODEL.vllm.npy`, float32 `[B, T - 1, V]`: row t is the distribution of
token t + 1. The last line of standard output is JSON: {model: "ok" or the error's last line}.
"""

from __future__ import annotations

import argparse
import json
import os
import traceback
from pathlib import Path
from typing import Any


def prepare() -> None:
    """vLLM on a CPU, in this process, without a network."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"{cores[-1]}")


def log_probs(model: Path, ids: Any, dtype: str) -> Any:
    """float32 `[B, T - 1, V]`."""
    import numpy as np
    from vllm import LLM, SamplingParams

    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    engine = LLM(
        model=str(model),
        dtype=dtype,
        max_model_len=ids.shape[1] + 1,
        max_num_seqs=4,
        max_logprobs=-1,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
    prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
    out = np.full((ids.shape[0], ids.shape[1] - 1, vocab), -np.inf, dtype=np.float32)
    for row, result in enumerate(engine.generate(prompts, settings, use_tqdm=False)):
        for at, found in enumerate(result.prompt_logprobs[1:]):
            for token, entry in found.items():
                out[row, at, token] = entry.logprob
    del engine
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("models", nargs="+", type=Path)
    args = parser.parse_args()
    prepare()
    import numpy as np

    ids = np.load(args.ids)
    said = {}
    for model in args.models:
        try:
            np.save(f"{model}.vllm.npy", log_probs(model, ids, args.dtype))
            said[str(model)] = "ok"
        except Exception as error:
            traceback.print_exc()
            said[str(model)] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:300]}"
    print(json.dumps(said))


if __name__ == "__main__":
    main()
