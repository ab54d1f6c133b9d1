"""dx = dy @ W from four-bit codebook weights, without W in memory (Triton).

    dx[m, k] = sum over n of (dy[m, n] * absmax[n, b(k)]) * lut[q[n, k]]

A program owns BM rows and BK columns of dx, which lie in one block of every row of W, and runs over n. The
scale depends on n only and multiplies the small tile of dy (one rounding, as rounding the weight would be);
table values enter the dot. With SPLIT > 1, program_id(1) takes every SPLIT-th step over n and float32 partial
sums are added in order by `sum_splits_kernel`. The two codes of a byte belong to two neighbouring columns: an
accumulator each, joined at the end (Triton 3.6 cannot lower a joined tile as second operand). Needs blocks
that divide K, and BK that divides the block.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.codebook_lookup import two_values


@triton.jit(do_not_specialize=["M"])
def codebook_backward_kernel(
    grad_ptr,
    codes_ptr,
    scale_ptr,
    lut_ptr,
    out_ptr,
    M,
    N,
    K,
    grad_stride,
    out_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid: (ceil(K / BK), SPLIT, ceil(M / BM)). EVEN: BN divides N, so that loads need no masks."""
    HALF: tl.constexpr = BK // 2
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BN
    n = tl.arange(0, BN)
    k0 = tl.program_id(0) * BK
    code_ptrs = codes_ptr + n[:, None].to(tl.int64) * (K // 2) + k0 // 2 + tl.arange(0, HALF)[None, :]
    scale_ptrs = scale_ptr + n.to(tl.int64) * (K // BLOCK) + k0 // BLOCK
    # Rows beyond M read row M - 1 again: their sums are never stored.
    grad_ptrs = grad_ptr + tl.minimum(m, M - 1)[:, None].to(tl.int64) * grad_stride + n[None, :]

    even = tl.zeros((BM, HALF), tl.float32)
    odd = tl.zeros((BM, HALF), tl.float32)
    # The next step's codes are asked for before this one's table look-ups, whose loads would stop the pipeliner.
    at = tl.cast(first, tl.int64)
    if EVEN:
        c = tl.load(code_ptrs + at * (K // 2))
    else:
        c = tl.load(code_ptrs + at * (K // 2), mask=first + n[:, None] < N, other=0)
    for start in tl.range(first, N, BN * SPLIT, num_stages=1):
        at = tl.cast(start, tl.int64)
        after = tl.minimum(at + BN * SPLIT, (N - 1) // BN * BN)
        if EVEN:
            next_c = tl.load(code_ptrs + after * (K // 2))
            dy = tl.load(grad_ptrs + at)
            absmax = tl.load(scale_ptrs + at * (K // BLOCK))
        else:
            next_c = tl.load(code_ptrs + after * (K // 2), mask=after + n[:, None] < N, other=0)
            dy = tl.load(grad_ptrs + at, mask=start + n[None, :] < N, other=0.0)
            absmax = tl.load(scale_ptrs + at * (K // BLOCK), mask=start + n < N, other=0.0)
        dy = (dy.to(tl.float32) * absmax.to(tl.float32)[None, :]).to(DOT)
        high, low = two_values(c, lut_ptr, DOT, ASM)
        even = tl.dot(dy, high, even, input_precision="ieee")
        odd = tl.dot(dy, low, odd, input_precision="ieee")
        c = next_c

    k = k0 + tl.arange(0, BK)
    base = out_ptr
    if SPLIT > 1:
        base += tl.program_id(1).to(tl.int64) * M * K
    out_ptrs = base + m[:, None].to(tl.int64) * out_stride + k[None, :]
    dx = tl.join(even, odd).reshape(BM, BK)
    tl.store(out_ptrs, dx.to(out_ptr.dtype.element_ty), mask=m[:, None] < M)
