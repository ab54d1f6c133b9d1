"""W [N, K] from e4m3 codes, dense (Triton): `e4m3(q) * scale` in float32, rounded once; NaN codes stay NaN.

Equal bit for bit to `quantkit.encoding.dequantize`. Any range of rows and of columns can be asked for.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["row_start", "k_start"])
def float8_dequantize_kernel(
    codes_ptr,
    scale_ptr,
    out_ptr,
    rows,
    columns,
    row_start,
    k_start,
    K,
    block_n,
    scale_stride,
    out_stride,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Rows row_start .. + rows, columns k_start .. + columns into out `[rows, columns]`.

    Grid: (ceil(columns / BK), ceil(rows / BN)). BLOCK_K: inputs per scale, 0 for all of them. EVEN: tiles fit rows
    and columns, so that there are no masks, which would make loads a byte wide; `k_start` is a multiple of 128.
    """
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    start = tl.program_id(0) * BK
    k = start + tl.arange(0, BK)
    inside = k[None, :] < columns
    if EVEN:
        k_start = k_start // 128 * 128  # which it is: so that the compiler knows
        row = row_start + n
        c = tl.load(codes_ptr + row[:, None].to(tl.int64) * K + k_start + k[None, :])
    else:
        row = row_start + tl.minimum(n, rows - 1)
        c = tl.load(codes_ptr + row[:, None].to(tl.int64) * K + k_start + k[None, :], mask=inside, other=0)
    wide = c.to(tl.int16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    value = half.to(tl.float32) * 256.0
    value = tl.where((wide & 0x7F) == 0x7F, float("nan"), value)
    scale_ptrs = scale_ptr + (row // block_n)[:, None].to(tl.int64) * scale_stride
    if BLOCK_K > 0 and EVEN and BLOCK_K % BK == 0:
        scale = tl.load(scale_ptrs + (k_start + start) // BLOCK_K)
    elif BLOCK_K > 0:
        scale = tl.load(scale_ptrs + ((k_start + k) // BLOCK_K)[None, :], mask=inside, other=0.0)
    else:
        scale = tl.load(scale_ptrs)
    dense = value * scale.to(tl.float32)
    out_ptrs = out_ptr + n[:, None].to(tl.int64) * out_stride + k[None, :]
    if EVEN:
        tl.store(out_ptrs, dense.to(out_ptr.dtype.element_ty))
    else:
        tl.store(out_ptrs, dense.to(out_ptr.dtype.element_ty), mask=(n[:, None] < rows) & inside)
