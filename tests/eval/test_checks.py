"""The built-in checks: right by construction for models that know, or do not know, the answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.eval.checks import run_checks
from quantkit.load import load, load_tokenizer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pydoc-llama-7m"


class Copier(torch.nn.Module):
    """Predicts what followed the last occurrence of the last two tokens: a perfect induction head."""

    def __init__(self, vocabulary: int, strength: float) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, 1)
        self.strength = strength
        self.config = SimpleNamespace(max_position_embeddings=600)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor) -> Any:
        rows, count = input_ids.shape
        logits = torch.zeros(rows, count, self.embedding.num_embeddings)
        for r in range(rows):
            ids = input_ids[r].tolist()
            last: dict[tuple[int, ...], int] = {}
            for t in range(2, count):
                context = tuple(ids[t - 2 : t + 1])
                if context in last:
                    logits[r, t, last[context]] = self.strength
                if t + 1 < count:
                    last[context] = ids[t + 1]
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def tokenizer(tiny: Callable[..., Path]) -> Any:
    return load_tokenizer(tiny("llama"))


def test_a_perfect_copier(tokenizer: Any) -> None:
    passkey, copying, arithmetic = run_checks(Copier(256, 20.0), tokenizer)
    assert passkey.accuracy == 1.0 and passkey.gain > 3
    assert copying.accuracy > 0.75 and copying.gain > 3  # words that begin alike leave it a few mistakes
    assert arithmetic.items == 16 and arithmetic.chance == 0.1
    assert passkey.stderr == 0.0


def test_a_model_that_knows_nothing(tokenizer: Any) -> None:
    passkey, copying, arithmetic = run_checks(Copier(256, 0.0), tokenizer)
    assert passkey.gain == pytest.approx(0, abs=1e-6) and passkey.accuracy == 0.0  # ties are not wins
    assert copying.gain == pytest.approx(0, abs=1e-5) and copying.accuracy < 0.1
    assert arithmetic.gain == pytest.approx(0, abs=1e-5) and arithmetic.accuracy < 0.5


def test_seeds_and_short_models(tokenizer: Any) -> None:
    model = Copier(256, 5.0)
    assert run_checks(model, tokenizer, seed=1) == run_checks(model, tokenizer, seed=1)
    assert run_checks(model, tokenizer, seed=1)[1] != run_checks(model, tokenizer, seed=2)[1]
    model.config.max_position_embeddings = 60
    assert [score.name for score in run_checks(model, tokenizer)] == ["arithmetic"]


def test_the_example_can_be_measured() -> None:
    """The shipped model retrieves and copies well above chance, so a loss would show."""
    if not (EXAMPLE / "model.safetensors").is_file():
        pytest.skip("the example checkpoint is not here")
    found = {c.name: c for c in run_checks(load(EXAMPLE, dtype="float32"), load_tokenizer(EXAMPLE))}
    assert found["passkey"].accuracy >= 0.9 and found["passkey"].gain > 0.5
    assert found["copying"].accuracy > 0.15 and found["copying"].gain > 1.5
    assert found["arithmetic"].gain > 0
