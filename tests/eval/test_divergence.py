"""KL divergence against a direct float64 computation, and at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.errors import NumericsError, UsageError
from quantkit.eval import protocols, scoring
from quantkit.eval.divergence import divergence, quantile
from quantkit.eval.perplexity import perplexity

TEXT = torch.randint(3, 256, (300,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def pair(tiny: Callable[..., Path]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval() for _ in range(2)
    ]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in models[1].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return models[0], models[1]


def directly(pair: tuple[Any, Any], seqlen: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per token, in float64: KL, same top-1, log ratio and difference of the target's probabilities."""
    kl, same, shift, change = [], [], [], []
    for start in range(0, len(TEXT) - seqlen + 1, seqlen):
        ids = TEXT[start : start + seqlen]
        with torch.no_grad():
            logp, logq = (m(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1) for m in pair)
        kl.append((logp.exp() * (logp - logq)).sum(-1))
        same.append((logp.argmax(-1) == logq.argmax(-1)).double())
        shift.append((logp - logq).gather(1, ids[1:, None])[:, 0])
        change.append((logq.exp() - logp.exp()).gather(1, ids[1:, None])[:, 0])
    return torch.cat(kl), torch.cat(same), torch.cat(shift), torch.cat(change)


@pytest.mark.parametrize("batch", [1, 3])
def test_against_float64(pair: tuple[Any, Any], batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_CHUNK", 256 * 10)
    found = divergence(*pair, TEXT, protocols.gptq(60), batch=batch)
    kl, same, shift, change = directly(pair, 60)
    assert found.tokens == len(kl) == 5 * 59
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.kl_stderr == pytest.approx(float(kl.std()) / math.sqrt(len(kl)), rel=1e-4)
    for value, share in (
        (found.kl_median, 0.5),
        (found.kl_p99, 0.99),
        (found.kl_p999, 0.999),
        (found.kl_max, 1.0),
    ):
        assert value == pytest.approx(float(kl.quantile(share)), rel=1e-4)
    assert found.top1 == pytest.approx(float(same.mean()))
    assert found.top1_stderr == pytest.approx(math.sqrt(found.top1 * (1 - found.top1) / len(kl)))
    assert found.ppl_ratio == pytest.approx(math.exp(float(shift.mean())), rel=1e-5)
    assert found.ppl_ratio_stderr == pytest.approx(
        found.ppl_ratio * float(shift.std()) / math.sqrt(len(kl)), rel=1e-4
    )
    assert found.rms_dp == pytest.approx(float(change.square().mean().sqrt()), rel=1e-4)
    error = float(change.square().std()) / math.sqrt(
        len(kl)
    )  # of the mean square; of its root by the delta method
    assert found.rms_dp_stderr == pytest.approx(error / (2 * found.rms_dp), rel=1e-4)


def test_perplexities_are_those_of_perplexity(pair: tuple[Any, Any]) -> None:
    for protocol in (protocols.gptq(50), protocols.hqq(64, 32), protocols.llama_cpp(64)):
        found = divergence(*pair, TEXT, protocol, bos_token_id=1)
        for model, side in zip(pair, (found.reference, found.candidate), strict=True):
            alone = perplexity(model, TEXT, protocol, bos_token_id=1)
            assert side.ppl == pytest.approx(alone.ppl, rel=1e-6)
            assert side.stderr == pytest.approx(alone.stderr, rel=1e-6)
            assert (side.tokens, side.windows, side.protocol) == (alone.tokens, alone.windows, alone.protocol)
        assert found.ppl_ratio == pytest.approx(found.candidate.ppl / found.reference.ppl, rel=1e-6)


def test_a_model_does_not_diverge_from_itself(pair: tuple[Any, Any]) -> None:
    found = divergence(pair[0], pair[0], TEXT)
    assert found.kl_mean == found.kl_max == found.kl_stderr == 0.0
    assert (found.top1, found.ppl_ratio, found.ppl_ratio_stderr) == (1.0, 1.0, 0.0)


def test_it_is_not_symmetric(pair: tuple[Any, Any]) -> None:
    there, back = divergence(*pair, TEXT), divergence(pair[1], pair[0], TEXT)
    assert there.kl_mean != back.kl_mean and there.ppl_ratio == pytest.approx(1 / back.ppl_ratio)


class Table(torch.nn.Module):
    """Gives the same logits at every position."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.row = torch.tensor(logits)
        self.embedding = torch.nn.Embedding(len(logits), 1)
        self.config = SimpleNamespace()

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.row.expand(*input_ids.shape, -1))


def test_masked_logits() -> None:
    """A token that both models exclude counts nothing; one that only the candidate excludes costs infinity."""
    ids = torch.tensor([0, 1, 0, 1])
    off = -math.inf
    both = divergence(Table([0.0, 1.0, off]), Table([1.0, 1.0, off]), ids)
    p = torch.tensor([0.0, 1.0]).softmax(0)
    assert both.kl_mean == pytest.approx(float((p * (p / 0.5).log()).sum()))
    one = divergence(Table([0.0, 1.0, 0.5]), Table([1.0, 1.0, off]), ids)
    assert one.kl_mean == math.inf
    with pytest.raises(NumericsError, match="candidate gives NaN"):
        divergence(Table([0.0, 1.0]), Table([math.nan, 1.0]), ids)


def test_different_vocabularies_are_refused() -> None:
    with pytest.raises(UsageError, match="predicts 2 tokens and the candidate 3"):
        divergence(Table([0.0, 1.0]), Table([0.0, 1.0, 2.0]), torch.tensor([0, 1, 0]))


def test_quantile() -> None:
    values = torch.rand(101, generator=torch.Generator().manual_seed(0)).double()
    for share in (0.0, 0.37, 0.5, 0.999, 1.0):
        assert quantile(values.sort().values, share) == pytest.approx(float(values.quantile(share)))
    assert quantile(torch.tensor([1.0, math.inf]), 0.0) == 1.0
    assert quantile(torch.tensor([5.0]), 0.99) == 5.0
