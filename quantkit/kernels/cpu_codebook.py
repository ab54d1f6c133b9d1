"""NF4 and FP4 on CPUs: a few rows of W at a time are decoded into the cache and multiplied there.

    codes  uint8  [ceil(N*K/2)]      one byte holds two codes: 256 different bytes, 256 pairs of float32
    pairs  float64-sized [256]       (table[byte >> 4], table[byte & 15]) as one 8-byte value

so decoding is one look-up and one 8-byte store for every two weights, then one multiplication by the block's
absmax. The weight in float32 is that of the reference, bit for bit, and nothing of it is kept. numpy does
the work on `cpu_workers`, because it lets go of the interpreter lock and starts no threads of its own.

A piece is multiplied right where it was decoded (`cpu_blas`). Without that, so are up to DIRECT_ROWS rows of x, by
numpy; for more, pieces are decoded into a slice of at most SLICE_BYTES, which BLAS multiplies.

(onnxruntime's MatMulBnb4 decodes the whole weight at each call, several times slower:
docs/benchmarks/kernels-cpu.md.)
"""

from __future__ import annotations

import math
import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels import cpu_blas, cpu_sessions, cpu_workers

#: Weights per piece: up to 2 MB decoded, at least 512 KB where a layer has few for each thread.
PIECE, LEAST_PIECE = 1 << 19, 1 << 17
#: Largest M for which numpy multiplies pieces.
DIRECT_ROWS = 8
#: Bytes of dense weight for BLAS, which finds them in the cache.
SLICE_BYTES = 8 << 20

_local = threading.local()


def linear(x: Tensor, codes: Tensor, scale: Tensor, lut: Tensor, out_features: int, block: int) -> Tensor:
    """`x [M, K]` times W `[N, K]` in float32: a new `[M, N]`."""
    m, k = x.shape
    weight = _Weight(codes, scale, lut, k, block)
    x = x.float().contiguous()
    out = torch.empty((m, out_features), dtype=torch.float32)
    if m <= DIRECT_ROWS or cpu_blas.available():
        _run(partial(weight.multiply, x, out), weight.pieces(0, out_features))
        return out
    step = max(weight.step, SLICE_BYTES // (4 * k) // weight.step * weight.step)
    buffer = torch.empty((min(step, out_features), k), dtype=torch.float32)
    for start in range(0, out_features, step):
        end = min(start + step, out_features)
        _run(partial(weight.decode_into, buffer.numpy(), start), weight.pieces(start, end))
        torch.mm(x, buffer[: end - start].t(), out=out[:, start:end])
    return out


def dense(codes: Tensor, scale: Tensor, lut: Tensor, out_features: int, k: int, block: int) -> Tensor:
    """W `[N, K]` in float32, equal to the reference bit for bit."""
    weight = _Weight(codes, scale, lut, k, block)
    out = torch.empty((out_features, k), dtype=torch.float32)
    _run(partial(weight.decode_into, out.numpy(), 0), weight.pieces(0, out_features))
    return out


def _run(function: Any, pieces: list[tuple[int, int]]) -> None:
    cpu_workers.run_all([(function, piece) for piece in pieces], min(torch.get_num_threads(), len(pieces)))


class _Weight:
    """The packed tensors as numpy arrays (no copies), and how many rows a piece has."""

    def __init__(self, codes: Tensor, scale: Tensor, lut: Tensor, k: int, block: int) -> None:
        self.codes, self.scale = codes.detach().numpy(), scale.detach().float().numpy()
        self.k, self.block = k, block
        self.pairs = cpu_sessions.prepared("pairs", (lut,), partial(_pairs, lut))
        # Pieces begin at a byte and at a block, wherever blocks lie in the flattened weight.
        least = math.lcm(block, 2) // math.gcd(k, math.lcm(block, 2))
        share = self.codes.size * 2 // (4 * torch.get_num_threads())
        self.step = max(least, min(PIECE, max(LEAST_PIECE, share)) // k // least * least)

    def pieces(self, start: int, end: int) -> list[tuple[int, int]]:
        """Rows `start` (a multiple of `step`) to `end`, cut."""
        return [(row, min(row + self.step, end)) for row in range(start, end, self.step)]

    def multiply(self, x: Tensor, out: Tensor, rows: tuple[int, int]) -> None:
        """out[:, rows] = x @ W[rows].T"""
        import numpy

        weight, target = self.decode(*rows), out[:, rows[0] : rows[1]]
        if cpu_blas.available():
            cpu_blas.mm(x, torch.from_numpy(weight).t(), target)
        elif hasattr(numpy, "vecdot"):  # numpy 2: three times as fast
            numpy.vecdot(weight, x.numpy()[:, None], out=target.numpy())
        else:
            numpy.einsum("rk,mk->mr", weight, x.numpy(), out=target.numpy())

    def decode_into(self, target: Any, first: int, rows: tuple[int, int]) -> None:
        """target[rows - first] = W[rows]"""
        import numpy

        part = target[rows[0] - first : rows[1] - first]
        if part.size % 2:  # the last pair is half outside
            part[:] = self.decode(*rows)
        else:
            self.decode(*rows, part.reshape(-1).view(numpy.float64))

    def decode(self, start: int, end: int, values: Any = None) -> Any:
        """W[start:end], in `values` or in this thread's scratch."""
        import numpy

        first, last = start * self.k, end * self.k
        count = -(-(last - first) // 2)
        if getattr(_local, "size", 0) < count:
            _local.indices, _local.values = numpy.empty(count, numpy.intp), numpy.empty(count, numpy.float64)
            _local.size = count
        indices = _local.indices[:count]
        values = _local.values[:count] if values is None else values
        indices[:] = self.codes[first // 2 : first // 2 + count]
        numpy.take(self.pairs, indices, out=values, mode="wrap")
        weight = values.view(numpy.float32)[: last - first]
        scale = self.scale[first // self.block : -(-last // self.block)]
        whole = (last - first) // self.block
        blocks = weight[: whole * self.block].reshape(whole, self.block)
        numpy.multiply(blocks, scale[:whole, None], out=blocks)
        weight[whole * self.block :] *= scale[-1] if whole < len(scale) else 1
        return weight.reshape(end - start, self.k)


def _pairs(lut: Tensor) -> Any:
    byte = torch.arange(256)
    values = lut.detach().float()
    # float64 is 8 bytes to be moved, never a number to be computed with.
    return torch.stack([values[byte >> 4], values[byte & 15]], dim=1).contiguous().numpy().view("f8")[:, 0]
