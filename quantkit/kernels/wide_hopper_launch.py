"""When and how `wide_hopper_kernel` multiplies: hundreds of rows of x on sm_90 by 4- and 8-bit weights.

Everything else keeps the route that its backend has for many rows: the weight, or a slice of it, is dequantized
and the vendor's BLAS multiplies. That route also answers where this Triton has no Gluon, or another one.
"""

from __future__ import annotations

import logging
import os
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit.kernels import launch as device
from quantkit.kernels import sliced
from quantkit.kernels.launch import cdiv
from quantkit.kernels.wide_hopper_parts import sum_parts_kernel

#: Rows of W per tile, inputs per step; tiles of W that share the L2 cache.
BN, BK = 128, 64
TOGETHER = 8
#: Rows of x per tile: buffers of one step (4 or 8 bits fit in 227 KB beside the result's).
STAGES = {16: 12, 32: 12, 64: 12, 128: 8, 256: 4}
#: Registers that a thread starts with: three warpgroups share 65536, and hand them over as the kernel asks.
REGISTERS = 168
#: Most rows of x that were measured. (Dequantizing costs the same for any number, and weighs less and less.)
MOST_ROWS = 3072
#: Time of dequantizing W over that of one wave of tiles is N over this number, whatever K is.
DEQUANTIZED_PER_WAVE = 12300
#: Most parts of K that a tile of the last wave is cut into.
MOST_PARTS = 8
#: Cost of cutting, as the inputs (K) that a tile could multiply instead: the second launch, and each part's sums.
SECOND_PASS, PER_PART = 340.0, 5.0
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


class Plan(NamedTuple):
    """A product's tiles, and how they are given out."""

    rows: int  #: of x per tile (BM)
    whole: int  #: tiles that run through all of K; those behind them are cut
    parts: int  #: into so many parts
    each: int  #: of so many steps of BK inputs
    waves: float  #: time of all of it over the time of a tile


def multiply(x: Tensor, weight: Wide | None, bias: Tensor | None) -> Tensor | None:
    """`x [M, K]` times the weight plus bias `[N]`: `[M, N]`, or None where another route is faster or must answer."""
    global _refused
    if _refused or weight is None or not covers(x, weight):
        return None
    units = sliced.multiprocessors(x.device)
    if not faster(x.shape[0], weight.codes.shape[0], x.shape[1], decoding_cost(weight), units):
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
        and (weight.kind != FLOAT8 or weight.scale.dtype == torch.float32)
        and codes.data_ptr() % 16 == 0
        and weight.scale.is_contiguous()
        and (weight.zero is None or weight.zero.is_contiguous())
        and weight.scale.numel() < 2**31
    )


def decoding_cost(weight: Wide) -> float:
    """Time of a tile of this weight over one of 4 bits, integer zeros, groups of 128 (8192 x 8192, M=1024)."""
    if weight.kind == FLOAT8:
        return 1.0 if weight.group == 0 else 1.1
    if weight.zero is None:
        return 1.15
    if weight.zero.is_floating_point() or weight.scale.dtype == torch.float32:
        return 1.27
    return 1.0 if weight.group % (2 * BK) == 0 else 1.1


def cut(m: int, n: int, k: int, units: int, rows: int, parts: int) -> Plan:
    """The plan with tiles of `rows` rows of x, those of the last wave in (at most) `parts` parts of K."""
    tiles = cdiv(n, BN) * cdiv(m, rows)
    left, turns = tiles % units, cdiv(k, 2 * BK)
    whole, each = tiles - left, cdiv(turns, parts)
    parts = cdiv(turns, each)
    if not left or parts == 1:
        return Plan(rows, tiles, 1, 2 * turns, whole / units + (1 if left else 0))
    time = cdiv(left * parts, units) * each / turns + (SECOND_PASS + PER_PART * left * parts) / k
    return Plan(rows, whole, parts, 2 * each, whole / units + time)


@lru_cache(maxsize=4096)
def plan(m: int, n: int, k: int, units: int, rows: int = 256) -> Plan:
    """Whole waves of tiles, and the parts that the tiles left over take the least time in.

    A wave that is 40 % full takes as long as a full one; cut into two parts of K each, its tiles take half of that and
    a second pass over their sums.
    """
    plans = [cut(m, n, k, units, rows, parts) for parts in range(1, MOST_PARTS + 1)]
    return min(plans, key=lambda one: one.waves)


def faster(m: int, n: int, k: int, cost: float, units: int) -> bool:
    """Does a product of `m` rows of x and `[n, k]` of W take less time here than through BLAS?

    Both take the same time for a full tile, within 5 %. What is lost here is the rest of the last wave
    of tiles; what is lost there is the time of dequantizing W.
    """
    if m > MOST_ROWS or units == 0:
        return False
    filled = m * n / (256 * BN * units)
    return plan(m, n, k, units).waves * cost - filled < n / DEQUANTIZED_PER_WAVE


def launch_wide(
    x: Tensor, weight: Wide, bias: Tensor | None, units: int, chosen: Plan | None = None
) -> Tensor:
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
    of_x, of_words, of_y = layouts(weight.kind)
    width = words.shape[1] * BK // k
    bm, whole, parts, each, _ = chosen or plan(m, n, k, units)
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
    constants = (weight.group, BN, bm, BK, STAGES[bm], TOGETHER, weight.kind, bias is not None)
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
