"""How `wide_hopper_dx_kernel` multiplies: dx = dy @ W for 17 and more rows on sm_90, weights of 4 and 8 bits.

Where it does not answer, gradients keep the routes of their backend: a fused kernel for few rows, or slices of W
dequantized for the vendor's BLAS.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels import sliced
from quantkit.kernels.launch import cdiv
from quantkit.kernels.launch_weight import Kind, LaunchWeight
from quantkit.kernels.wide_hopper_launch import (
    KINDS,
    TOGETHER,
    aligned,
    bits,
    covers_weight,
    in_sixteen_bits,
    room_for_parts,
    run,
    unless_refused,
)
from quantkit.kernels.wide_hopper_plan import BN, TILES, Costs, Plan, choose_gradient

#: Rows of W per step; columns of W in a unit of 16 bits are 16 / bits.
BS = 64
#: Registers that a multiplying thread gets, and one that copies or reads scales (`wide_hopper_launch.REGISTERS`).
OF_PRODUCTS, OF_OTHERS = 232, 40
#: Bytes of shared memory that a block may have.
SHARED = 232448

#: What the kernel decodes.
DECODED: tuple[Kind, ...] = ("affine4", "affine8", "codebook", "float8")


def multiply(grad: Tensor, weight: LaunchWeight, k: int) -> Tensor | None:
    """dx `[M, k]` of `grad [M, N]`, or None where another route is faster or must answer."""
    if not covers(grad, weight, k):
        return None
    units = sliced.multiprocessors(grad.device)
    chosen = choose_gradient(grad.shape[0], weight.n, k, costs(weight, grad.dtype), units)
    return None if chosen is None else unless_refused(lambda: launch_dx(grad, weight, k, chosen))


def costs(weight: LaunchWeight, dtype: torch.dtype = torch.bfloat16) -> Costs:
    """What its steps, and dequantizing it, take over what those of 4 bits in groups of 128 took at first."""
    if weight.kind == "float8":
        return Costs(0.87, 0.87, 1.0, 1.15)
    if weight.kind == "codebook":
        return Costs(1.07, 1.25, 1.1, 1.15)
    floats = weight.zero is not None and weight.zero.is_floating_point()
    if floats or not in_sixteen_bits(weight, dtype):
        return Costs(1.07, 1.25, 1.1, 1.15 if weight.kind == "affine8" else 1.0)
    return Costs(1.0, 1.0, 1.1, 1.15) if weight.kind == "affine8" else Costs(0.96, 1.0, 1.1, 1.0)


def covers(grad: Tensor, weight: LaunchWeight, k: int) -> bool:
    """Can the kernel multiply `grad [M, N]` by this weight `[N, k]` on this device?"""
    return weight.kind in DECODED and covers_weight(grad, weight, k)


def launch_dx(grad: Tensor, weight: LaunchWeight, k: int, chosen: Plan) -> Tensor:
    """dx `[M, k]` in the dtype of `grad [M, N]`, for a weight that `covers` says yes to, by a plan for `[k, N]`."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from quantkit.kernels.wide_hopper_dx import wide_hopper_dx_kernel

    kind, n, group, codes, scale, zero, lut, perm, scale_rows = weight
    grad = aligned(grad)
    m = grad.shape[0]
    out = grad.new_empty((m, k))
    unit = 16 // bits(kind)
    units = codes.view(torch.int16)
    of_rows, of_units = layouts(kind)
    bm, whole, sharers, programs, _ = chosen
    pointers = (
        scale,
        zero if zero is not None else scale,
        lut if lut is not None else scale,
        *room_for_parts(out, chosen),
    )
    arguments = (
        TensorDescriptor(grad, [m, n], [grad.stride(0), 1], [bm, BS], of_rows),
        TensorDescriptor(units, [n, k // unit], [k // unit, 1], [BS, BN // unit], of_units),
        TensorDescriptor(out, [m, k], [k, 1], [bm, BN // 2], of_rows),
        *pointers,
        m,
        n,
        k,
        cdiv(k, group) if group else 1,
        scale_rows,
        whole,
        sharers,
    )
    constants = (
        group,
        BN,
        bm,
        BS,
        stages(kind, group, bm),
        TOGETHER,
        KINDS[kind],
        OF_PRODUCTS,
        OF_OTHERS,
    )
    run(wide_hopper_dx_kernel, (programs, 1, 1), grad, pointers, arguments, constants)
    return out if perm is None else torch.empty_like(out).index_copy_(1, perm, out)


@cache
def stages(kind: Kind, group: int, rows: int) -> int:
    """Buffers of one step with `rows` rows of dy: those of `wide_hopper`, or as many as fit."""
    factors = (8 if kind in ("affine4", "affine8") else 4) * (1 if group % BN == 0 else 2)
    step = BS * (rows * 2 + BN * bits(kind) // 8 + factors) + 16
    return min(TILES[rows].stages, (SHARED - 1024 - rows * BN * 2) // step)


@cache
def layouts(kind: Kind) -> tuple[Any, Any]:
    """Of dy and dx, and of units of codes, in shared memory."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(128, 16, 2), NVMMASharedLayout(BN * bits(kind) // 8, 16, 2)
