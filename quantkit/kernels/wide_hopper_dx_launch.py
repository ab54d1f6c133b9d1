"""How `wide_hopper_dx_kernel` multiplies: dx = dy @ W for 17 and more rows on sm_90, weights of 4 and 8 bits.

Where it does not answer, gradients keep the routes of their backend: a fused kernel for few rows, or slices of W
dequantized for the vendor's BLAS.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels import launch as device
from quantkit.kernels import sliced
from quantkit.kernels.launch import cdiv
from quantkit.kernels.launch_weight import Kind, LaunchWeight
from quantkit.kernels.wide_hopper_launch import KINDS, TOGETHER, bits, sum_parts, unless_refused
from quantkit.kernels.wide_hopper_plan import BN, TILES, Plan, choose_gradient

#: Rows of W per step; columns of W in a unit of 16 bits are 16 / bits.
BS = 64
#: Registers that a thread starts with, that a multiplying one gets, and one that copies or reads scales.
REGISTERS, OF_PRODUCTS, OF_OTHERS = 168, 232, 40
#: Bytes of shared memory that a block may have.
SHARED = 232448

#: What the kernel decodes.
DECODED: tuple[Kind, ...] = ("affine4", "affine8", "codebook", "float8")
#: (device, dtypes, alignment, constants) -> the compiled kernel. (Not by `launch.launch`: ADR 0026.)
_compiled: dict[tuple[Any, ...], Any] = {}


def multiply(grad: Tensor, weight: LaunchWeight, k: int) -> Tensor | None:
    """dx `[M, k]` of `grad [M, N]`, or None where another route is faster or must answer."""
    if not covers(grad, weight, k):
        return None
    units = sliced.multiprocessors(grad.device)
    chosen = choose_gradient(grad.shape[0], weight.n, k, *costs(weight), units)
    return None if chosen is None else unless_refused(lambda: launch_dx(grad, weight, k, chosen))


def costs(weight: LaunchWeight) -> tuple[float, float]:
    """Time of a step, and of dequantizing, over those of 4 bits, integer zeros, groups of 128 (M = 256 to 4096)."""
    if weight.kind == "float8":
        return 0.87, 1.15
    if weight.kind == "codebook":
        return 1.07, 1.15
    step = 0.96 if weight.kind == "affine8" else 1.0
    if weight.zero is not None and weight.zero.is_floating_point():
        step += 0.12
    return step, 1.15 if weight.kind == "affine8" else 1.0


def covers(grad: Tensor, weight: LaunchWeight, k: int) -> bool:
    """Can the kernel multiply `grad [M, N]` by this weight `[N, k]` on this device?

    TMA wants addresses and rows of whole 16 bytes. Rows of a codebook must be whole blocks. Recorded launches
    (`quantkit.kernels.aot`) have no addresses at all and are not covered.
    """
    codes, scale, zero, lut = weight.codes, weight.scale, weight.zero, weight.lut
    return (
        weight.kind in DECODED
        and grad.device.type != "meta"
        and device.target() == ("cuda", 90)
        and grad.dtype in (torch.float16, torch.bfloat16)
        and weight.group % 64 == 0
        and k % 64 == 0
        and weight.n % 8 == 0
        and codes.is_contiguous()
        and (weight.kind != "float8" or scale.dtype == torch.float32)
        and codes.data_ptr() % 16 == 0
        and scale.is_contiguous()
        and (zero is None or zero.is_contiguous())
        and (lut is None or (k % weight.group == 0 and lut.dtype == torch.float32 and lut.numel() == 16))
        and scale.numel() < 2**31
    )


def launch_dx(grad: Tensor, weight: LaunchWeight, k: int, chosen: Plan) -> Tensor:
    """dx `[M, k]` in the dtype of `grad [M, N]`, for a weight that `covers` says yes to, by a plan for `[k, N]`."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from quantkit.kernels.wide_hopper_dx import wide_hopper_dx_kernel

    kind, n, group, codes, scale, zero, lut, perm, scale_rows = weight
    if grad.stride(1) != 1 or grad.stride(0) % 8 or grad.data_ptr() % 16:
        grad = grad.contiguous() if not grad.is_contiguous() else grad.clone()
    m = grad.shape[0]
    out = grad.new_empty((m, k))
    unit = 16 // bits(kind)
    units = codes.view(torch.int16)
    of_rows, of_units = layouts(kind)
    bm, whole, parts, each, multiprocessors, _ = chosen
    cut = cdiv(k, BN) * cdiv(m, bm) - whole
    grid = (min(multiprocessors, whole + cut * parts), 1, 1)
    sums = grad.new_empty((cut, parts, bm, BN), dtype=torch.float32) if cut else out
    pointers = (
        scale,
        zero if zero is not None else scale,
        lut if lut is not None else scale,
        sums,
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
        parts,
        each,
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
    key = (grad.device, grad.dtype, constants, *[(p.dtype, p.data_ptr() & 15 == 0) for p in pointers])
    if (found := _compiled.get(key)) is not None:
        found[grid](*arguments, *constants)
    else:
        _compiled[key] = wide_hopper_dx_kernel[grid](*arguments, *constants, num_warps=4, maxnreg=REGISTERS)
    if cut:
        sum_parts(sums, None, out, whole)
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
