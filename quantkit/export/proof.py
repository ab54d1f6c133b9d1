"""Proof of an artifact: what it computes beside what the quantkit model computes, on fixed inputs.

Two rows of tokens, the second padded on the left, go through prefill and ten decode steps. The reference is
the loaded checkpoint with quantkit's plain torch kernels in float32 (activations rounded to int8 where the
artifact rounds them). Logits of real tokens are compared; keys and values of every layer say where the two
first part.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
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
    rounding: float = 0.0  # how far rounded activations move a logit of the prompt


@dataclass(frozen=True)
class Proof:
    """Largest absolute and relative (L2) error of the logits; decode speed of one row of both sides."""

    max_error: float
    relative_error: float
    largest_logit: float
    steps: int
    atol: float
    artifact_tokens_per_second: float | None = None
    source_tokens_per_second: float | None = None


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
    with use_reference():
        for _ in range(STEPS + 1 if use_cache else 1):
            calls.append((ids, mask, positions))
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=use_cache,
            )
            cache = out.past_key_values if use_cache else None
            logits.append(out.logits.float())
            ids = logits[-1][:, -1:].argmax(-1)
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], dim=1)
            positions = positions_of(mask)[:, -1:]
    final = [] if cache is None else [t.float() for layer in cache.layers for t in (layer.keys, layer.values)]
    return Expected(calls, logits, final, _source_speed(model) if use_cache else 0.0)


@torch.no_grad()
def rounding_effect(model: Any, expected: Expected) -> float:
    """Largest difference of the prompt's logits between `expected` and `model`, set not to round activations."""
    ids, mask, positions = expected.calls[0]
    with use_reference():
        exact = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float()
    return float((exact - expected.logits[0])[mask.bool()].abs().max())


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


def compare(expected: Expected, run: Runner, atol: float, what: str) -> Proof:
    """Run the artifact on the same inputs; NumericsError beyond `atol`, naming the first layer that differs."""
    worst = 0.0
    squared, total, largest = 0.0, 0.0, 0.0
    present: list[Tensor] = []
    for (ids, mask, positions), want in zip(expected.calls, expected.logits):
        got, present = run(ids, mask, positions)
        if got.shape != want.shape:
            raise NumericsError(
                f"{what} returned logits of shape {tuple(got.shape)}, not {tuple(want.shape)}"
            )
        real = mask[:, -ids.shape[1] :].bool()
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
            + first_difference(expected, present),
            hint="Nothing was published. Allow more with --atol, or report this.",
        )
    return Proof(worst, (squared / max(total, 1e-30)) ** 0.5, largest, len(expected.calls) - 1, atol)


def first_difference(expected: Expected, present: list[Tensor]) -> str:
    """Which layer's keys or values are the first to differ, by a relative error above ten times the first's."""
    if len(present) != len(expected.cache) or not present:
        return "without a cache the layer is unknown"
    mask = expected.calls[-1][1].bool()
    errors = []
    for i, (got, want) in enumerate(zip(present, expected.cache)):
        real = mask[:, None, : want.shape[2], None].expand_as(want).clone()
        if i % 2 == 0:  # rotation may count the padding (`onnx_attention`): keys of the full row only
            real[1:] = False
        errors.append(float((got - want)[real].norm() / want[real].norm().clamp(min=1e-30)))
    bad = [i for i, e in enumerate(errors) if not e <= 1e-3]
    if not bad:
        return "all keys and values agree: the difference is in the last layer's output, the norm or the head"
    layer, kind = divmod(bad[0], 2)
    where = f"{('keys', 'values')[kind]} of layer {layer} (relative error {errors[bad[0]]:.2g})"
    return f"first seen in the {where}" + (f": layer {layer - 1} or {layer} diverges" if layer else "")
