"""What `quantkit bench kernels --backward` times: dx = dy @ W from packed weights, and its memory.

A candidate takes a `PackedWeight` and answers with a function of `dy [M, N]`, or None where it covers nothing.

    quantkit          the op of the gradient, by the route that its tables choose
    quantkit-fused    the same op made to multiply from packed weights at every M (GPU, 16-bit)
    quantkit-sliced   the same op made to dequantize slices of W for the vendor's BLAS at every M (GPU)
    dequantize        the whole of W by quantkit's dequantize op, then BLAS
    dense             BLAS on a W that is never packed
    reference         plain torch: dequantize, then BLAS
    bitsandbytes      what its autograd does: dequantize_4bit, then BLAS (NF4, FP4)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from quantkit.encoding import Affine, Codebook, PackedWeight, dequantize
from quantkit.kernels import ops, tuning

Product = Callable[[Tensor], Tensor]
Candidate = Callable[[PackedWeight, torch.dtype], Product | None]


def extra_bytes(product: Product, grad: Tensor) -> float:
    """The most that a warm call allocates beside its result; NaN where the device does not count (CPUs)."""
    if grad.device.type == "cpu":
        return float("nan")
    backend: Any = torch.get_device_module(grad.device)
    product(grad)  # compiles, and lets BLAS allocate its workspace
    backend.synchronize()
    backend.reset_peak_memory_stats()
    before = backend.memory_allocated()
    out = product(grad)
    backend.synchronize()
    return float(backend.max_memory_allocated() - before - out.nbytes)


def _quantkit(packed: PackedWeight, dtype: torch.dtype) -> Product:
    enc, k, codes, scale = packed.encoding, packed.shape[1], packed.codes, packed.scale
    if isinstance(enc, Affine):
        affine = (packed.zero, packed.perm, enc.bits, enc.group_size, k)
        return lambda grad: ops.affine_linear_backward(grad, codes, scale, *affine)
    if isinstance(enc, Codebook):
        lut = packed.lut
        return lambda grad: ops.codebook_linear_backward(grad, codes, scale, lut, k, enc.block_size)
    return lambda grad: ops.float8_linear_backward(grad, codes, scale, *enc.block)


def _up_to(rows: int) -> Candidate:
    """The op with fused products up to `rows` rows of dy."""

    def prepare(packed: PackedWeight, dtype: torch.dtype) -> Product | None:
        if packed.codes.device.type == "cpu" or (rows and dtype == torch.float32):
            return None
        product = _quantkit(packed, dtype)

        def forced(grad: Tensor) -> Tensor:
            with mock.patch.object(tuning, "fused_backward", lambda kind, m, n, k, bits: m <= rows):
                return product(grad)

        return forced

    return prepare


def _dequantize(packed: PackedWeight, dtype: torch.dtype) -> Product:
    enc, (n, k), codes, scale = packed.encoding, packed.shape, packed.codes, packed.scale
    if isinstance(enc, Affine):
        affine = (packed.zero, packed.perm, enc.bits, enc.group_size, k, dtype)
        return lambda grad: grad @ ops.dequantize_affine(codes, scale, *affine)
    if isinstance(enc, Codebook):
        codebook = (packed.lut, n, k, enc.block_size, dtype)
        return lambda grad: grad @ ops.dequantize_codebook(codes, scale, *codebook)
    return lambda grad: grad @ ops.dequantize_float8(codes, scale, *enc.block, dtype)


def _dense(packed: PackedWeight, dtype: torch.dtype) -> Product:
    weight = dequantize(packed, dtype)
    return lambda grad: grad @ weight


def _reference(packed: PackedWeight, dtype: torch.dtype) -> Product:
    return lambda grad: grad @ dequantize(packed, dtype)


def _bitsandbytes(packed: PackedWeight, dtype: torch.dtype) -> Product | None:
    if not isinstance(packed.encoding, Codebook) or find_spec("bitsandbytes") is None:
        return None
    functional: Any = importlib.import_module("bitsandbytes.functional")
    state = functional.QuantState(
        packed.scale, shape=torch.Size(packed.shape), code=packed.lut, blocksize=packed.encoding.block_size,
        quant_type="nf4", dtype=dtype,
    )  # fmt: skip
    weight = packed.codes.view(-1, 1)
    return lambda grad: grad @ functional.dequantize_4bit(weight, state)


CANDIDATES: dict[str, Candidate] = {
    "quantkit": _quantkit,
    "quantkit-fused": _up_to(1 << 30),
    "quantkit-sliced": _up_to(0),
    "dequantize": _dequantize,
    "dense": _dense,
    "reference": _reference,
    "bitsandbytes": _bitsandbytes,
}
#: What runs unless asked otherwise: the op as shipped and what it is to be compared with.
DEFAULT_CANDIDATES = ("quantkit", "dequantize", "dense", "bitsandbytes")
