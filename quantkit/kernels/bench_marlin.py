"""Marlin as a peer of `quantkit bench kernels`: vLLM's compiled GPTQ-Marlin product, where vLLM is installed.

Written from vLLM's Python interface (`marlin_utils`, `_custom_ops`); **not run so far**: no machine with a GPU
and vLLM was at hand. Should the interface have moved, the candidate's row says so and the others are measured.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from quantkit.encoding import Affine, PackedWeight

GROUPS = (32, 64, 128)


def prepare(packed: PackedWeight, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """The product with integer zero points (as AWQ's), 4 or 8 bits; None where Marlin does not cover it."""
    enc, (n, k), device = packed.encoding, packed.shape, packed.codes.device
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or find_spec("vllm") is None:
        return None
    if not isinstance(enc, Affine) or enc.bits not in (4, 8) or enc.group_size not in GROUPS:
        return None
    if packed.perm is not None or packed.zero is None or packed.zero.is_floating_point() or n % 64 or k % 128:
        return None
    layer: Any = importlib.import_module("vllm.model_executor.layers.quantization.utils.marlin_utils")
    operators: Any = importlib.import_module("vllm._custom_ops")
    kinds: Any = importlib.import_module("vllm.scalar_type").scalar_types
    groups = packed.scale.shape[1]
    words = packed.codes.view(torch.int32).t().contiguous()  # [K * bits / 32, N], GPTQ's order
    unordered = torch.empty(0, dtype=torch.int32, device=device)
    weight = operators.gptq_marlin_repack(words, unordered, k, n, enc.bits)
    scale = layer.marlin_permute_scales(packed.scale.to(dtype).t().contiguous(), k, n, enc.group_size)
    zero = layer.marlin_zero_points(packed.zero.int().t().contiguous(), groups, n, enc.bits)
    tail = (unordered, unordered, layer.marlin_make_workspace_new(device))
    kind = kinds.uint4 if enc.bits == 4 else kinds.uint8

    def product(x: Tensor) -> Tensor:
        out: Tensor = layer.apply_awq_marlin_linear(x, weight, scale, zero, *tail, kind, n, k)
        return out

    return product
