"""One choice per item, the least summed cost within a summed size: dynamic programming over Pareto fronts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_STATES = 20_000  # states kept after each item; beyond, sizes are rounded up


def knapsack(
    sizes: Sequence[Mapping[int, int]], costs: Sequence[Mapping[int, float]], budget: int
) -> list[int] | None:
    """The choice per item with the least summed cost and a summed size of at most `budget`; None when nothing
    fits. Exact as long as no prefix has more than 20,000 undominated (size, cost) pairs; beyond, sizes are
    rounded up to a 20,000th of the budget, so the budget still holds."""
    rest = [0] * (len(sizes) + 1)
    for i in range(len(sizes) - 1, -1, -1):
        rest[i] = rest[i + 1] + min(sizes[i].values())
    #: undominated states after the items so far: (size, cost, choice, index of the state before)
    fronts: list[list[tuple[int, float, int, int]]] = [[(0, 0.0, 0, -1)]]
    for i, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
        made = [
            (before[0] + size[choice], before[1] + cost[choice], choice, index)
            for index, before in enumerate(fronts[-1])
            for choice in size
            if before[0] + size[choice] + rest[i + 1] <= budget
        ]
        if not made:
            return None
        made.sort(key=lambda state: (state[0], state[1]))
        front: list[tuple[int, float, int, int]] = []
        for state in made:
            if not front or state[1] < front[-1][1]:
                front.append(state)
        if len(front) > _STATES:
            front = _thin(front, budget)
        fronts.append(front)
    index = min(range(len(fronts[-1])), key=lambda at: fronts[-1][at][1])
    chosen: list[int] = []
    for front in reversed(fronts[1:]):
        _, _, choice, before = front[index]
        chosen.append(choice)
        index = before
    return chosen[::-1]


def _thin(front: list[tuple[int, float, int, int]], budget: int) -> list[tuple[int, float, int, int]]:
    """The cheapest state of every bucket of sizes, its size rounded up to the bucket's end."""
    width = max(1, math.ceil(budget / _STATES))
    kept: dict[int, tuple[int, float, int, int]] = {}
    for size, cost, choice, index in front:
        end = min(-(-size // width) * width, budget)
        if end not in kept or cost < kept[end][1]:
            kept[end] = (max(end, size), cost, choice, index)
    return [kept[end] for end in sorted(kept)]
