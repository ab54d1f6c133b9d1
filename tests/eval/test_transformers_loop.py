"""The published evaluation loops, written with transformers alone, give the same figures on the shipped example.

Nothing of quantkit runs in the loops: transformers loads the model and computes the loss (`labels=`), as GPTQ's script
and the transformers guide do.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pydoc-llama-7m"
WINDOW = 256


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that ends in the middle of a window."""
    from quantkit.builtin_text import text

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text("eval", max_chars=7000), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def stock(text: Path) -> tuple[Any, Tensor]:
    """The model and the token ids `[1, T]` as transformers alone gives them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()
    return model, tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]


def gptq_script(model: Any, ids: Tensor) -> float:
    """IST-DASLab/gptq: mean over whole windows of the mean loss of all tokens but the first."""
    count = ids.shape[1] // WINDOW
    nlls = []
    for i in range(count):
        batch = ids[:, i * WINDOW : (i + 1) * WINDOW]
        nlls.append(model(batch, labels=batch).loss.double() * WINDOW)
    return math.exp(float(torch.stack(nlls).sum()) / (count * WINDOW))


def transformers_guide(model: Any, ids: Tensor) -> float:
    """The strided loop of the guide: tokens seen before are masked with -100. It counts `trg_len` per window, one more
    than the tokens scored in the first window."""
    nlls, seen, stride = [], 0, WINDOW // 2
    for new in range(0, ids.shape[1], stride):
        begin, end = max(new + stride - WINDOW, 0), min(new + stride, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - new)] = -100
        nlls.append(model(ids[:, begin:end], labels=labels).loss.double() * (end - new))
        seen += end - new
    return math.exp(float(torch.stack(nlls).sum()) / seen)


def second_halves(model: Any, ids: Tensor) -> float:
    """llama.cpp's rule: of every window, whose first token becomes BOS, only those after the middle one count."""
    total, count = 0.0, 0
    for start in range(0, ids.shape[1] - WINDOW + 1, WINDOW):
        batch = ids[:, start : start + WINDOW].clone()
        batch[:, 0] = model.config.bos_token_id
        labels = batch.clone()
        labels[:, : WINDOW // 2 + 1] = -100
        scored = WINDOW - (WINDOW // 2 + 1)
        total += float(model(batch, labels=labels).loss.double()) * scored
        count += scored
    return math.exp(total / count)


def every_token_once(model: Any, ids: Tensor) -> float:
    """lm-eval's rule: BOS, then every token of the text is predicted once, the last window reaching back."""
    ids = torch.cat([torch.tensor([[model.config.bos_token_id]]), ids], dim=1)
    total, done, length = 0.0, 1, ids.shape[1]
    while done < length:
        stop = min(done + WINDOW, length)
        begin = max(stop - WINDOW - 1, 0)
        labels = ids[:, begin:stop].clone()
        labels[:, : done - begin] = -100
        total += float(model(ids[:, begin:stop], labels=labels).loss.double()) * (stop - done)
        done = stop
    return math.exp(total / (length - 1))


LOOPS = {
    "gptq": gptq_script,
    "hqq": transformers_guide,
    "llama.cpp": second_halves,
    "lm-eval": every_token_once,
}


@pytest.mark.parametrize("protocol", LOOPS)
def test_the_same_perplexity(stock: tuple[Any, Tensor], text: Path, protocol: str) -> None:
    with torch.inference_mode():
        want = LOOPS[protocol](*stock)
    found = quantkit.evaluate(
        EXAMPLE, data=text, protocol=protocol, window=WINDOW, dtype="float32", checks=False
    )
    ppl = found.rows[0].perplexity
    assert ppl.ppl == pytest.approx(want, rel=1e-4)
    assert stock[1].shape[1] % WINDOW and ppl.tokens > 3 * WINDOW / 2
