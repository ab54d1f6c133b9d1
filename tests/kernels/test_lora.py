"""Adapters train on top of every format as they do on top of the same weights, dense and frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.encoding import dequantize
from quantkit.kernels.reference import round_activation
from quantkit.linear import QuantLinear
from quantkit.load import load_tokenizer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pydoc-qwen2-3m"
STEPS = 8


class Adapter(nn.Module):
    """LoRA (Hu et al. 2021): y = base(x) + B A x, B zero at the start."""

    def __init__(self, base: nn.Module, n: int, k: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, k, generator=generator) / k**0.5)
        self.up = nn.Parameter(torch.zeros(n, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Dense(nn.Module):
    """The same layer in plain torch: dense frozen weights, straight-through rounding of inputs."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.packed = layer.packed
        self.weight = dequantize(self.packed)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        rounded = x + (round_activation(x, self.packed) - x).detach()
        return nn.functional.linear(rounded, self.weight, self.bias)


def losses(model: Any, tokens: Tensor, dense: bool) -> list[float]:
    """Loss of each training step with adapters on every quantized layer."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, QuantLinear)]
    assert layers
    for name, layer in layers:
        parent, _, leaf = name.rpartition(".")
        base = Dense(layer) if dense else layer
        adapter = Adapter(base, layer.out_features, layer.in_features, generator)
        setattr(model.get_submodule(parent), leaf, adapter)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    history = []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    return history


@pytest.mark.parametrize("name", ["nf4", "gptq", "awq", "hqq", "fp8", "ternary"])
def test_training_follows_the_dense_run(name: str, tmp_path: Path) -> None:
    quantkit.convert(EXAMPLE, tmp_path / "q", format=name, samples=2, seqlen=64, device="cpu")
    tokenizer = load_tokenizer(EXAMPLE)
    text = Path(quantkit.__file__).read_text(encoding="utf-8")
    tokens = torch.tensor([tokenizer(text)["input_ids"][:64]])
    packed = losses(quantkit.load(tmp_path / "q", dtype=torch.float32), tokens, dense=False)
    dense = losses(quantkit.load(tmp_path / "q", dtype=torch.float32), tokens, dense=True)
    assert packed[-1] < 0.9 * packed[0]
    # The same arithmetic up to the order of float32 sums. Where inputs are rounded (fp8, ternary), a sum's
    # last bit decides a tie now and then, and one int8 step is 1/127 of a token's largest input.
    tolerance = 0.02 if name in ("fp8", "ternary") else 1e-4
    assert packed == pytest.approx(dense, rel=tolerance)
