"""How `wide_hopper_kernel` multiplies: 17 and more rows of x on sm_90, weights of 2, 3, 4 and 8 bits.

Everything else keeps the routes that its backend has: a fused kernel, or the weight, a slice of it at a time, is
dequantized and the vendor's BLAS multiplies. They also answer where this Triton has no Gluon, or another one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels import launch as device
from quantkit.kernels import sliced
from quantkit.kernels.arrivals import arrivals
from quantkit.kernels.launch import cdiv
from quantkit.kernels.launch_weight import Kind, LaunchWeight
from quantkit.kernels.wide_hopper_plan import BK, BN, TILES, Plan, choose

#: Tiles of W that share the L2 cache.
TOGETHER = 8
#: Registers that a thread starts with, and that a multiplying one gets: three warpgroups share 65536.
REGISTERS, OF_PRODUCTS = 168, 232
#: The decodings of `wide_hopper_kernel`: its `KIND`, as `wide_hopper_kinds` (which imports Gluon) names them.
KINDS: dict[Kind, int] = {"codebook": 0, "float8": 1, "affine2": 2, "affine3": 3, "affine4": 4, "affine8": 8}
#: Of affine codes among them.
AFFINE_BITS = (2, 3, 4, 8)

_refused = False
#: (kernel, device, dtypes, alignment, constants) -> the compiled kernel. (Not by `launch.launch`: ADR 0026.)
_compiled: dict[tuple[Any, ...], Any] = {}
log = logging.getLogger(__name__)


def multiply(x: Tensor, weight: LaunchWeight, bias: Tensor | None) -> Tensor | None:
    """`x [M, K]` times the weight plus bias `[N]`: `[M, N]`, or None where another route is faster or must answer."""
    if _refused or not covers(x, weight):
        return None
    cost = decoding_cost(weight, x.dtype)
    chosen = choose(x.shape[0], weight.n, x.shape[1], cost, sliced.multiprocessors(x.device))
    return None if chosen is None else unless_refused(lambda: launch_wide(x, weight, bias, chosen))


def unless_refused(launch: Callable[[], Tensor]) -> Tensor | None:
    """What the launch of a Gluon kernel gives; None, for good, where this Triton refuses it.

    Gluon is experimental: its functions come and go. Anything but its refusal is heard.
    """
    global _refused
    if _refused:
        return None
    try:
        return launch()
    except Exception as error:
        refusal = isinstance(error, ImportError) or type(error).__module__.startswith("triton.")
        if not refusal or os.environ.get("QUANTKIT_KERNELS", "") == "strict":
            raise
        _refused = True
        first = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning(
            "products of many rows: the Hopper kernels do not run here (%s); other kernels answer", first
        )
        return None


def covers(x: Tensor, weight: LaunchWeight) -> bool:
    """Can the kernel multiply `x [M, K]` by this weight on this device? (Is it the faster way: `choose`.)"""
    return covers_weight(x, weight, x.shape[1])


def covers_weight(x: Tensor, weight: LaunchWeight, k: int) -> bool:
    """The same of `x` with 16-bit rows of any length and a weight of `k` inputs: of gradients too.

    TMA wants addresses and rows of whole 16 bytes; three bits have that where their high plane begins only if K is a
    multiple of 128. Rows of a codebook must be whole blocks. Recorded launches
    (`quantkit.kernels.aot`) have no addresses at all and are not covered.
    """
    codes, scale, zero, lut = weight.codes, weight.scale, weight.zero, weight.lut
    return (
        weight.kind in KINDS
        and x.device.type != "meta"
        and device.target() == ("cuda", 90)
        and x.dtype in (torch.float16, torch.bfloat16)
        and weight.group % BK == 0
        and k % (2 * BK if weight.kind == "affine3" else BK) == 0
        and weight.n % 8 == 0
        and codes.is_contiguous()
        and (weight.kind != "float8" or scale.dtype == torch.float32)
        and codes.data_ptr() % 16 == 0
        and scale.is_contiguous()
        and (zero is None or zero.is_contiguous())
        and (lut is None or (k % weight.group == 0 and lut.dtype == torch.float32 and lut.numel() == 16))
        and scale.numel() < 2**31
    )


def decoding_cost(weight: LaunchWeight, dtype: torch.dtype = torch.bfloat16) -> float:
    """Time of a tile of this weight over what one of 4 bits in groups of 128 took at first (M = 512 to 2048).

    Where `wide_hopper_affine` takes floats of 16-bit scales it is from the instructions of a turn in the compiled
    loop, 360 to 390 where 325 take 1.05.
    """
    scale, zero = weight.scale, weight.zero
    if weight.kind == "float8":
        return 1.0
    if weight.kind in ("affine2", "affine3"):
        return 1.0 if weight.group % (2 * BK) == 0 else 1.1
    if zero is None:
        return 1.1
    if scale.dtype == torch.float32 or zero.dtype == torch.float32:
        return 1.2
    if not in_sixteen_bits(weight, dtype):
        return 1.15
    return 1.05 if zero.is_floating_point() else 0.98


def in_sixteen_bits(weight: LaunchWeight, dtype: torch.dtype) -> bool:
    """Has `wide_hopper_affine` better than FLOATS for this weight of 4 or 8 bits and x of this dtype?"""
    scale, zero = weight.scale.dtype, None if weight.zero is None else weight.zero.dtype
    if zero == torch.uint8 and scale == dtype:
        return True
    sixteen = (torch.uint8, torch.float16, torch.bfloat16)
    return dtype == torch.bfloat16 and scale == torch.float16 and zero in sixteen


def launch_wide(x: Tensor, weight: LaunchWeight, bias: Tensor | None, chosen: Plan) -> Tensor:
    """The launch for a weight that `covers` says yes to: `[M, N]` in the dtype of `x`."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from quantkit.kernels.wide_hopper import wide_hopper_kernel

    kind, n, group, codes, scale, zero, lut, perm, scale_rows = weight
    if perm is not None:
        x = x.index_select(1, perm)
    else:
        x = aligned(x)
    m, k = x.shape
    out = x.new_empty((m, n))
    words = codes.view(torch.int32)
    of_x, of_words, of_high, of_y = layouts(kind)
    row = k * bits(kind) // 32  # words of K inputs
    low, high = widths(kind)
    plane = row if high == 0 else k // 16
    bm, whole, sharers, programs, _ = chosen
    pointers = (
        scale,
        zero if zero is not None else scale,
        lut if lut is not None else scale,
        bias if bias is not None else x,
        *room_for_parts(out, chosen),
    )
    arguments = (
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [bm, BK], of_x),
        TensorDescriptor(words, [n, plane], [row, 1], [BN, low], of_words),
        TensorDescriptor(words[:, plane:], [n, row - plane], [row, 1], [BN, high], of_high) if high else None,
        TensorDescriptor(out, [m, n], [n, 1], [bm, BN // 2], of_y),
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
        BK,
        TILES[bm].stages,
        TOGETHER,
        KINDS[kind],
        two_at_once(weight, k),
        bias is not None,
        OF_PRODUCTS,
    )
    run(wide_hopper_kernel, (programs, 1, 1), x, pointers, arguments, constants)
    return out


def room_for_parts(out: Tensor, chosen: Plan) -> tuple[Tensor, Tensor]:
    """For the sums of parts of `out`'s shared tiles, and the counters of who has left one (`wide_hopper_kernel`)."""
    m, columns = out.shape
    left = cdiv(columns, BN) * cdiv(m, chosen.rows) - chosen.whole
    size = (2 * chosen.sharers, chosen.rows, BN)
    return out.new_empty(size, dtype=torch.float32) if left else out, arrivals(2 * left, out.device)


def two_at_once(weight: LaunchWeight, k: int) -> bool:
    """May scales and zeros of two groups, which are a turn's two steps, be read by one load each?"""
    tensors = [t for t in (weight.scale, weight.zero) if t is not None]
    even = weight.group == BK and k % (2 * BK) == 0
    return even and all(t.element_size() <= 4 and t.data_ptr() % (2 * t.element_size()) == 0 for t in tensors)


def aligned(x: Tensor) -> Tensor:
    """`x [M, K]` as TMA reads it: rows of neighbours, which begin at multiples of 16 bytes."""
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone() if x.is_contiguous() else x.contiguous()


def run(
    kernel: Any,
    grid: tuple[int, int, int],
    x: Tensor,
    pointers: Sequence[Tensor],
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
) -> None:
    """Launch a Gluon kernel on the device of `x`; `pointers` are the tensors among its arguments."""
    # What Triton compiles for (no integers): looking it up there takes longer than some products.
    key = (kernel, x.device, x.dtype, constants, *[(p.dtype, p.data_ptr() & 15 == 0) for p in pointers])
    if (found := _compiled.get(key)) is not None:
        found[grid](*arguments, *constants)
    else:
        _compiled[key] = kernel[grid](*arguments, *constants, num_warps=4, maxnreg=REGISTERS)


def bits(kind: Kind) -> int:
    """Of a code."""
    return {"affine2": 2, "affine3": 3, "affine4": 4, "codebook": 4}.get(kind, 8)


def widths(kind: Kind) -> tuple[int, int]:
    """Words of a row that are copied at once, and of its high plane: of a step, of 2 and 3 bits of two."""
    if kind in ("affine2", "affine3"):
        return 2 * BK * 2 // 32, 2 * BK // 32 if kind == "affine3" else 0
    return BK * bits(kind) // 32, 0


@cache
def layouts(kind: Kind) -> tuple[Any, Any, Any, Any]:
    """Of x, words of codes, of high planes and y in shared memory: as TMA writes, `wgmma` reads and bank conflicts
    allow."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    of_words = NVMMASharedLayout(4 * widths(kind)[0], 32, 2)
    of_high = NVMMASharedLayout(0, 32, 2)
    return NVMMASharedLayout(128, 16, 2), of_words, of_high, NVMMASharedLayout(128, 16, 2)
