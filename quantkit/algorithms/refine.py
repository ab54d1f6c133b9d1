"""Passes after GPTQ that keep the file's layout and lower the layer's error `tr(E H E^T)`.

* `refit_scales`    codes fixed: the scales of all groups of a row that minimise the row's error, a
                    G x G least-squares problem per row in closed form;
* `descend_codes`   scales fixed: cyclic coordinate descent on the codes. Column j moves to the grid
                    value nearest to its optimum given all other columns (QuantEase, Behdin et al.
                    2023, arXiv 2309.01885), batched over rows and blocked like GPTQ.

Both work on the transposed weight `[K, N]` and never raise the error they are given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.algorithms.quantizers import ColumnQuantizer

_ROWS_AT_ONCE = 1 << 26  # elements of the [G, G, rows] systems held at a time


def row_errors(error: Tensor, hessian: Tensor) -> Tensor:
    """`e_n H e_n^T` for each row n: float32 `[N]` from `error` `[K, N]`."""
    return (error * (hessian @ error)).sum(0)


def descend_codes(
    target: Tensor,
    codes: Tensor,
    values: Tensor,
    hessian: Tensor,
    quantizer: ColumnQuantizer,
    group_of: list[int],
    block_size: int = 128,
) -> bool:
    """One sweep over all columns, in place on `codes` and `values` `[K, N]`; True if a code moved.

    `target` is the weight that was quantized. `hessian` `[K, K]` (damped, in working order).
    """
    k = target.shape[0]
    slope = hessian @ (target - values)  # [K, N]: half the negative gradient
    inverse_diagonal = (1.0 / torch.diagonal(hessian)).tolist()
    before = codes.clone()
    for start in range(0, k, block_size):
        stop = min(start + block_size, k)
        local = slope[start:stop]
        inside = hessian[start:stop, start:stop]
        moved = torch.empty_like(local)
        for i in range(stop - start):
            j = start + i
            want = torch.add(values[j], local[i], alpha=inverse_diagonal[j])
            code, level = quantizer.round(want, group_of[j])
            value = level.mul_(quantizer.scale[group_of[j]])
            step = torch.sub(value, values[j], out=moved[i])
            codes[j] = code
            values[j] = value
            if i + 1 < stop - start:
                local[i + 1 :].addr_(inside[i + 1 :, i], step, alpha=-1)
        if stop < k:
            slope[stop:].addmm_(hessian[stop:, start:stop], moved, alpha=-1)
    return not torch.equal(before, codes)


def refit_scales(
    target: Tensor,
    codes: Tensor,
    values: Tensor,
    hessian: Tensor,
    quantizer: ColumnQuantizer,
    group_of: Tensor,
    ridge: float = 1e-3,
) -> None:
    """Re-fit all scales of each row with codes fixed; rows that would get worse keep theirs.

    In place on `values` and `quantizer.scale`. `ridge` pulls a scale towards its old value by that
    share of its own curvature (a group without activations has none and would be undefined).
    """
    groups = quantizer.scale.shape[0]
    level = quantizer.levels(codes, group_of)  # [K, N]
    pull = hessian @ target
    order = [torch.nonzero(group_of == g).flatten() for g in range(groups)]
    n = target.shape[1]
    chunk = max(1, _ROWS_AT_ONCE // max(groups * groups, 1))
    fitted = torch.empty_like(quantizer.scale)
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        part = level[:, rows]
        system = part.new_zeros(part.shape[1], groups, groups)
        right = part.new_zeros(part.shape[1], groups)
        for g, columns in enumerate(order):
            spread = (hessian[:, columns] @ part[columns]) * part
            system[:, g] = part.new_zeros(groups, part.shape[1]).index_add_(0, group_of, spread).t()
            right[:, g] = (part[columns] * pull[columns, rows]).sum(0)
        old = quantizer.scale[:, rows].t()
        own = torch.diagonal(system, dim1=1, dim2=2)
        keep = own * ridge + own.mean(1, keepdim=True).clamp(min=1e-20) * 1e-6
        right = right + keep * old
        system = system + torch.diag_embed(keep)
        answer, info = torch.linalg.solve_ex(system, right.unsqueeze(2))
        answer = answer.squeeze(2)
        good = torch.isfinite(answer) & (answer * old > 0) & (info == 0).unsqueeze(1)
        fitted[:, rows] = torch.where(good, answer, old).t()
    fitted = quantizer.stored(fitted)
    candidate = level * fitted[group_of]
    better = row_errors(target - candidate, hessian) < row_errors(target - values, hessian)
    quantizer.scale.copy_(torch.where(better, fitted, quantizer.scale))
    values.copy_(torch.where(better, candidate, values))
