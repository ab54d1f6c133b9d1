"""The reference of an export's proof: what the loaded checkpoint computes, and how far an artifact may be off."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from quantkit.encoding import Codebook
from quantkit.export.onnx_codebook import plane_block, planes_table
from quantkit.export.proof import (
    Expected,
    Proof,
    Runner,
    compare,
    expect,
    expect_again,
    furthest,
    largest_logit,
)
from quantkit.kernels.reference import through_int8_blocks
from quantkit.linear import QuantLinear
from quantkit.load import load

#: Default tolerance as a share of the largest logit: float32 arithmetic, and rounding of activations (where a
#: tie may fall either way).
EXACT, ROUNDED = 1e-4, 2e-2


@dataclass(frozen=True)
class Reference:
    """What the artifact must compute, and how far it may be off; `unrounded` where it rounds activations."""

    expected: Expected
    allowed: float
    unrounded: Expected | None
    unrounded_allowed: float

    def prove_unrounded(self, run: Runner, what: str) -> float | None:
        """The largest error of an artifact whose rounding was taken out."""
        assert self.unrounded is not None
        what = f"{what}, its rounding of activations taken out,"
        return compare(self.unrounded, run, self.unrounded_allowed, what).max_error

    def prove(self, run: Runner, what: str, unrounded_error: float | None, speed: float | None) -> Proof:
        """Compare the artifact as it is."""
        proof = compare(self.expected, run, self.allowed, what, self.unrounded)
        return replace(
            proof,
            artifact_tokens_per_second=speed,
            source_tokens_per_second=self.expected.tokens_per_second or None,
            unrounded_error=unrounded_error,
            unrounded_atol=None if unrounded_error is None else self.unrounded_allowed,
        )


def run_reference(
    path: Any,
    *,
    kv_cache: bool,
    int8_activations: bool,
    int8_codebooks: bool,
    atol: float | None,
    trust_remote_code: bool,
) -> Reference:
    """Load the checkpoint in float32, run it (twice, where activations are rounded), and drop it.

    int8_activations: affine layers round as `set_cpu_activations(model, "int8")` says.
    int8_codebooks: so do the codebook layers that `onnx_codebook.CodebookPlanes` computes.
    """
    activations = "int8" if int8_activations else "exact"
    model = load(path, dtype=torch.float32, cpu_activations=activations, trust_remote_code=trust_remote_code)
    codebooks = _planes(model) if int8_codebooks else []
    hooks = [_round_inputs(layer, block) for layer, block in codebooks]
    expected = expect(model, use_cache=kv_cache)
    exact = EXACT * largest_logit(expected)
    layers = [m for m in model.modules() if isinstance(m, QuantLinear) and (m.activation or m.cpu_activation)]
    if not layers and not hooks:
        return Reference(expected, exact if atol is None else atol, None, 0.0)
    for layer in layers:
        layer.activation = layer.cpu_activation = None
    for hook in hooks:
        hook.remove()
    for layer, _ in codebooks:  # the table as two planes give it: within PLANES_ERROR, grown by deep models
        layer.lut.data = planes_table(layer.packed)
    unrounded = expect_again(model, expected)
    allowed = max(ROUNDED * largest_logit(expected), 2 * furthest(expected, unrounded))
    if atol is not None:
        return Reference(expected, atol, unrounded, atol)
    return Reference(expected, allowed, unrounded, exact)


def _planes(model: Any) -> list[tuple[QuantLinear, int]]:
    """The layers that `CodebookPlanes` will compute, and how many inputs share a scale there."""
    found = []
    for layer in model.modules():
        if isinstance(layer, QuantLinear) and isinstance(layer.encoding, Codebook):
            block = plane_block(layer.packed)
            if block is not None:
                found.append((layer, block))
    return found


def _round_inputs(layer: QuantLinear, block: int) -> Any:
    def rounded(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (through_int8_blocks(inputs[0], block), *inputs[1:])

    return layer.register_forward_pre_hook(rounded)
