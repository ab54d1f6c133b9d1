"""dx = dy @ W from packed affine weights, without W in memory (Triton).

    dx[m, k] = sum over n of (dy[m, n] * scale[n, g(k)]) * (q[n, k] - zero[n, g(k)])

A program owns BM rows and BK = BKB * PER columns of dx and runs over n. Its columns lie in one group, so
the scale depends on n only and multiplies the small tile of dy (one rounding, as rounding the weight
would be), and the codes enter the dot as exact integers. The PER codes of a byte belong to PER
neighbouring columns: one accumulator each, joined at the end. With SPLIT > 1, program_id(1) takes every
SPLIT-th step over n and float32 partial sums are added in order by `sum_splits_kernel`. Where a tile
spans groups, each weight is scaled before the dot.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.affine_unpack import codes_part, less_zero


@triton.jit(do_not_specialize=["M"])
def affine_backward_kernel(
    grad_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    perm_ptr,
    out_ptr,
    M,
    N,
    K,
    row_bytes,
    high_offset,
    groups,
    grad_stride,
    out_stride,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BKB: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    HAS_PERM: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid: (ceil(K / BK), SPLIT, ceil(M / BM)). See the module's docstring.

    EVEN: tiles fit N and K, so that codes are read without masks, which would make loads a byte wide.
    """
    PER: tl.constexpr = 4 if BITS == 3 else 8 // BITS
    BK: tl.constexpr = BKB * PER
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BN
    n = first + tl.arange(0, BN)
    j = tl.arange(0, BKB)
    k0 = tl.program_id(0) * BK
    if GROUP == 0:
        g = k0 * 0
    else:
        g = k0 // GROUP
    column = k0 // PER + j
    inside = column[None, :] < (K + PER - 1) // PER
    code_ptrs = codes_ptr + n[:, None].to(tl.int64) * row_bytes + column[None, :]
    high_ptrs = codes_ptr + n[:, None].to(tl.int64) * row_bytes + high_offset + (k0 // 8 + j // 2)[None, :]
    grad_ptrs = grad_ptr + m[:, None].to(tl.int64) * grad_stride + n[None, :]

    a0 = tl.zeros((BM, BKB), tl.float32)
    a1 = a0
    a2 = a0
    a3 = a0
    a4 = a0
    a5 = a0
    a6 = a0
    a7 = a0
    for start in tl.range(first, N, BN * SPLIT, num_stages=STAGES):
        rows = start - first + n
        valid = rows < N
        if EVEN:
            c = tl.load(code_ptrs)
        else:
            c = tl.load(code_ptrs, mask=valid[:, None] & inside, other=0)
        h = c
        if BITS == 3:
            if EVEN:
                h = tl.load(high_ptrs)
            else:
                h = tl.load(high_ptrs, mask=valid[:, None] & inside, other=0)
        if EVEN:
            dy = tl.load(grad_ptrs + (start - first), mask=m[:, None] < M, other=0.0)
        else:
            dy = tl.load(grad_ptrs + (start - first), mask=(m[:, None] < M) & valid[None, :], other=0.0)
        if ROW_SCALES:
            if EVEN:
                scale = tl.load(scale_ptr + rows * groups + g).to(tl.float32)
                zero = tl.load(zero_ptr + rows * groups + g)
            else:
                scale = tl.load(scale_ptr + rows * groups + g, mask=valid, other=0.0).to(tl.float32)
                zero = tl.load(zero_ptr + rows * groups + g, mask=valid, other=0.0)
            dy = (dy.to(tl.float32) * scale[None, :]).to(DOT)
        else:
            dy = dy.to(DOT)
        for r in tl.static_range(PER):
            if ROW_SCALES:
                w = less_zero(codes_part(c, h, j[None, :], r, BITS), zero[:, None]).to(DOT)
            else:
                ge = (k0 + j * PER + r) // GROUP
                at = rows[:, None] * groups + tl.minimum(ge, groups - 1)[None, :]
                scale_e = tl.load(scale_ptr + at, mask=valid[:, None], other=0.0).to(tl.float32)
                zero_e = tl.load(zero_ptr + at, mask=valid[:, None], other=0.0)
                w = (less_zero(codes_part(c, h, j[None, :], r, BITS), zero_e) * scale_e).to(DOT)
            if r == 0:
                a0 = tl.dot(dy, w, a0, input_precision="ieee")
            elif r == 1:
                a1 = tl.dot(dy, w, a1, input_precision="ieee")
            elif r == 2:
                a2 = tl.dot(dy, w, a2, input_precision="ieee")
            elif r == 3:
                a3 = tl.dot(dy, w, a3, input_precision="ieee")
            elif r == 4:
                a4 = tl.dot(dy, w, a4, input_precision="ieee")
            elif r == 5:
                a5 = tl.dot(dy, w, a5, input_precision="ieee")
            elif r == 6:
                a6 = tl.dot(dy, w, a6, input_precision="ieee")
            else:
                a7 = tl.dot(dy, w, a7, input_precision="ieee")
        code_ptrs += BN * SPLIT * row_bytes
        high_ptrs += BN * SPLIT * row_bytes

    if PER == 1:
        dx = a0
    elif PER == 2:
        dx = tl.join(a0, a1).reshape(BM, BK)
    elif PER == 4:
        dx = tl.join(tl.join(a0, a2), tl.join(a1, a3)).reshape(BM, BK)
    else:
        even = tl.join(tl.join(a0, a4), tl.join(a2, a6))
        odd = tl.join(tl.join(a1, a5), tl.join(a3, a7))
        dx = tl.join(even, odd).reshape(BM, BK)
    k = k0 + tl.arange(0, BK)
    if HAS_PERM:
        target = tl.load(perm_ptr + k, mask=k < K, other=0)
    else:
        target = k
    mask = (m[:, None] < M) & (k[None, :] < K)
    base = out_ptr
    if SPLIT > 1:
        base += tl.program_id(1).to(tl.int64) * M * K
    out_ptrs = base + m[:, None].to(tl.int64) * out_stride + target[None, :]
    tl.store(out_ptrs, dx.to(out_ptr.dtype.element_ty), mask=mask)
