"""Extreme weights through every format: a finite result close to the weight, or a refusal that says why."""

from __future__ import annotations

import pytest
import torch

from quantkit.encoding import dequantize
from quantkit.errors import NumericsError
from quantkit.formats import FORMATS, get_format
from quantkit.formats.base import LayerStats

N, K = 16, 64


def outlier(w: torch.Tensor) -> None:
    w[3, 5] = 1e30


def overflow_of_bf16(w: torch.Tensor) -> None:
    w[3, 5] = 3.4e38  # rounds to infinity in bfloat16


def subnormal(w: torch.Tensor) -> None:
    w.mul_(1e-40)


def zero_row(w: torch.Tensor) -> None:
    w[2] = 0


def all_zero(w: torch.Tensor) -> None:
    w.zero_()


def constant(w: torch.Tensor) -> None:
    w.fill_(0.375)


def constant_row(w: torch.Tensor) -> None:
    w[1] = -7.5


def dead_columns(w: torch.Tensor) -> None:
    w[:, ::3] = 0


WEIGHTS = [outlier, overflow_of_bf16, subnormal, zero_row, all_zero, constant, constant_row, dead_columns]


def singular(x: torch.Tensor) -> None:
    x[:] = x[:1]  # rank one


def dead_channels(x: torch.Tensor) -> None:
    x[:, ::2] = 0


def nothing_seen(x: torch.Tensor) -> None:
    x.zero_()


def ordinary(x: torch.Tensor) -> None:
    pass


@pytest.mark.parametrize("spoil_input", [ordinary, singular, dead_channels, nothing_seen])
@pytest.mark.parametrize("spoil", WEIGHTS)
@pytest.mark.parametrize("name", FORMATS)
def test_finite_or_refused(name: str, spoil, spoil_input) -> None:
    fmt = get_format(name)
    config = fmt.Config(**({"group_size": 16} if name in ("gptq", "awq", "hqq") else {}))
    weight, x = torch.randn(N, K) * 0.1, torch.randn(96, K)
    spoil(weight)
    spoil_input(x)
    stats = LayerStats(96, x.T @ x, x.abs().sum(0), x.abs().amax(0))
    try:
        packed = fmt.quantize(weight.clone(), config, stats)
    except NumericsError as error:
        assert spoil in (outlier, overflow_of_bf16), error
        assert "weight" in str(error)
        return
    dense = dequantize(fmt.from_checkpoint(fmt.to_checkpoint(packed, config), config, (N, K)))
    assert torch.isfinite(dense).all()
    if spoil is all_zero:
        # ternary and codebook scales cannot be zero everywhere; what they give must be next to nothing
        assert float(dense.abs().max()) < 1e-6
    elif spoil not in (outlier, overflow_of_bf16, subnormal):
        error = float((dense - weight).norm() / weight.norm())
        assert error < (1.0 if name == "ternary" else 0.25), error
