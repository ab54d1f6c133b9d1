"""Several quantized layers as one: concatenated rows (QKV, gate and up) and what surrounds a product.

    qkv  = concatenate_rows([q, k, v])            one launch instead of three
    y    = fused_linear(x, qkv, norm_weight=w)     RMS norm of the input in the same launch
    h    = fused_linear(x, concatenate_rows([gate, up]), gated=True)         silu(gate(x)) * up(x)
    out  = fused_linear(h, down, residual=x)

For up to `tuning.ONE_LAUNCH_ROWS` rows (decoding) each line is one Triton launch; for more, and on devices
without Triton, the same steps one after another. Inference only: no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.encoding import Affine, PackedWeight
from quantkit.errors import UsageError
from quantkit.kernels import ops


def concatenate_rows(weights: Sequence[PackedWeight]) -> PackedWeight:
    """One weight with the rows of all, in order: `[sum of N, K]`.

    Affine weights of one encoding, K, dtype and input permutation; UsageError otherwise.
    """
    if not weights:
        raise UsageError("there are no weights to concatenate")
    first = weights[0]
    for i, other in enumerate(weights[1:], start=1):
        if not isinstance(first.encoding, Affine) or other.encoding != first.encoding:
            raise UsageError(
                f"weight {i} is {other.encoding}, weight 0 is {first.encoding}",
                hint="Only affine weights of one encoding can share a launch.",
            )
        if other.shape[1] != first.shape[1] or other.activation != first.activation:
            raise UsageError(f"weight {i} takes other inputs than weight 0: {other.shape} and {first.shape}")
        assert first.zero is not None and other.zero is not None
        if other.scale.dtype != first.scale.dtype or other.zero.dtype != first.zero.dtype:
            raise UsageError(f"weight {i} has scales or zeros of another dtype than weight 0")
        same_order = other.perm is first.perm is None
        if other.perm is not None and first.perm is not None:
            same_order = torch.equal(other.perm, first.perm)
        if not same_order:
            raise UsageError(f"weight {i} has another input permutation than weight 0")
    zeros = [w.zero for w in weights if w.zero is not None]
    return PackedWeight(
        first.encoding,
        (sum(w.shape[0] for w in weights), first.shape[1]),
        torch.cat([w.codes for w in weights]),
        torch.cat([w.scale for w in weights]),
        torch.cat(zeros) if zeros else None,
        perm=first.perm,
        activation=first.activation,
    )


def fused_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gated: bool = False,
) -> Tensor:
    """`gate(rms_norm(x) @ W.T + bias) + residual`, steps not asked for left out.

    `x [..., K]`; `bias [N]`; `norm_weight [K]`; with `gated`, N counts gate rows then up rows and the result
    is `[..., N / 2]`, otherwise `[..., N]`; `residual` has the result's shape. Accumulation, norm and gate are
    float32; the result has the dtype of `x`. The kernel rounds x * norm_weight to that dtype before the dot
    and divides by the root mean square after it, so it differs from the separate steps by roundings only.
    """
    if not isinstance(weight.encoding, Affine) or weight.activation is not None:
        raise UsageError(
            f"fused_linear takes affine weights without rounded activations, not {weight.encoding}"
        )
    if gated and weight.shape[0] % 2:
        raise UsageError(f"a gated weight has an even number of rows, not {weight.shape[0]}")
    assert weight.zero is not None
    tensors = (weight.codes, weight.scale, weight.zero, bias, weight.perm, residual, norm_weight)
    encoding = weight.encoding
    out: Tensor = ops.affine_fused_linear(x, *tensors, norm_eps, gated, encoding.bits, encoding.group_size)
    return out
