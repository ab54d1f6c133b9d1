"""AWQ's scale search and clip search on small random problems."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from quantkit.algorithms.awq import (
    _prepare,
    fit_clipped,
    quantize_awq,
    rescale_stats,
    scaled_loss,
    smooth_layer,
    unrepairable,
)
from quantkit.algorithms.grid import AffineGrid, encode, minmax
from quantkit.formats.awq import AWQConfig
from quantkit.formats.base import LayerStats
from quantkit.topology import ScaleGroup

K, T = 64, 512


class Block(nn.Module):
    """norm -> (q, v), v -> o: what a decoder layer is to the search."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K)
        self.q = nn.Linear(K, 32, bias=False)
        self.v = nn.Linear(K, K, bias=True)
        self.o = nn.Linear(K, 24, bias=False)
        with torch.no_grad():
            self.norm.weight.mul_(torch.exp(torch.randn(K)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return torch.cat([self.q(h), self.o(self.v(h))], -1)


GROUPS = [
    ScaleGroup("norm", "rmsnorm", ("q", "v"), K),
    ScaleGroup("v", "linear_rows", ("o",), K, rows=(0, K)),
]


def stats_of(x: Tensor) -> LayerStats:
    return LayerStats(x.shape[0], x.t() @ x, x.abs().sum(0))


def problem() -> tuple[Block, Tensor, dict[str, LayerStats]]:
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    x = torch.randn(T, K) @ (torch.eye(K) + 0.2 * torch.randn(K, K)) * torch.exp(torch.randn(K))
    h = block.norm(x)
    shared = stats_of(h)
    return block, x, {"q": shared, "v": shared, "o": stats_of(block.v(h))}


def config(**changes: object) -> AWQConfig:
    return AWQConfig(group_size=32, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("feedback", [True, False])
def test_smoothing_keeps_the_function_and_lowers_the_loss(feedback: bool) -> None:
    block, x, stats = problem()
    before = block(x)
    own = config(feedback=feedback)
    reports = smooth_layer(block, GROUPS, stats, own, {"q": own, "v": own, "o": own})
    assert float((block(x) - before).norm() / before.norm()) < 1e-5
    assert [r.producer for r in reports] == ["norm", "v"]
    assert all(r.loss_after <= r.loss_before for r in reports)
    assert reports[0].loss_after < 0.9 * reports[0].loss_before


def test_statistics_follow_into_the_scaled_space() -> None:
    block, x, stats = problem()
    own = config()
    smooth_layer(block, GROUPS, stats, own, {"q": own, "v": own, "o": own})
    h = block.norm(x)
    for path, seen in (("q", h), ("v", h), ("o", block.v(h))):
        real = stats_of(seen)
        slack = 1e-2 * float(real.hessian.abs().mean())
        assert torch.allclose(stats[path].hessian, real.hessian, rtol=1e-3, atol=slack)
        assert torch.allclose(stats[path].abs_sum, real.abs_sum, rtol=1e-4)


def test_the_loss_is_the_error_of_the_output() -> None:
    """scaled_loss from H equals the squared error of the real outputs, computed from the inputs."""
    block, x, _ = problem()
    h = block.norm(x)
    own = config(feedback=False)
    scale = torch.exp(0.5 * torch.randn(K))
    linear = _prepare(block.q.weight, h.t() @ h, own, own)
    rows = (block.q.weight * scale).view(-1, 32)
    grid = AffineGrid(4, symmetric=False, search="minmax")
    s, z = (v.unsqueeze(1) for v in minmax(rows, grid))
    dense = ((encode(rows, s, z, 15) - z) * s).view(32, K) / scale
    real = (h.double() @ (dense - block.q.weight).t().double()).square().sum()
    assert float(scaled_loss(linear, scale)) == pytest.approx(float(real), rel=1e-3)


def test_rescale_stats_leaves_the_original_alone() -> None:
    stats = stats_of(torch.randn(T, K))
    keep = dataclasses.replace(stats, hessian=stats.hessian.clone(), abs_sum=stats.abs_sum.clone())
    out = rescale_stats(stats, torch.full((K,), 2.0))
    assert torch.equal(stats.hessian, keep.hessian) and torch.equal(stats.abs_sum, keep.abs_sum)
    assert torch.allclose(out.hessian, keep.hessian / 4) and torch.allclose(out.abs_sum, keep.abs_sum / 2)


def test_groups_without_quantized_consumers_are_left() -> None:
    block, _, stats = problem()
    before = {k: v.clone() for k, v in block.state_dict().items()}
    reports = smooth_layer(block, GROUPS, stats, config(), {})
    assert all("none of its consumers" in r.notes[0] for r in reports)
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


def test_unquantized_consumers_are_rescaled_too() -> None:
    block, x, stats = problem()
    before = block(x)
    own = config()
    smooth_layer(block, GROUPS, stats, own, {"q": own})
    assert float((block(x) - before).norm() / before.norm()) < 1e-5


def test_consumers_without_tokens() -> None:
    """A sibling's statistics stand in where inputs are shared; a lone consumer is not rescaled."""
    block, x, stats = problem()
    before = block(x)
    empty = LayerStats(0, torch.zeros(K, K), torch.zeros(K))
    stats["v"], stats["o"] = empty, dataclasses.replace(empty)
    own = config()
    first, second = smooth_layer(block, GROUPS, stats, own, {"q": own, "v": own, "o": own})
    assert "no calibration tokens reached v" in first.notes[0] and stats["v"].tokens == T
    assert "not rescaled" in second.notes[0]
    assert float((block(x) - before).norm() / before.norm()) < 1e-5


def test_ranks_agree_on_sums() -> None:
    """Two ranks with half of the tokens each choose what one rank with all of them chooses."""
    from threading import Barrier, Thread

    block, x, stats = problem()
    own = config(feedback=False)
    h = block.norm(x)
    parts = [stats_of(h[: T // 2]), stats_of(h[T // 2 :])]
    alone = smooth_layer(block, GROUPS[:1], stats, own, {"q": own, "v": own})
    layers = [problem()[0], problem()[0]]
    barrier, box, chosen = Barrier(2, timeout=60), [torch.empty(0)] * 2, [""] * 2

    def rank(i: int) -> None:
        def reduce(t: Tensor) -> Tensor:
            box[i] = t
            barrier.wait()
            total = box[0] + box[1]
            barrier.wait()
            return total

        mine = {"q": parts[i], "v": parts[i]}
        chosen[i] = smooth_layer(layers[i], GROUPS[:1], mine, own, {"q": own, "v": own}, reduce)[0].choice

    threads = [Thread(target=rank, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == [alone[0].choice] * 2
    assert torch.equal(layers[0].norm.weight, layers[1].norm.weight)


def test_unrepairable_is_what_gptq_leaves() -> None:
    x = torch.randn(T, K)
    hessian = x.t() @ x
    left = unrepairable(hessian, 32)
    assert (left > 0).all() and (left <= hessian.diagonal() * 1.06).all()
    independent = torch.diag(torch.rand(K) + 0.5)
    damped = independent.diagonal() + 0.05 * independent.diagonal().mean()
    assert torch.allclose(unrepairable(independent, 32), damped, rtol=1e-4)
    assert torch.equal(unrepairable(torch.zeros(K, K), 32), torch.zeros(K))


def test_clipping_beats_minmax() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, K) * (1 + 3 * (torch.rand(48, K) > 0.97))
    x = torch.randn(T, K) * torch.exp(torch.randn(K))
    hessian = x.t() @ x
    grid = AffineGrid(4, symmetric=False, signed_scale=False)

    def error(scale: Tensor, zero: Tensor) -> float:
        s, z = scale.repeat_interleave(32, 1), zero.repeat_interleave(32, 1)
        d = (encode(weight, s, z, 15) - z) * s - weight
        return float(((d @ hessian) * d).sum())

    plain = [v.view(48, 2) for v in minmax(weight.view(-1, 32), grid)]
    clipped = fit_clipped(weight, hessian, 32, grid)
    assert error(*clipped) < 0.9 * error(plain[0], plain[1])
    assert torch.equal(clipped[0], clipped[0].half().float())


@pytest.mark.parametrize("zero_point", [True, False])
def test_feedback_is_better_than_rounding(zero_point: bool) -> None:
    block, x, _ = problem()
    h = block.norm(x)
    hessian = h.t() @ h
    errors = []
    for feedback in (False, True):
        r = quantize_awq(block.v.weight, hessian, T, config(feedback=feedback, zero_point=zero_point))
        s, z = r.scale.repeat_interleave(32, 1), r.zero.repeat_interleave(32, 1)
        d = (r.codes.float() - z) * s - block.v.weight
        errors.append(float(((d @ hessian) * d).sum()))
    assert errors[1] < errors[0]


def test_degenerate_weights() -> None:
    own = config()
    for weight in (torch.zeros(8, K), torch.full((8, K), 3.0), torch.eye(8, K) * 1e-12):
        for hessian, tokens in ((torch.eye(K), 5), (torch.zeros(K, K), 5), (None, 0)):
            for feedback in (True, False):
                r = quantize_awq(weight, hessian, tokens, config(feedback=feedback))
                dense = (r.codes.float() - r.zero.repeat_interleave(32, 1)) * r.scale.repeat_interleave(32, 1)
                assert torch.isfinite(dense).all()
                assert float((dense - weight).abs().max()) <= 1e-2 * float(weight.abs().max()) + 1e-7
    assert own.feedback
