"""When and how `wide_hopper_kernel` multiplies: hundreds of rows of x on sm_90, 4-bit affine and codebook weights.

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

#: Rows of W and of x per tile, inputs per step; buffers of one step; tiles of W that share the L2 cache.
BN, BM, BK = 128, 256, 64
STAGES = 4
TOGETHER = 8
#: Registers that a thread starts with: three warpgroups share 65536, and hand them over as the kernel asks.
REGISTERS = 168
#: Most rows of x that were measured. (Dequantizing costs the same for any number, and weighs less and less.)
MOST_ROWS = 3072
#: Time of dequantizing W over that of one wave of tiles is N over this number, whatever K is.
DEQUANTIZED_PER_WAVE = 12300
#: Stands for one group per row: longer than any row.
_WHOLE_ROW = 1 << 30

_refused = False
#: (device, dtypes, alignment, constants) -> the compiled kernel.
_compiled: dict[tuple[Any, ...], Any] = {}
log = logging.getLogger(__name__)


class Wide(NamedTuple):
    """A 4-bit weight as the kernel takes it."""

    codes: Tensor  # uint8 [N, K / 2]
    scale: Tensor  # [N, groups]
    zero: Tensor | None  # [N, groups], or None with a table
    lut: Tensor | None  # float32 [16]
    perm: Tensor | None
    group: int  # 0 for one per row


def codebook(codes: Tensor, scale: Tensor, lut: Tensor, n: int, k: int, block: int) -> Wide | None:
    """The codebook weight `[n, k]`, whose codes and scales are flat; None where rows share bytes or blocks."""
    if k % block or k % 2 or lut.dtype != torch.float32 or lut.numel() != 16:
        return None
    return Wide(codes.view(n, k // 2), scale.view(n, k // block), None, lut, None, block)


def multiply(x: Tensor, weight: Wide | None, bias: Tensor | None) -> Tensor | None:
    """`x [M, K]` times the weight plus bias `[N]`: `[M, N]`, or None where another route is faster or must answer."""
    global _refused
    if _refused or weight is None or not covers(x, weight):
        return None
    units = sliced.multiprocessors(x.device)
    if not faster(x.shape[0], weight.codes.shape[0], decoding_cost(weight), units):
        return None
    try:
        return launch_wide(x, weight, bias, units)
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
        and codes.data_ptr() % 16 == 0
        and weight.scale.is_contiguous()
        and (weight.zero is None or weight.zero.is_contiguous())
        and weight.scale.numel() < 2**31
    )


def decoding_cost(weight: Wide) -> float:
    """Time of a tile of this weight over one of integer zeros in groups of 128 (8192 x 8192, M=1024)."""
    if weight.zero is None:
        return 1.15
    if weight.zero.is_floating_point() or weight.scale.dtype == torch.float32:
        return 1.27
    return 1.0 if weight.group % (2 * BK) == 0 else 1.1


def faster(m: int, n: int, cost: float, units: int) -> bool:
    """Does a product of `m` rows of x and `n` of W take less time here than through BLAS?

    Both take the same time for a full tile, within 5 %. What is lost here is the rest of the last wave
    of tiles; what is lost there is the time of dequantizing W.
    """
    if m > MOST_ROWS or units == 0:
        return False
    waves = cdiv(cdiv(n, BN) * cdiv(m, BM), units)
    filled = m * n / (BM * BN * units)
    return waves * cost - filled < n / DEQUANTIZED_PER_WAVE


def launch_wide(x: Tensor, weight: Wide, bias: Tensor | None, units: int) -> Tensor:
    """The launch for a weight that `covers` says yes to, on `units` multiprocessors: `[M, N]` in the dtype of `x`."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from quantkit.kernels.wide_hopper import wide_hopper_kernel

    if weight.perm is not None:
        x = x.index_select(1, weight.perm)
    elif x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous() if not x.is_contiguous() else x.clone()
    (m, k), n, codes = x.shape, weight.codes.shape[0], weight.codes
    out = x.new_empty((m, n))
    words = codes.view(torch.int32)
    of_x, of_words, of_y = layouts()
    grid = (min(units, cdiv(n, BN) * cdiv(m, BM)), 1, 1)
    scale, zero, lut = weight.scale, weight.zero, weight.lut
    pointers = (
        scale,
        zero if zero is not None else scale,
        lut if lut is not None else scale,
        bias if bias is not None else x,
    )
    arguments = (
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [BM, BK], of_x),
        TensorDescriptor(words, [n, k // 8], [words.stride(0), 1], [BN, BK // 8], of_words),
        TensorDescriptor(out, [m, n], [n, 1], [BM, BN // 2], of_y),
        *pointers,
        m,
        n,
        k,
        scale.shape[1],
    )
    constants = (weight.group or _WHOLE_ROW, BN, BM, BK, STAGES, TOGETHER, lut is not None, bias is not None)
    # What Triton compiles for: looking it up there takes longer than some products (`launch.launch`).
    key = (x.device, x.dtype, constants, *[(p.dtype, p.data_ptr() & 15 == 0) for p in pointers])
    if (found := _compiled.get(key)) is not None:
        found[grid](*arguments, *constants)
    else:
        _compiled[key] = wide_hopper_kernel[grid](*arguments, *constants, num_warps=4, maxnreg=REGISTERS)
    return out


@cache
def layouts() -> tuple[Any, Any, Any]:
    """Of x, words of codes and y in shared memory: as TMA writes, `wgmma` reads and bank conflicts allow."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(128, 16, 2), NVMMASharedLayout(32, 32, 2), NVMMASharedLayout(128, 16, 2)
