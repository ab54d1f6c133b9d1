"""When and how `wide_hopper_kernel` multiplies: hundreds of rows of x on sm_90, 4-bit affine weights.

Everything else keeps the route that its backend has for many rows: the weight, or a slice of it, is dequantized
and the vendor's BLAS multiplies.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels import launch as device
from quantkit.kernels import sliced
from quantkit.kernels.affine_launch import AffineWeight
from quantkit.kernels.launch import cdiv

#: Rows of W and of x per tile, inputs per step; buffers of one step; tiles of W that share the L2 cache.
BN, BM, BK = 128, 256, 64
STAGES = 4
TOGETHER = 8
#: Registers that a thread starts with: three warpgroups share 65536, and hand them over as the kernel asks.
REGISTERS = 168
#: Stands for one group per row: longer than any row.
_WHOLE_ROW = 1 << 30


def covers(x: Tensor, weight: AffineWeight) -> bool:
    """Can the kernel multiply `x [M, K]` by this weight on this device? (Is it the faster way: `serves`.)

    TMA wants addresses and rows of whole 16 bytes. Recorded launches (`quantkit.kernels.aot`) have no
    addresses at all and are not covered.
    """
    codes, k = weight.codes, x.shape[1]
    return (
        x.device.type == "cuda"
        and device.target() == ("cuda", 90)
        and x.dtype in (torch.float16, torch.bfloat16)
        and weight.bits == 4
        and weight.group % BK == 0
        and k % BK == 0
        and codes.shape[0] % 8 == 0
        and codes.stride(1) == 1
        and codes.stride(0) % 16 == 0
        and codes.data_ptr() % 16 == 0
        and weight.scale.is_contiguous()
        and weight.zero.is_contiguous()
        and codes.shape[0] * weight.scale.shape[1] < 2**31
    )


def launch_wide(x: Tensor, weight: AffineWeight, bias: Tensor | None) -> Tensor:
    """`x [M, K]` times a weight that `covers` says yes to, plus bias `[N]`: `[M, N]` in the dtype of `x`."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from quantkit.kernels.wide_hopper import wide_hopper_kernel

    if weight.perm is not None:
        x = x.index_select(1, weight.perm)
    elif x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous() if not x.is_contiguous() else x.clone()
    (m, k), n, codes = x.shape, weight.codes.shape[0], weight.codes
    out = x.new_empty((m, n))
    words = codes.view(torch.int32) if codes.is_contiguous() else codes.contiguous().view(torch.int32)
    of_x, of_words, of_y = layouts()
    tiles = cdiv(n, BN) * cdiv(m, BM)
    wide_hopper_kernel[(min(tiles, sliced.multiprocessors(x.device) or tiles),)](
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [BM, BK], of_x),
        TensorDescriptor(words, [n, k // 8], [words.stride(0), 1], [BN, BK // 8], of_words),
        TensorDescriptor(out, [m, n], [n, 1], [BM, BN // 2], of_y),
        weight.scale,
        weight.zero,
        bias if bias is not None else x,
        m,
        n,
        k,
        weight.scale.shape[1],
        GROUP=weight.group or _WHOLE_ROW,
        BN=BN,
        BM=BM,
        BK=BK,
        STAGES=STAGES,
        TOGETHER=TOGETHER,
        HAS_BIAS=bias is not None,
        num_warps=4,
        maxnreg=REGISTERS,
    )
    return out


@cache
def layouts() -> tuple[Any, Any, Any]:
    """Of x, words of codes and y in shared memory: as TMA writes, `wgmma` reads and bank conflicts allow."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(128, 16, 2), NVMMASharedLayout(32, 32, 2), NVMMASharedLayout(128, 16, 2)
