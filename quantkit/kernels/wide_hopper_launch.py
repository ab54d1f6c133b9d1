"""When and how `wide_hopper_kernel` multiplies: hundreds of rows of x on sm_90 by 4- and 8-bit weights.

Everything else keeps the route that its backend has for many rows: the weight, or a slice of it, is dequantized
and the vendor's BLAS multiplies. That route also answers where this Triton has no Gluon, or another one.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit.kernels import launch as device
from quantkit.kernels import sliced
from quantkit.kernels.launch import cdiv
from quantkit.kernels.wide_hopper_parts import sum_parts_kernel
from quantkit.kernels.wide_hopper_plan import BK, BN, TILES, Plan, choose

#: Tiles of W that share the L2 cache.
TOGETHER = 8
#: Registers that a thread starts with, and that a multiplying one gets: three warpgroups share 65536.
REGISTERS, OF_PRODUCTS = 168, 240
#: Rows of y that a program of the second pass adds up.
ROWS_OF_SUMS = 16
#: Kinds beside the bits of affine weights, as in `wide_hopper_decode` (which imports Gluon).
TABLE_4, FLOAT8 = 0, 1

_refused = False
#: (device, dtypes, alignment, constants) -> the compiled kernel.
_compiled: dict[tuple[Any, ...], Any] = {}
log = logging.getLogger(__name__)


class Wide(NamedTuple):
    """A weight as the kernel takes it."""

    kind: int  # of `wide_hopper_decode`
    codes: Tensor  # uint8 [N, bytes of K]
    scale: Tensor  # [N / scale_rows, groups]
    zero: Tensor | None  # [N, groups] of an affine weight
    lut: Tensor | None  # float32 [16] of a codebook
    perm: Tensor | None
    group: int  # 0 for one per row
    scale_rows: int = 1


def affine(
    codes: Tensor, scale: Tensor, zero: Tensor, perm: Tensor | None, bits: int, group: int
) -> Wide | None:
    """The affine weight with codes `[N, bytes of K]` and groups of `group` inputs (0: one per row)."""
    return Wide(bits, codes, scale, zero, None, perm, group) if bits in (4, 8) else None


def codebook(codes: Tensor, scale: Tensor, lut: Tensor, n: int, k: int, block: int) -> Wide | None:
    """The codebook weight `[n, k]`, whose codes and scales are flat; None where rows share bytes or blocks."""
    if k % block or k % 2 or lut.dtype != torch.float32 or lut.numel() != 16:
        return None
    return Wide(TABLE_4, codes.view(n, k // 2), scale.view(n, k // block), None, lut, None, block)


def float8(codes: Tensor, scale: Tensor, block_n: int, block_k: int) -> Wide:
    """The float8 weight `codes [N, K]` with a scale for each block of `[block_n, block_k]`."""
    group = block_k if block_k < codes.shape[1] else 0
    return Wide(FLOAT8, codes, scale, None, None, None, group, block_n)


def multiply(x: Tensor, weight: Wide | None, bias: Tensor | None) -> Tensor | None:
    """`x [M, K]` times the weight plus bias `[N]`: `[M, N]`, or None where another route is faster or must answer."""
    global _refused
    if _refused or weight is None or not covers(x, weight):
        return None
    units = sliced.multiprocessors(x.device)
    chosen = choose(x.shape[0], weight.codes.shape[0], x.shape[1], decoding_cost(weight), units)
    if chosen is None:
        return None
    try:
        return launch_wide(x, weight, bias, chosen)
    except Exception as error:
        # Gluon is experimental: its functions come and go. Anything but its refusal is heard.
        refusal = isinstance(error, ImportError) or type(error).__module__.startswith("triton.")
        if not refusal or os.environ.get("QUANTKIT_KERNELS", "") == "strict":
            raise
        _refused = True
        first = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning(
            "4-bit products of many rows: no fused kernel here (%s); dequantize and BLAS answer", first
        )
        return None


def covers(x: Tensor, weight: Wide) -> bool:
    """Can the kernel multiply `x [M, K]` by this weight on this device? (Is it the faster way: `faster`.)

    TMA wants addresses and rows of whole 16 bytes. Recorded launches (`quantkit.kernels.aot`) have no
    addresses at all and are not covered.
    """
    codes, k = weight.codes, x.shape[1]
    return (
        x.device.type != "meta"
        and device.target() == ("cuda", 90)
        and x.dtype in (torch.float16, torch.bfloat16)
        and weight.group % BK == 0
        and k % BK == 0
        and codes.shape[0] % 8 == 0
        and codes.is_contiguous()
        and (weight.kind != FLOAT8 or weight.scale.dtype == torch.float32)
        and codes.data_ptr() % 16 == 0
        and weight.scale.is_contiguous()
        and (weight.zero is None or weight.zero.is_contiguous())
        and weight.scale.numel() < 2**31
    )


def decoding_cost(weight: Wide) -> float:
    """Time of a tile of this weight over one of 4 bits, integer zeros, groups of 128 (M = 256 to 2048)."""
    if weight.kind == FLOAT8:
        return 1.0
    if weight.zero is not None and (weight.zero.is_floating_point() or weight.scale.dtype == torch.float32):
        return 1.2
    return 1.0 if weight.kind == 4 and weight.group % (2 * BK) == 0 else 1.1


def launch_wide(x: Tensor, weight: Wide, bias: Tensor | None, chosen: Plan) -> Tensor:
    """The launch for a weight that `covers` says yes to: `[M, N]` in the dtype of `x`."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from quantkit.kernels.wide_hopper import wide_hopper_kernel

    if weight.perm is not None:
        x = x.index_select(1, weight.perm)
    elif x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous() if not x.is_contiguous() else x.clone()
    (m, k), n, codes = x.shape, weight.codes.shape[0], weight.codes
    out = x.new_empty((m, n))
    words = codes.view(torch.int32)
    of_x, of_words, of_y = layouts(weight.kind)
    width = words.shape[1] * BK // k
    bm, whole, parts, each, units, _ = chosen
    cut = cdiv(n, BN) * cdiv(m, bm) - whole
    grid = (min(units, whole + cut * parts), 1, 1)
    sums = x.new_empty((cut, parts, bm, BN), dtype=torch.float32) if cut else out
    scale, zero, lut = weight.scale, weight.zero, weight.lut
    pointers = (
        scale,
        zero if zero is not None else scale,
        lut if lut is not None else scale,
        bias if bias is not None else x,
        sums,
    )
    arguments = (
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [bm, BK], of_x),
        TensorDescriptor(words, [n, words.shape[1]], [words.stride(0), 1], [BN, width], of_words),
        TensorDescriptor(out, [m, n], [n, 1], [bm, BN // 2], of_y),
        *pointers,
        m,
        n,
        k,
        scale.shape[1],
        weight.scale_rows,
        whole,
        parts,
        each,
    )
    constants = (
        weight.group,
        BN,
        bm,
        BK,
        TILES[bm].stages,
        TOGETHER,
        weight.kind,
        bias is not None,
        OF_PRODUCTS,
    )
    # What Triton compiles for: looking it up there takes longer than some products (`launch.launch`).
    key = (x.device, x.dtype, constants, *[(p.dtype, p.data_ptr() & 15 == 0) for p in pointers])
    if (found := _compiled.get(key)) is not None:
        found[grid](*arguments, *constants)
    else:
        _compiled[key] = wide_hopper_kernel[grid](*arguments, *constants, num_warps=4, maxnreg=REGISTERS)
    if cut:
        sum_parts(sums, bias, out, whole)
    return out


def sum_parts(sums: Tensor, bias: Tensor | None, out: Tensor, whole: int) -> None:
    """Tiles of `out [M, N]` from `whole` on: float32 `sums [tiles, parts, BM, BN]` in order, plus bias `[N]`."""
    cut, parts, height, width = sums.shape
    device.launch(
        sum_parts_kernel,
        (cut * height // ROWS_OF_SUMS,),
        sums,
        bias if bias is not None else out,
        out,
        *out.shape,
        whole,
        parts,
        BN=width,
        BM=height,
        TOGETHER=TOGETHER,
        ROWS=ROWS_OF_SUMS,
        HAS_BIAS=bias is not None,
        num_warps=4,
    )


@cache
def layouts(kind: int) -> tuple[Any, Any, Any]:
    """Of x, words of codes and y in shared memory: as TMA writes, `wgmma` reads and bank conflicts allow."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    of_words = NVMMASharedLayout(32 if kind in (4, TABLE_4) else 64, 32, 2)
    return NVMMASharedLayout(128, 16, 2), of_words, NVMMASharedLayout(128, 16, 2)
