"""BitNet's W1.58A8 product: ternary weights, int8 activations per token, exact integer sums (Triton).

    s[m]     = 127 / max|x[m, :]|,   xq[m, k] = clamp(round(x * s), -128, 127)          (round half to even)
    y[m, n]  = (sum_k q[n, k] * xq[m, k]  -  zero[n] * sum_k xq[m, k]) * (scale[n] / s[m])  + bias[n]

Both sums are int32 and exact, so the result equals `reference._int8_linear` bit for bit in float32
before the last rounding (which is why products and sums are not fused into one instruction).

Codes are 2 bits (0, 1, 2 for -1, 0, +1; zero 1), four to a byte; as in `affine_gemm` part r of a byte meets
the inputs x[r::4], here as bytes: one shift and one mask unpack four weights. Rows of `xq` are stored by
parts, `[4, M, width]`, so that no byte is moved twice.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels import affine_launch
from quantkit.kernels import launch as device
from quantkit.kernels.launch import cdiv

BITS = 2
PARTS = 4
ROUND = 12582912.0  # 1.5 * 2**23: adding and taking it off rounds a small float32 to an integer, half to even

#: A shift and a mask give part r of four bytes at once; compiled from Triton, each byte would go its own way.
_ASM = tl.constexpr(
    "and.b32 $0, $4, 0x03030303; shr.b32 $1, $4, 2; and.b32 $1, $1, 0x03030303; "
    "shr.b32 $2, $4, 4; and.b32 $2, $2, 0x03030303; shr.b32 $3, $4, 6; and.b32 $3, $3, 0x03030303;"
)


@triton.jit
def _part(c, r: tl.constexpr):
    return ((c >> (2 * r)) & 3).to(tl.int8, bitcast=True)


@triton.jit(do_not_specialize=["M"])
def int8_rows_kernel(
    x_ptr,
    perm_ptr,
    parts_ptr,
    scale_ptr,
    sum_ptr,
    M,
    K,
    x_stride,
    width,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_PERM: tl.constexpr,
    ROUNDER: tl.constexpr,
):
    """int8 rows by parts `[4, M, width]` (zeros beyond K), their scales float32 `[M]` and sums int32 `[M]`.

    Grid (M,): one program reads its row twice.
    """
    m = tl.program_id(0)
    row = x_ptr + m.to(tl.int64) * x_stride
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        largest = tl.maximum(largest, tl.abs(tl.load(row + k, mask=k < K, other=0.0).to(tl.float32)))
    # As torch computes 127 / tensor: a reciprocal, then a product.
    scale = tl.div_rn(1.0, tl.maximum(tl.max(largest, 0), 1e-5)) * 127.0
    total = tl.zeros((BLOCK,), tl.int32)
    for r in tl.static_range(4):
        for start in tl.range(0, width, BLOCK):
            j = start + offsets
            k = j * 4 + r
            source = k
            if HAS_PERM:
                source = tl.load(perm_ptr + k, mask=k < K, other=0)
            x = tl.load(row + source, mask=k < K, other=0.0).to(tl.float32) * scale
            q = tl.minimum(tl.maximum((x + ROUNDER) - ROUNDER, -128.0), 127.0).to(tl.int32)
            total += q
            tl.store(parts_ptr + (r * M + m).to(tl.int64) * width + j, q.to(tl.int8), mask=j < width)
    tl.store(scale_ptr + m, scale)
    tl.store(sum_ptr + m, tl.sum(total, 0))


@triton.jit(do_not_specialize=["M"])
def ternary_gemm_kernel(
    parts_ptr,
    input_scale_ptr,
    sum_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    row_bytes,
    width,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BKB: tl.constexpr,
    KS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    INT8: tl.constexpr,
    ASM: tl.constexpr,
):
    """y `[M, N]`; grid (ceil(N / BN), ceil(M / BM)). KS slices of K run side by side, as in `affine_gemm`."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    rows = tl.minimum(n, N - 1)
    columns = tl.minimum(m, M - 1)
    j = tl.arange(0, KS)[:, None, None] * BKB + tl.arange(0, BKB)[None, None, :]
    code_ptrs = codes_ptr + rows[None, :, None].to(tl.int64) * row_bytes + j
    x_ptrs = parts_ptr + columns[None, :, None].to(tl.int64) * width + j
    acc = tl.zeros((KS, BN, BM), tl.int32 if INT8 else tl.float32)
    for start in tl.range(0, width, KS * BKB, num_stages=STAGES):
        inside = j < width - start
        if EVEN_K:
            c = tl.load(code_ptrs + start, mask=inside, other=0)
        else:
            c = tl.load(code_ptrs + start, mask=j < row_bytes - start, other=0)
        if ASM:
            types: tl.constexpr = (tl.int8, tl.int8, tl.int8, tl.int8)
            qs = tl.inline_asm_elementwise(_ASM, "=r,=r,=r,=r,r", [c], types, is_pure=True, pack=4)
        else:
            qs = (_part(c, 0), _part(c, 1), _part(c, 2), _part(c, 3))
        for r in tl.static_range(4):
            q = qs[r]
            x = tl.load(x_ptrs + (r * M * width + start), mask=inside, other=0)
            x = tl.trans(x, (0, 2, 1))
            if INT8:
                acc = tl.dot(q, x, acc, out_dtype=tl.int32)
            else:
                acc = tl.dot(q.to(tl.float16), x.to(tl.float16), acc)
    total = tl.sum(acc, 0).to(tl.int32)
    zero = tl.load(zero_ptr + rows).to(tl.int32)
    total -= zero[:, None] * tl.load(sum_ptr + columns)[None, :]
    scale = tl.load(scale_ptr + rows).to(tl.float32)
    factor = tl.div_rn(
        tl.broadcast_to(scale[:, None], (BN, BM)),
        tl.broadcast_to(tl.load(input_scale_ptr + columns)[None, :], (BN, BM)),
    )
    y = total.to(tl.float32) * factor
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    mask = (m[None, :] < M) & (n[:, None] < N)
    tl.store(out_ptr + m[None, :].to(tl.int64) * N + n[:, None], y.to(out_ptr.dtype.element_ty), mask=mask)


def _int8_units() -> bool:
    """Does Triton have an int8 dot here? Not on sm_75, where float16 operands and float32 sums take its place."""
    backend, arch = device.target()
    return backend != "cuda" or arch >= 80


def covers(weight: affine_launch.AffineWeight, activation: str) -> bool:
    """Is it BitNet's rule: int8 per token, 2-bit codes, one scale per output row and an integer zero?"""
    one_scale = weight.scale.shape[1] == 1 and not weight.zero.dtype.is_floating_point
    # float32 sums of 3 * 128 stay exact below 2**24.
    if not _int8_units() and weight.codes.shape[1] * PARTS > 43000:
        return False
    return activation == "int8_token" and weight.bits == BITS and one_scale


def int8_linear(x: Tensor, weight: affine_launch.AffineWeight, bias: Tensor | None) -> Tensor:
    """`x [M, K]` by BitNet's rule: `[M, N]` in the dtype of `x`."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    (m, k), n = x.shape, weight.codes.shape[0]
    width = cdiv(k, PARTS * 16) * 16
    parts = x.new_empty((PARTS, m, width), dtype=torch.int8)
    scale = x.new_empty((m,), dtype=torch.float32)
    sums = x.new_empty((m,), dtype=torch.int32)
    perm = weight.perm
    device.launch(
        int8_rows_kernel,
        (m,),
        x,
        perm if perm is not None else x,
        parts,
        scale,
        sums,
        m,
        k,
        x.stride(0),
        width,
        BLOCK_K=min(8192, triton.next_power_of_2(k)),
        BLOCK=min(2048, triton.next_power_of_2(width)),
        HAS_PERM=perm is not None,
        ROUNDER=ROUND,
        num_warps=8,
        enable_fp_fusion=False,
    )
    out = x.new_empty((m, n))
    columns = 16 if m <= 16 else 32  # int8 matrix units take no 8 columns here
    arguments = (
        parts,
        scale,
        sums,
        weight.codes,
        weight.scale,
        weight.zero,
        bias if bias is not None else x,
        out,
        m,
        n,
        k,
        weight.codes.stride(0),
        width,
    )
    options = {
        "BN": 32,
        "BM": columns,
        "BKB": 64,
        "KS": 4,
        "STAGES": 3,
        "HAS_BIAS": bias is not None,
        "EVEN_K": weight.codes.shape[1] == width,
        "INT8": _int8_units(),
        "ASM": device.has_ptx(),
        "num_warps": 4,
        "enable_fp_fusion": False,
    }
    grid = (cdiv(n, 32), cdiv(m, columns))
    affine_launch.launch_fitting(ternary_gemm_kernel, grid, arguments, options)
    return out
