"""Proof of an artifact: what it computes beside what the quantkit model computes, on fixed inputs.

Two rows of tokens, the second padded on the left, go through prefill and ten decode steps. The reference is
the loaded checkpoint with quantkit's plain torch kernels in float32 (activations rounded where the artifact
rounds them). Logits of real tokens are compared; keys and values of every layer say where the two first part.

Where activations are rounded, two comparisons are made. The artifact without rounding (`unrounded`) against
the reference without rounding shows weights and wiring, as tightly as float32 arithmetic allows. The artifact
as it is against the rounded reference shows the rounding, as tightly as rounding allows: one last bit that
falls the other way changes all roundings after it, so that both sides end as far from exact arithmetic as
rounding takes them, and at most twice that from each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.kernels.dispatch import use_reference

STEPS = 10
#: A runner takes (ids [B, S], mask [B, T], positions [B, S]) call by call and keeps its own cache; it returns
#: logits [B, S, V] and the present keys and values, layer by layer (empty without a cache).
Runner = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, list[Tensor]]]


@dataclass(frozen=True)
class Expected:
    """The reference's part: inputs call by call, its logits and its final cache."""

    calls: list[tuple[Tensor, Tensor, Tensor]]
    logits: list[Tensor]
    cache: list[Tensor]
    tokens_per_second: float


@dataclass(frozen=True)
class Proof:
    """Largest absolute and relative (L2) error of the logits; decode speed of one row of both sides.

    `unrounded_error` and `unrounded_atol` are the largest error and its allowance with the rounding of
    activations taken out on both sides; None where the artifact rounds none.
    """

    max_error: float
    relative_error: float
    largest_logit: float
    steps: int
    atol: float
    artifact_tokens_per_second: float | None = None
    source_tokens_per_second: float | None = None
    unrounded_error: float | None = None
    unrounded_atol: float | None = None


def fixed_inputs(vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids `[2, 9]`, mask and positions; the second row has three tokens of padding on the left."""
    generator = torch.Generator().manual_seed(20)
    ids = torch.randint(0, vocabulary, (2, 9), generator=generator)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0
    return ids, mask, positions_of(mask)


def positions_of(mask: Tensor) -> Tensor:
    """Positions of tokens, padding not counted."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def expect(model: Any, *, use_cache: bool = True) -> Expected:
    """Run the reference model (float32) on the fixed inputs, greedily for `STEPS` steps."""
    ids, mask, positions = fixed_inputs(int(model.config.get_text_config().vocab_size))
    calls, logits, cache = [], [], None
    for _ in range(STEPS + 1 if use_cache else 1):
        calls.append((ids, mask, positions))
        made, cache = _call(model, calls[-1], cache, use_cache)
        logits.append(made)
        ids = made[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], dim=1)
        positions = positions_of(mask)[:, -1:]
    return Expected(calls, logits, _tensors(cache), _source_speed(model) if use_cache else 0.0)


@torch.no_grad()
def expect_again(model: Any, expected: Expected) -> Expected:
    """What `model` computes from the inputs of `expected`, its tokens included."""
    logits, cache, use_cache = [], None, bool(expected.cache)
    for call in expected.calls:
        made, cache = _call(model, call, cache, use_cache)
        logits.append(made)
    return replace(expected, logits=logits, cache=_tensors(cache))


def _call(model: Any, call: tuple[Tensor, Tensor, Tensor], cache: Any, use_cache: bool) -> tuple[Tensor, Any]:
    ids, mask, positions = call
    with use_reference():
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=use_cache,
        )
    return out.logits.float(), out.past_key_values if use_cache else None


def _tensors(cache: Any) -> list[Tensor]:
    return [] if cache is None else [t.float() for layer in cache.layers for t in (layer.keys, layer.values)]


def largest_logit(expected: Expected) -> float:
    """Of all real tokens: what `compare` reports and errors are a share of."""
    return max(float(t[_real(call)].abs().max()) for call, t in zip(expected.calls, expected.logits))


def furthest(one: Expected, other: Expected) -> float:
    """Largest difference of a real token's logit between two runs over the same inputs."""
    pairs = zip(one.calls, one.logits, other.logits)
    return max(float((a - b)[_real(call)].abs().max()) for call, a, b in pairs)


def _real(call: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """bool `[B, S]`: which of the call's tokens are no padding."""
    ids, mask, _ = call
    return mask[:, -ids.shape[1] :].bool()


def _source_speed(model: Any) -> float:
    """Decode speed of the quantkit model on its normal path, one row, tokens per second."""
    one = torch.ones(1, 1, dtype=torch.int64)
    cache = model(input_ids=one, use_cache=True).past_key_values
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        cache = model(input_ids=one, past_key_values=cache, use_cache=True).past_key_values
        times.append(time.perf_counter() - start)
    return 1 / sorted(times)[len(times) // 2]


def compare(
    expected: Expected, run: Runner, atol: float, what: str, unrounded: Expected | None = None
) -> Proof:
    """Run the artifact on the same inputs; NumericsError beyond `atol`, naming the first layer that differs.

    `unrounded` says what the artifact's rounding of activations changes in each layer anyway.
    """
    worst = 0.0
    squared, total, largest = 0.0, 0.0, 0.0
    present: list[Tensor] = []
    for call, want in zip(expected.calls, expected.logits):
        got, present = run(*call)
        if got.shape != want.shape:
            raise NumericsError(
                f"{what} returned logits of shape {tuple(got.shape)}, not {tuple(want.shape)}"
            )
        real = _real(call)
        difference = (got.float() - want)[real]
        if not bool(torch.isfinite(difference).all()):
            worst = float("inf")
            continue
        worst = max(worst, float(difference.abs().max()))
        largest = max(largest, float(want[real].abs().max()))
        squared += float(difference.double().square().sum())
        total += float(want[real].double().square().sum())
    if worst > atol:
        raise NumericsError(
            f"{what} differs from the checkpoint by {worst:.3g} (largest logit {largest:.3g}, allowed {atol:g}); "
            + first_difference(expected, present, (squared / max(total, 1e-30)) ** 0.5, unrounded),
            hint="Nothing was published. Allow more with --atol, or report this.",
        )
    return Proof(worst, (squared / max(total, 1e-30)) ** 0.5, largest, len(expected.calls) - 1, atol)


def first_difference(
    expected: Expected, present: list[Tensor], in_logits: float, unrounded: Expected | None = None
) -> str:
    """Which layer's keys or values are the first whose relative error leaps: to ten times all before it.

    `in_logits` is the relative error of the logits. What float32 arithmetic (1e-5) and rounding (twice the
    distance to `unrounded`) explain is no leap.
    """
    if len(present) != len(expected.cache) or not present:
        return "without a cache the layer is unknown"
    mask = expected.calls[-1][1].bool()
    errors: list[float] = []
    for i, (got, want) in enumerate(zip(present, expected.cache)):
        real = mask[:, None, : want.shape[2], None].expand_as(want).clone()
        if i % 2 == 0:  # rotation may count the padding (`onnx_attention`): keys of the full row only
            real[1:] = False
        size = want[real].norm().clamp(min=1e-30)
        error = float((got - want)[real].norm() / size)
        explained = 1e-5
        if unrounded is not None:
            explained = max(explained, 2 * float((unrounded.cache[i] - want)[real].norm() / size))
        if not error <= max(explained, 10 * max(errors, default=0.0)):
            layer, kind = divmod(i, 2)
            where = f"{('keys', 'values')[kind]} of layer {layer} (relative error {error:.2g})"
            return f"first seen in the {where}" + (
                f": layer {layer - 1} or {layer} diverges" if layer else ""
            )
        errors.append(error)
    if in_logits <= 10 * max(errors):
        return (
            f"no layer stands out: {errors[0]:.2g} in the first layer's keys grows to {errors[-1]:.2g} in the last's "
            f"values and {in_logits:.2g} in the logits"
        )
    return "keys and values of all layers agree: it is in the last layer's output, the norm or the head"
