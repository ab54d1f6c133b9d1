"""AWQ: scale the channels that matter, then clip: the rounding error moves to where it costs little.

Lin et al. 2023, arXiv 2306.00978. For a linear `y = W x` whose input comes from a norm (or another
linear) the weight can be stored as `W diag(s)` and `1/s` folded into the producer. Channels with a
large s are rounded more finely. For inputs seen in calibration the loss of a scale is exactly

    loss(s) = sum over linears of tr(D H D^T),   D = Q(W diag(s)) diag(1/s) - W,   H = sum x x^T

so one `[K, K]` matrix per input replaces stored activations, and the sum over all linears that share
an input is one pass. Candidates are `s = a^p / w^r` for the mean |activation| a and the relative weight
magnitude w, over a grid of exponents. Then each group's range is clipped (`fit_clipped`) so that the
error weighted with H is smallest; with GPTQ feedback the clip search happens inside GPTQ instead.

Conventions: `W` float32 `[N, K]`, H float32 `[K, K]` (plain sums), `s` float32 `[K]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantkit.algorithms.gptq import GPTQOptions, gptq_quantize
from quantkit.algorithms.grid import AffineGrid, check_range, encode, minmax, store_scale
from quantkit.algorithms.ordering import column_order
from quantkit.topology import ScaleGroup, apply_scale

#: The clip search adds this share of the mean diagonal to H, so that channels that calibration never
#: saw are not clipped at will.
_CLIP_DAMP = 0.01


class Stats(Protocol):
    """The part of `LayerStats` that is read here (a dataclass with at least these fields)."""

    tokens: int
    hessian: Tensor | None
    abs_sum: Tensor | None


class SmoothOptions(Protocol):
    """The part of a format's options that the scale search reads."""

    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def zero_point(self) -> bool: ...
    @property
    def scale_steps(self) -> int: ...
    @property
    def feedback(self) -> bool: ...
    @property
    def sweeps(self) -> int: ...


@dataclass
class SmoothReport:
    """What was done to one scale group; `loss_after / loss_before` is the share of error that is left."""

    producer: str
    consumers: tuple[str, ...]
    choice: str = "none"
    loss_before: float = 0.0
    loss_after: float = 0.0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Linear:
    """One consumer as the search sees it: what a candidate's error is weighted with is in `weigh`:
    H `[K, K]` for the plain loss, the diagonal `[K]` that feedback cannot repair otherwise."""

    weight: Tensor
    weigh: Tensor
    group_size: int
    grid: AffineGrid


@torch.no_grad()
def smooth_layer(
    layer: nn.Module,
    groups: list[ScaleGroup],
    stats_by_path: MutableMapping[str, Any],
    config: SmoothOptions,
    quantizable: Mapping[str, Any],
    reduce: Callable[[Tensor], Tensor] = lambda t: t,
    store_dtype: torch.dtype | None = None,
) -> list[SmoothReport]:
    """Search and fold the scales of every group of one decoder layer, in place.

    layer           decoder layer with float32 weights
    groups          from `quantkit.topology`; paths are relative to `layer`
    stats_by_path   `LayerStats` per linear; entries are REPLACED by their values in the scaled space
                    (and experts without tokens get the statistics pooled over their siblings), so
                    that they fit the changed weights
    config          the default options; `quantizable` maps the linears that will be quantized to theirs.
                    Other consumers are rescaled too, but have no say in the search
    reduce          sums a tensor over ranks; it sees losses and statistics, so all ranks agree
    store_dtype     dtype in which norms will be written, see `topology.apply_scale`
    """
    reports = []
    for group in groups:
        report = SmoothReport(group.producer, group.consumers)
        reports.append(report)
        targets = [p for p in group.consumers if p in quantizable]
        if not targets:
            report.notes.append("none of its consumers is quantized: left as it is")
            continue
        if group.kind != "linear_rows":
            report.notes.extend(_pool_unseen(group, targets, stats_by_path))
        activation = _mean_activation(group, targets, stats_by_path, reduce)
        if activation is None:
            report.notes.append("no calibration tokens reached its consumers: not rescaled")
            continue
        linears = []
        known: dict[tuple[int, int], Tensor] = {}  # consumers share the Hessian: factor it once
        for path in targets:
            stats = stats_by_path[path]
            if stats.tokens == 0 or stats.hessian is None:
                continue
            weight = layer.get_submodule(path).weight
            assert isinstance(weight, Tensor)
            linears.append(_prepare(weight, stats.hessian, quantizable[path], config, known))
        if not linears:
            report.notes.append("no statistics of its consumers: not rescaled")
            continue
        scale = _search(group, linears, activation, config.scale_steps, reduce, report)
        if scale is None:
            continue
        used = apply_scale(layer, group, scale, store_dtype)
        columns = group.expand(used)
        for path in group.consumers:
            if path in stats_by_path:
                stats_by_path[path] = rescale_stats(stats_by_path[path], columns)
    return reports


def rescale_stats(stats: Any, columns: Tensor) -> Any:
    """Statistics of `x / columns` from those of `x`: a new object, nothing is modified."""
    inverse = 1.0 / columns
    hessian = stats.hessian
    if hessian is not None:
        d = inverse.to(hessian.device)
        hessian = hessian * d[:, None] * d[None, :]
    scaled = {"hessian": hessian}
    for name in ("abs_sum", "abs_max"):
        value = getattr(stats, name, None)
        if value is not None:
            scaled[name] = value * inverse.to(value.device)
    return dataclasses.replace(stats, **scaled)


def _pool_unseen(group: ScaleGroup, targets: list[str], stats: MutableMapping[str, Any]) -> list[str]:
    """Give consumers that saw no tokens (rare experts) the statistics of all consumers together."""
    unseen = [p for p in targets if stats[p].tokens == 0]
    seen = {id(stats[p]): stats[p] for p in group.consumers if p in stats and stats[p].tokens > 0}
    if not unseen or not seen:
        return []
    first, *rest = seen.values()
    tokens, hessian, abs_sum = first.tokens, first.hessian, first.abs_sum
    for other in rest:
        tokens += other.tokens
        hessian = None if hessian is None or other.hessian is None else hessian + other.hessian
        abs_sum = None if abs_sum is None or other.abs_sum is None else abs_sum + other.abs_sum
    pooled = dataclasses.replace(first, tokens=tokens, hessian=hessian, abs_sum=abs_sum)
    for path in unseen:
        stats[path] = pooled
    return [
        f"no calibration tokens reached {', '.join(unseen)}: statistics of all consumers of {group.producer}"
    ]


def _mean_activation(
    group: ScaleGroup, targets: list[str], stats: Mapping[str, Any], reduce: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """Mean |x| per free scale `[width]` over all tokens of the consumers, or None without any."""
    total: Tensor | None = None
    tokens = 0
    for one in {id(stats[p]): stats[p] for p in targets}.values():
        if one.tokens == 0:
            continue
        amount = one.abs_sum if one.abs_sum is not None else one.hessian.diagonal().clamp(min=0).sqrt()
        total = amount if total is None else total + amount
        tokens += one.tokens
    if total is None:
        return None
    both = reduce(torch.cat([total.float(), total.new_tensor([float(tokens)])]))
    mean = both[:-1] / both[-1]
    return group.pool(mean) if bool(torch.isfinite(mean).all()) and bool((mean > 0).any()) else None


def _prepare(
    weight: Tensor,
    hessian: Tensor,
    own: Any,
    config: SmoothOptions,
    known: dict[tuple[int, int], Tensor] | None = None,
) -> _Linear:
    k = weight.shape[1]
    group_size = k if own.group_size == -1 else own.group_size
    grid = AffineGrid(own.bits, symmetric=not own.zero_point, search="minmax", signed_scale=False)
    if not config.feedback:
        return _Linear(weight, hessian.to(weight.device, torch.float32), group_size, grid)
    known = {} if known is None else known
    key = (id(hessian), group_size)
    if key not in known:
        known[key] = unrepairable(hessian.to(weight.device, torch.float32), group_size)
    return _Linear(weight, known[key], group_size, grid)


def unrepairable(hessian: Tensor, group_size: int, damp: float = 0.05) -> Tensor:
    """`[K]`: what an error in column j costs after GPTQ has repaired what later columns can.

    That is `1 / U[j, j]^2` with `H^-1 = U^T U` in GPTQ's order of columns, which is the squared
    diagonal of H's own upper Cholesky factor `H = M M^T`; the plain diagonal of H where it cannot be
    factored. A loss with this diagonal predicts GPTQ's error at a cost of N K instead of N K^2 for
    each candidate.
    """
    diagonal = hessian.diagonal().clamp(min=0)
    mean = float(diagonal.mean())
    if not mean > 0:
        return diagonal
    order = column_order(diagonal, group_size, "groups").flip(0)
    double = hessian.device.type == "cpu"
    flipped = (hessian.double() if double else hessian)[order][:, order] / mean
    flipped.diagonal().add_(damp)
    lower, info = torch.linalg.cholesky_ex(flipped)
    if int(info):
        return diagonal
    left = torch.empty_like(diagonal)
    left[order] = (lower.diagonal().square() * mean).to(left.dtype)
    return left


def scaled_loss(linear: _Linear, columns: Tensor) -> Tensor:
    """The loss of one linear under per-column scales `[K]`: a scalar, float32."""
    scaled = linear.weight * columns
    n, k = scaled.shape
    full = k - k % linear.group_size
    error = torch.empty_like(scaled)
    for start, stop, size in ((0, full, linear.group_size), (full, k, k - full)):
        if start == stop:
            continue
        rows = scaled[:, start:stop].reshape(-1, size)
        scale, zero = (v.unsqueeze(1) for v in minmax(rows, linear.grid))
        rounded = encode(rows, scale, zero, linear.grid.top).sub_(zero).mul_(scale)
        error[:, start:stop] = rounded.sub_(rows).view(n, stop - start)
    error /= columns
    if linear.weigh.dim() == 1:
        return error.square_().sum(0).mul_(linear.weigh).sum()
    return ((error @ linear.weigh) * error).sum()


def candidates(activation: Tensor, magnitude: Tensor, steps: int) -> Iterator[tuple[str, Tensor]]:
    """Named scale candidates `[width]`, geometric mean of extremes 1; the first is no scaling at all."""
    yield "none", torch.ones_like(activation)
    for i in range(steps + 1):
        ratio = i / steps
        if i:
            yield f"activation^{ratio:.3g}", _normalised(activation.pow(ratio))
        if i < steps:
            duo = activation.pow(ratio) / (magnitude.pow(1 - ratio) + 1e-4)
            yield f"activation^{ratio:.3g}/weight^{1 - ratio:.3g}", _normalised(duo)


def _normalised(scale: Tensor) -> Tensor:
    scale = scale.clamp(min=1e-4)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return torch.where(torch.isfinite(scale), scale, torch.ones_like(scale))


def _magnitude(group: ScaleGroup, linears: list[_Linear]) -> Tensor:
    """Mean of |w| relative to its quantization group's largest, per free scale `[width]`."""
    total = None
    rows = 0
    for linear in linears:
        weight, size = linear.weight.abs(), linear.group_size
        k = weight.shape[1]
        pad = -k % size
        blocks = torch.nn.functional.pad(weight, (0, pad)).view(weight.shape[0], -1, size)
        relative = (blocks / (blocks.amax(2, keepdim=True) + 1e-6)).view(weight.shape[0], -1)[:, :k].sum(0)
        total = relative if total is None else total + relative
        rows += weight.shape[0]
    assert total is not None
    return group.pool(total / rows)


def _search(
    group: ScaleGroup,
    linears: list[_Linear],
    activation: Tensor,
    steps: int,
    reduce: Callable[[Tensor], Tensor],
    report: SmoothReport,
) -> Tensor | None:
    """The best candidate, or None when no scaling is best."""
    magnitude = _magnitude(group, linears)
    names, scales, losses = [], [], []
    for name, scale in candidates(activation, magnitude, steps):
        columns = group.expand(scale)
        names.append(name)
        scales.append(scale)
        losses.append(torch.stack([scaled_loss(linear, columns) for linear in linears]).sum())
    total = reduce(torch.stack(losses))
    total = torch.where(torch.isfinite(total), total, torch.full_like(total, float("inf")))
    best = int(total.argmin())
    report.choice = names[best]
    report.loss_before, report.loss_after = float(total[0]), float(total[best])
    return scales[best] if best else None


# --- codes ---------------------------------------------------------------------------------------


@dataclass
class AWQResult:
    """`codes` uint8 `[N, K]`; `scale` float32 (exactly float16 values) and `zero` float32 `[N, G]`."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    remarks: list[str] = field(default_factory=list)


@torch.no_grad()
def quantize_awq(weight: Tensor, hessian: Tensor | None, tokens: int, config: SmoothOptions) -> AWQResult:
    """Codes of a smoothed weight `[N, K]` (float32, not modified) under `hessian` `[K, K]` of its input.

    With `config.feedback` by GPTQ (grids searched as columns are repaired, then scales re-fitted),
    else rounded to nearest on grids clipped by `fit_clipped`. `tokens == 0`: by the weight alone.
    """
    k = weight.shape[1]
    grid = AffineGrid(config.bits, symmetric=not config.zero_point, signed_scale=False)
    if config.feedback:
        options = GPTQOptions(group_size=config.group_size, ordering="groups", sweeps=config.sweeps)
        result = gptq_quantize(weight, hessian, tokens, options, grid)
        assert result.zero is not None
        return AWQResult(result.codes, result.scale, result.zero, result.remarks)
    group_size = k if config.group_size == -1 else config.group_size
    check_range(weight, grid)
    remarks = []
    if hessian is None or tokens == 0:
        remarks.append("no calibration tokens reached this layer: clipped and rounded by its weights alone")
        hessian = None
    scale, zero = fit_clipped(weight, hessian, group_size, grid)
    wide = torch.arange(k, device=weight.device) // group_size
    codes = encode(weight, scale[:, wide], zero[:, wide], grid.top).to(torch.uint8)
    return AWQResult(codes, scale, zero, remarks)


def fit_clipped(
    weight: Tensor, hessian: Tensor | None, group_size: int, grid: AffineGrid
) -> tuple[Tensor, Tensor]:
    """`(scale, zero)` float32 `[N, K/g]`: per row and group the range whose rounding error `d` has the
    smallest `d H_g d^T`, `H_g` the group's diagonal block of the Hessian (the identity without one).

    Tried are the grid's clipping ratios with the zero one code either way, then a least-squares scale.
    """
    n, k = weight.shape
    groups = k // group_size
    blocks = weight.view(n, groups, group_size).transpose(0, 1).contiguous()  # [G, N, g]
    if hessian is None:
        curve = torch.eye(group_size, device=weight.device).expand(groups, -1, -1)
    else:
        curve = hessian.view(groups, group_size, groups, group_size)
        curve = curve.diagonal(dim1=0, dim2=2).permute(2, 0, 1).to(weight.device, torch.float32)
        mean = curve.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-20)
        floor = _CLIP_DAMP * float(mean.mean())
        curve = curve + floor * torch.eye(group_size, device=weight.device)
    start, start_zero = (v.view(groups, n) for v in minmax(blocks.reshape(-1, group_size), grid))
    best = torch.full_like(start, float("inf"))
    scale, zero = start.clone(), start_zero.clone()

    def offer(new_scale: Tensor, new_zero: Tensor) -> None:
        level = encode(blocks, new_scale.unsqueeze(2), new_zero.unsqueeze(2), grid.top) - new_zero.unsqueeze(
            2
        )
        error = level.mul_(new_scale.unsqueeze(2)).sub_(blocks)
        loss = (torch.bmm(error, curve) * error).sum(2)
        better = loss < best
        best.copy_(torch.where(better, loss, best))
        scale.copy_(torch.where(better, new_scale, scale))
        zero.copy_(torch.where(better, new_zero, zero))

    for ratio in grid.ratios():
        tried = store_scale(start * ratio, grid.scale_dtype)
        for shift in (0,) if grid.symmetric else (0, -1, 1):
            offer(tried, (start_zero + shift).clamp(0, grid.top))
    for _ in range(grid.refits):
        level = encode(blocks, scale.unsqueeze(2), zero.unsqueeze(2), grid.top) - zero.unsqueeze(2)
        pulled = torch.bmm(level, curve)
        fitted = (pulled * blocks).sum(2) / (pulled * level).sum(2).clamp(min=1e-20)
        offer(store_scale(torch.where(fitted > 0, fitted, scale), grid.scale_dtype), zero)
    return scale.t().contiguous(), zero.t().contiguous()
