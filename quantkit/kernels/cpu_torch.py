"""torch's own int4 operator for CPUs: what runs where onnxruntime is not installed.

    aten::_weight_int4pack_mm_for_cpu(x [M, K], packed, group, [K/group, N, 2])    w = (q - 8) * s + b

Covers 4 bits, groups of 32, 64, 128 or 256 that divide K, N a multiple of 16. The operator keeps scales
and offsets in the dtype of `x`, so bfloat16 and float16 round them once; float32 is exact. In float32 it
computes row by row without blocking, so from a few rows on, dequantizing and calling BLAS is faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.kernels import cpu_sessions, cpu_weights

GROUPS = (32, 64, 128, 256)
#: Most rows of float32 `x` for which the operator beats the reference (docs/benchmarks/kernels-cpu.md).
FLOAT32_ROWS = 4


def int4_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """`x [..., K]` times a canonical 4-bit affine weight; NotImplemented where the operator is no help."""
    n, k = codes.shape[0], x.shape[-1]
    rows = x.numel() // k
    if bits != 4 or group_size not in GROUPS or k % group_size or n % 16:
        return NotImplemented
    if x.dtype == torch.float32 and rows > FLOAT32_ROWS:
        return NotImplemented

    @torch.no_grad()
    def build() -> tuple[Tensor, Tensor]:
        unpacked = cpu_weights.unpack(codes.detach(), 4, k).int()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpacked, 1)
        offset = (8 - zero.detach().float()) * scale.detach().float()
        pairs = torch.stack([scale.detach().float().t(), offset.t()], dim=-1)
        return packed, pairs.to(x.dtype).contiguous()

    kind = f"int4pack {group_size} {x.dtype}"
    packed, pairs = cpu_sessions.prepared(kind, (codes, scale, zero), build)
    flat = x.reshape(rows, k).contiguous()
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, packed, group_size, pairs)
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], n)
