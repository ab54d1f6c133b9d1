"""When a layer's weight error is worth a warning: the limit, and an error that outliers cannot hide.

Rounding a normally distributed weight costs an error that only depends on the encoding. A layer that loses
more than two and a half times that (calibrated codes cost up to 1.7 times) has weights that the encoding does
not suit (outliers, heavy tails, a group far too large), or is damaged. `convert` notes such
layers; with `strict` it refuses them.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from quantkit.encoding import Affine, Codebook, Encoding, Float8

#: Relative error of rounding normal weights to NF4 in blocks of 64, and to e4m3 with a scale per tile.
_NF4_ERROR, _E4M3_ERROR = 0.095, 0.027
_TIMES = 2.5
_SAMPLE = 1 << 20
_FAR = 1e3  # medians from zero beyond which a weight is an outlier, whatever the distribution


def default_limit(encoding: Encoding, columns: int) -> float:
    """The relative weight error above which a layer of `columns` inputs is noted; at most 1, the error of
    replacing the weight by zeros."""
    if isinstance(encoding, Codebook):
        expected = _NF4_ERROR if encoding.bits == 4 else 1.0
    elif isinstance(encoding, Float8):
        expected = _E4M3_ERROR
    else:
        expected = affine_error(encoding, columns)
    return min(1.0, _TIMES * expected)


def affine_error(encoding: Affine, columns: int) -> float:
    """Relative error of normal weights on a grid that spans +- the largest of each group: the largest of n
    magnitudes is below x with probability P(|w| < x)^n, here at its median, and rounding to steps of s errs by
    s / sqrt(12)."""
    size = min(encoding.group_size, columns)
    largest = NormalDist().inv_cdf((1 + 0.5 ** (1 / max(size, 2))) / 2)
    return 2 * largest / (2**encoding.bits - 1) / math.sqrt(12)


def typical_error(weight: Tensor, delta: Tensor) -> float | None:
    """norm(delta) / norm(weight) over the weights within 1000 medians of zero; None where that is all of them.

    One weight of 1e30 makes the relative error of its tensor vanish, though every weight that shares its
    scale is lost. `weight`, `delta`: float32, same shape. The median is that of at most 2**20 weights.
    """
    magnitudes = weight.abs().reshape(-1)
    if not magnitudes.numel():
        return None
    stride = -(-magnitudes.numel() // _SAMPLE)
    limit = float(magnitudes[::stride].median()) * _FAR
    if limit == 0 or float(magnitudes.max()) <= limit:
        return None
    kept = weight.abs() <= limit
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    signal = float(torch.where(kept, weight, zero).norm())
    return float(torch.where(kept, delta, zero).norm()) / signal if signal > 0 else None


def error_note(weight: Tensor, delta: Tensor, error: float, limit: float) -> str:
    """A remark where the layer's `error` (of its weight or its outputs), or the weight error of all but the
    outliers, is above the limit; else ""."""
    if error > limit:
        return f"error {error:.3f} is above {limit:.3f}: the weights do not suit the encoding"
    rest = typical_error(weight, delta)
    if rest is not None and rest > limit:
        top = float(weight.abs().max())
        return f"without outliers (up to {top:.2g}) the weight error is {rest:.3f}, above {limit:.3f}"
    return ""
