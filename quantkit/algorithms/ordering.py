"""In which order GPTQ visits the columns, and which group each column belongs to.

GPTQ does better when columns with large activations come first, while many other columns can still
make up for their rounding errors.

* `natural`      as they are.
* `groups`       group-aware reordering (GAR, Gafni et al. 2025, arXiv 2505.14638): columns move only
                 within their group and groups move as a whole, so the file needs no `g_idx`.
* `activation`   all columns by decreasing Hessian diagonal (act-order, `desc_act`); groups are runs
                 of the NEW order, so the file needs `g_idx`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Ordering = Literal["natural", "groups", "activation"]


def column_order(diagonal: Tensor, group_size: int, ordering: Ordering) -> Tensor:
    """int64 `[K]`: position i of the working order holds column `order[i]`.

    `diagonal` is the Hessian's, `[K]`. A short last group stays last under `groups`.
    """
    k = diagonal.numel()
    if ordering == "natural":
        return torch.arange(k, device=diagonal.device)
    if ordering == "activation":
        return torch.argsort(diagonal, descending=True, stable=True)
    full = k // group_size
    head = diagonal[: full * group_size].view(full, group_size)
    inside = torch.argsort(head, dim=1, descending=True, stable=True)
    if full:
        groups = torch.argsort(head.amax(1), descending=True, stable=True)
        first = torch.arange(full, device=diagonal.device).unsqueeze(1) * group_size
        columns = (inside + first)[groups].reshape(-1)
    else:
        columns = torch.empty(0, dtype=torch.int64, device=diagonal.device)
    rest = torch.arange(full * group_size, k, device=diagonal.device)
    rest = rest[torch.argsort(diagonal[full * group_size :], descending=True, stable=True)]
    return torch.cat([columns, rest])


def inverse_order(order: Tensor) -> Tensor:
    """`inverse[order[i]] == i`."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


def sort_within_groups(perm: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """`(perm', pick)`: the same groups with columns ascending inside each; `perm' == perm[pick]`.

    This is the order that a reader recovers from `g_idx` with a stable argsort, so that an act-order
    weight is the same before and after it has been written.
    """
    group = torch.arange(perm.numel(), device=perm.device) // group_size
    pick = torch.argsort(group * perm.numel() + perm)
    return perm[pick], pick
