"""Many rows with rounded activations through torch's scaled product (cuBLASLt, on some chips CUTLASS).

    activation     scales of W                 recipe    scale_a                  scale_b
    static         one                         TENSOR    1 number                 1 number
    static, token  one, or one a row           ROW       [M, 1]                   [1, N]
    group128       one per 128 x 128 weights   BLOCK     [M4, K/128], (1, M4)     [L4, ceil(N/128)], (1, L4)

In parentheses strides, where other than contiguous; M4 is M rounded up to a multiple of 4, L4 so is K/128 (what
cuBLAS's manual says of "128-element 1D and 128x128 2D block scaling"). Scales that one number stands for are
written out, because ROW asks both operands for vectors. The running sum is promoted to float32 every few
products (`use_fast_accum=False`), as in `float8_native`, which answers everywhere else.

`float8_tuning.SCALED_ROWS` and `SCALED_BLOCK_ROWS` say from how many rows on (ADR 0037); None switches it off.
"""

from __future__ import annotations

import logging
import os
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from quantkit.kernels import float8_tuning
from quantkit.kernels import launch as device
from quantkit.kernels.launch import cdiv


class Recipe(Enum):
    """How the two operands are scaled: the names that torch has for it."""

    TENSOR = (ScalingType.TensorWise, ScalingType.TensorWise)
    ROW = (ScalingType.RowWise, ScalingType.RowWise)
    BLOCK = (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128)


#: Rows of q and x_scale under `Recipe.BLOCK` are a multiple of this.
BLOCK_ROWS = 4

#: What torch refused: (device, recipe, dtype, with a bias?).
_refused: set[tuple[torch.device, Recipe, torch.dtype, bool]] = set()
log = logging.getLogger(__name__)


def recipe(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block_n: int,
    block_k: int,
    activation: str,
) -> Recipe | None:
    """How torch multiplies `x [M, K]`, rounded, by this weight; None: off, too few rows, not covered, refused before.

    Recorded launches (`quantkit.kernels.aot`) are not covered: what torch would launch is not theirs to hold.
    """
    (m, k), n = x.shape, codes.shape[0]
    blocks = activation == "fp8_group128"
    least = float8_tuning.SCALED_BLOCK_ROWS if blocks else float8_tuning.SCALED_ROWS
    if least is None or m < least or x.device.type == "meta":
        return None
    found = _recipe(n, k, scale, block_n, block_k, activation)
    if found is None or not _runs_here(found):
        return None
    if n % 16 or k % 16 or not codes.is_contiguous() or codes.data_ptr() % 16:
        return None
    if bias is not None and not (
        # Another dtype than the result's is not taken, and none at all beside a float32 result.
        bias.dtype == x.dtype != torch.float32 and bias.is_contiguous() and bias.data_ptr() % 16 == 0
    ):
        return None
    return None if (x.device, found, x.dtype, bias is not None) in _refused else found


def _recipe(n: int, k: int, scale: Tensor, block_n: int, block_k: int, activation: str) -> Recipe | None:
    if activation == "fp8_group128":
        return Recipe.BLOCK if block_n == block_k == 128 and k % 128 == 0 else None
    if block_k < k or (block_n != 1 and block_n < n):
        return None
    return Recipe.TENSOR if activation == "fp8_static" and scale.numel() == 1 else Recipe.ROW


def _runs_here(found: Recipe) -> bool:
    """Is the recipe known to work on this device?

    Blocks are Hopper's. On sm_89 torch before 2.12 clears the workspace of its row-wise kernel on the default stream,
    whatever the current one is (pytorch#177651): results race, or the kernel waits forever.
    """
    backend, arch = device.target()
    if backend != "cuda" or arch < 89:
        return False
    if found is Recipe.BLOCK:
        return arch == 90
    return found is Recipe.TENSOR or arch >= 90 or torch.__version__ >= "2.12"


def multiply(
    q: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    found: Recipe,
    rows: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """The first `rows` rows of `q` e4m3 times W plus bias: `[rows, N]` in `dtype`, or None where torch refuses.

    `q [M, K]` and `x_scale` as `float8.round_activation` lays them out for the recipe. A refusal is said once;
    `recipe` does not ask for the same again.
    """
    n = codes.shape[0]
    of_x, of_w = found.value
    if found is Recipe.BLOCK:
        a, b = x_scale, _block_scale(scale)
    elif found is Recipe.TENSOR:
        a, b = x_scale.view(1), scale.float().view(1)
    else:
        a = x_scale.expand(q.shape[0], 1).contiguous()
        b = scale.float().reshape(1, -1).expand(1, n).contiguous()
        b = b if b.data_ptr() % 16 == 0 else b.clone()
    weight = codes.view(torch.float8_e4m3fn).T
    options: dict[str, Any] = {"bias": bias, "output_dtype": dtype, "use_fast_accum": False}
    try:
        out = scaled_mm(q, weight, a, of_x, b, of_w, **options)
    except (RuntimeError, ValueError) as error:
        failed = isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError))
        if failed or os.environ.get("QUANTKIT_KERNELS", "") == "strict":
            raise
        _refused.add((q.device, found, dtype, bias is not None))
        first = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning(
            "float8 products of many rows (%s scales, %s%s): torch's scaled product does not run here (%s); "
            "float8_native answers",
            found.name.lower(), str(dtype).removeprefix("torch."), ", bias" if bias is not None else "", first,
        )  # fmt: skip
        return None
    return out[:rows]


def _block_scale(scale: Tensor) -> Tensor:
    """Scales `[ceil(N/128), L]` as cuBLAS reads them: float32 `[L4, ceil(N/128)]`, each column contiguous.

    No copy is made where L is a multiple of 4 (K of 512), as it is in all but the smallest models.
    """
    blocks, steps = scale.shape
    padded = cdiv(steps, 4) * 4
    fits = steps == padded and scale.dtype == torch.float32 and scale.stride() == (steps, 1)
    if not fits or scale.data_ptr() % 16:
        wide = scale.new_zeros((blocks, padded), dtype=torch.float32)
        wide[:, :steps] = scale
        scale = wide
    return scale.T
