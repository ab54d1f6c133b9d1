"""Perplexity: every protocol against a direct float64 computation written from its own definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.errors import CalibrationError, NumericsError, UsageError
from quantkit.eval import protocols, scoring
from quantkit.eval.perplexity import perplexity, weighted_mean
from quantkit.eval.protocols import Protocol, resolve_protocol

TEXT = torch.randint(3, 256, (333,), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()


def logp(model: Any, ids: Tensor) -> Tensor:
    """float64 log-probabilities `[L, V]` of all positions."""
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0].double().log_softmax(-1)


def loss(model: Any, ids: Tensor, scored: range) -> Tensor:
    """Losses of the tokens at positions `scored`."""
    table = logp(model, ids)
    return torch.stack([-table[i - 1, ids[i]] for i in scored])


def gptq_directly(model: Any, ids: Tensor, seqlen: int) -> tuple[float, int]:
    """GPTQ's eval: loss * seqlen summed over windows, divided by windows * seqlen."""
    count = len(ids) // seqlen
    nlls = [
        loss(model, ids[i * seqlen : (i + 1) * seqlen], range(1, seqlen)).mean() * seqlen
        for i in range(count)
    ]
    return math.exp(float(torch.stack(nlls).sum()) / (count * seqlen)), count * (seqlen - 1)


def hqq_directly(model: Any, ids: Tensor, max_length: int, stride: int) -> tuple[float, int]:
    """The transformers guide: labels before the target length are masked, mean loss * target length."""
    lls, scored = [], 0
    for i in range(0, len(ids), stride):
        begin, end = max(i + stride - max_length, 0), min(i + stride, len(ids))
        target = end - i
        piece = ids[begin:end]
        positions = range(max(len(piece) - target, 1), len(piece))
        if len(positions) == 0:
            continue
        lls.append(loss(model, piece, positions).mean() * target)
        scored += len(positions)
    return math.exp(float(torch.stack(lls).sum()) / len(ids)), scored


def llama_cpp_directly(model: Any, ids: Tensor, n_ctx: int, bos: int | None) -> tuple[float, int, float]:
    """perplexity.cpp: logits first..n_ctx-2 predict tokens first+1..n_ctx-1 of every chunk."""
    first, losses = n_ctx // 2, []
    for start in range(0, len(ids) - n_ctx + 1, n_ctx):
        chunk = ids[start : start + n_ctx].clone()
        if bos is not None:
            chunk[0] = bos
        table = logp(model, chunk)
        losses += [-table[first + i, chunk[first + i + 1]] for i in range(n_ctx - 1 - first)]
    nll = torch.stack(losses)
    count = len(nll)
    mean, square = float(nll.mean()), float(nll.square().mean())
    return math.exp(mean), count, math.sqrt((square - mean * mean) / (count - 1)) * math.exp(mean)


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("seqlen", [2, 31, 64])
def test_gptq(model: Any, batch: int, seqlen: int) -> None:
    text = TEXT[: 10 * seqlen + 5]
    result = perplexity(model, text, protocols.gptq(seqlen), batch=batch)
    ppl, count = gptq_directly(model, text, seqlen)
    assert result.ppl == pytest.approx(ppl, rel=1e-5)
    assert (result.tokens, result.windows) == (count, len(text) // seqlen)
    assert 0 < result.stderr < result.ppl and result.tokens_per_second > 0
    assert result.nll == pytest.approx(math.log(ppl), abs=1e-5)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("length", "stride"), [(64, 32), (64, 48), (50, 7), (64, 83), (333, 332)])
def test_hqq(model: Any, batch: int, length: int, stride: int) -> None:
    if length > 128:
        text, length, stride = TEXT[:100], 100, 99  # the last window scores a single token
    else:
        text = TEXT
    if stride > length:
        stride = length // 2 + 1
    result = perplexity(model, text, protocols.hqq(length, stride), batch=batch)
    ppl, count = hqq_directly(model, text, length, stride)
    assert result.ppl == pytest.approx(ppl, rel=1e-5)
    assert result.tokens == count == len(text) - 1


def lm_eval_directly(model: Any, ids: Tensor, prefix: int, max_length: int) -> tuple[float, list[int]]:
    """loglikelihood_rolling: (summed loss, tokens predicted by each window), from its description."""
    tokens, total, counts, done = [prefix, *ids.tolist()], 0.0, [], 0
    while done < len(ids):
        count = min(max_length, len(ids) - done)
        stop = 1 + done + count
        start = max(0, stop - 1 - max_length)
        piece = torch.tensor(tokens[start:stop])
        table = logp(model, piece[:-1])
        for target in range(1 + done, stop):
            total -= float(table[target - 1 - start, tokens[target]])
        counts.append(count)
        done += count
    return total, counts


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("max_length", "size"), [(64, 333), (111, 333), (128, 100), (128, 128), (128, 129)])
def test_lm_eval(model: Any, batch: int, max_length: int, size: int) -> None:
    text = TEXT[:size]
    result = perplexity(model, text, protocols.lm_eval(max_length), batch=batch, bos_token_id=2)
    total, counts = lm_eval_directly(model, text, 2, max_length)
    assert result.tokens == size == sum(counts) and result.windows == len(counts)
    assert result.nll_total == pytest.approx(total, rel=1e-6)
    assert result.ppl == pytest.approx(math.exp(total / size), rel=1e-5)
    result.per_text(words=50, nbytes=700)
    assert result.word_ppl == pytest.approx(math.exp(total / 50), rel=1e-4)
    assert result.byte_ppl == pytest.approx(math.exp(total / 700), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(total / 700 / math.log(2), rel=1e-6)


def test_lm_eval_takes_all_positions_but_not_more(model: Any) -> None:
    result = perplexity(model, TEXT, "lm-eval", bos_token_id=1)
    assert result.protocol == "lm-eval (windows of 128)"
    assert resolve_protocol("lm_eval", 131072)[0].fed == 2048
    with pytest.raises(UsageError, match="positions"):
        perplexity(model, TEXT, protocols.lm_eval(129))


def test_window_replaces_the_protocols_own() -> None:
    assert resolve_protocol("gptq", 4096, 10**6, 512) == (protocols.gptq(512), "windows of 512 as asked")
    assert resolve_protocol("hqq", None, None, 256)[0] == protocols.hqq(256, 128)
    assert resolve_protocol("lm-eval", 4096, None, 4096)[0].fed == 4096
    for window in (1, 5000):
        with pytest.raises(UsageError, match="Choose from 2 to 4096"):
            resolve_protocol("llama.cpp", 4096, None, window)


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("n_ctx", [64, 33])
def test_llama_cpp(model: Any, bos: int | None, n_ctx: int) -> None:
    result = perplexity(model, TEXT, protocols.llama_cpp(n_ctx), bos_token_id=bos, batch=2)
    ppl, count, error = llama_cpp_directly(model, TEXT, n_ctx, bos)
    assert result.ppl == pytest.approx(ppl, rel=1e-5)
    assert result.tokens == count
    assert result.stderr == pytest.approx(error, rel=1e-4)


def test_published_window_sizes() -> None:
    assert protocols.gptq().windows(2048 * 3 + 5) == [
        protocols.Window(i * 2048, (i + 1) * 2048, 1) for i in range(3)
    ]
    first, second, third = protocols.hqq().windows(1300)
    assert (first.start, first.stop, first.first) == (0, 512, 1) and first.weight == 512 / 511
    assert (second.start, second.stop, second.first, second.weight) == (0, 1024, 512, 1.0)
    assert (third.start, third.stop, third.first, third.weight) == (512, 1300, 512, 1.0)
    windows = protocols.llama_cpp().windows(1600)
    assert [(w.start, w.stop, w.length - w.first) for w in windows] == [
        (i * 512, i * 512 + 512, 255) for i in range(3)
    ]
    with pytest.raises(CalibrationError, match="needs 1024"):
        protocols.llama_cpp().windows(1023)


def test_protocol_names() -> None:
    assert resolve_protocol("gptq", 4096, 10**6) == (protocols.gptq(2048), "")
    assert resolve_protocol("GPTQ", 1024, 10**6)[0].length == 1024
    shorter, remark = resolve_protocol("gptq", None, 300)
    assert shorter.length == 300 and "2048" in remark
    assert resolve_protocol("llama.cpp", 4096)[0] == protocols.llama_cpp() == resolve_protocol("llama_cpp")[0]
    assert resolve_protocol("hqq", 512)[0] == protocols.hqq(512, 256)
    with pytest.raises(UsageError, match="Did you mean 'gptq'"):
        resolve_protocol("gtpq")
    with pytest.raises(UsageError, match="longer than the model's 128"):
        resolve_protocol(protocols.gptq(256), 128)
    for name in ("gptq", "hqq", "llama.cpp"):
        assert name in resolve_protocol(name)[0].describe()


def test_defaults_follow_the_model(model: Any) -> None:
    result = perplexity(model, TEXT)  # 128 positions
    assert result.protocol == "gptq (windows of 128)" and result.windows == 2
    with pytest.raises(UsageError, match="positions"):
        perplexity(model, TEXT, protocols.gptq(256))


def test_short_and_foreign_ids_are_refused(model: Any) -> None:
    with pytest.raises(CalibrationError, match="1 tokens"):
        perplexity(model, TEXT[:1])
    with pytest.raises(CalibrationError, match="needs 64"):
        perplexity(model, TEXT[:63], protocols.gptq(64))
    with pytest.raises(UsageError, match="token id 256 is outside the 256 tokens"):
        perplexity(model, torch.tensor([3, 256, 4]))
    assert perplexity(model, TEXT[:2]).tokens == 1


def test_logits_are_widened_in_small_pieces(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = perplexity(model, TEXT, protocols.gptq(64))
    sizes = []
    plain = torch.logsumexp

    def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(x.numel())
        assert x.dtype == torch.float32
        return plain(x, *args, **kwargs)

    monkeypatch.setattr(scoring, "_CHUNK", 256 * 5)
    monkeypatch.setattr(torch, "logsumexp", watched)
    parts = perplexity(model, TEXT, protocols.gptq(64), batch=3)
    assert max(sizes) == 256 * 5 and len(sizes) > 60
    assert parts.ppl == pytest.approx(whole.ppl, rel=1e-6)


def test_unscored_logits_are_not_computed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: rows.append(x.shape[1]) or forward(x))
    perplexity(model, TEXT, protocols.llama_cpp(64))
    assert set(rows) == {32}


def test_models_without_logits_to_keep(model: Any) -> None:
    class Plain(torch.nn.Module):
        config = model.config

        def get_input_embeddings(self) -> Any:
            return model.get_input_embeddings()

        def forward(self, input_ids: Tensor) -> Any:
            return model(input_ids=input_ids)

    protocol = protocols.llama_cpp(64)
    assert perplexity(Plain(), TEXT, protocol).ppl == pytest.approx(
        perplexity(model, TEXT, protocol).ppl, rel=1e-6
    )


def test_nan_and_wrong_heads(model: Any, tiny: Callable[..., Path]) -> None:
    from transformers import AutoModelForMaskedLM

    bert = AutoModelForMaskedLM.from_pretrained(tiny("bert"))
    with pytest.raises(UsageError, match="BertForMaskedLM"):
        perplexity(bert, TEXT)
    with torch.no_grad():
        kept = model.model.norm.weight.clone()
        model.model.norm.weight[0] = torch.nan
    try:
        with pytest.raises(NumericsError, match="mine gives NaN for 126"):
            perplexity(model, TEXT[:127], name="mine")
    finally:
        with torch.no_grad():
            model.model.norm.weight.copy_(kept)


def test_bfloat16_logits(tiny: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    half = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.bfloat16).eval()
    assert perplexity(half, TEXT, protocols.gptq(64)).ppl == pytest.approx(
        gptq_directly(half, TEXT, 64)[0], rel=1e-5
    )


def test_progress_and_weights(model: Any) -> None:
    seen: list[tuple[int, int]] = []
    perplexity(
        model, TEXT, protocols.gptq(64), batch=2, on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    mean, error = weighted_mean(values, torch.ones(3, dtype=torch.float64))
    assert mean == pytest.approx(7 / 3)
    assert error == pytest.approx(float(values.std()) / math.sqrt(3))
    assert weighted_mean(values[:1], torch.ones(1)) == (1.0, 0.0)


def test_every_family_runs(tiny: Callable[..., Path]) -> None:
    """Gemma caps its logits, GPT-2 names its positions differently: the model's own head must be used."""
    from transformers import AutoModelForCausalLM

    for family in ("gemma2", "gpt2", "qwen3_moe"):
        model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
        result = perplexity(model, TEXT, Protocol("mine", 64, 64, 40))
        expected = torch.cat([loss(model, TEXT[i : i + 64], range(40, 64)) for i in range(0, 320, 64)])
        assert result.nll == pytest.approx(float(expected.mean()), rel=1e-5), family
