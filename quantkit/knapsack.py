"""One choice per item, the least summed cost within a summed size: dynamic programming over Pareto fronts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T", bound=Hashable)
_STATES = 5_000  # states kept after each item


def knapsack(
    sizes: Sequence[Mapping[T, int]], costs: Sequence[Mapping[T, float]], budget: int
) -> list[T] | None:
    """The choice per item with the least summed cost and a summed size of at most `budget`; None when nothing
    fits. Exact as long as no prefix has more than 5,000 undominated (size, cost) pairs; beyond, of pairs that
    differ by less than a 5,000th of the range of sizes only the cheapest is followed."""
    rest = [0] * (len(sizes) + 1)
    for i in range(len(sizes) - 1, -1, -1):
        rest[i] = rest[i + 1] + min(sizes[i].values())
    #: undominated states after the items so far: (size, cost, choice, index of the state before)
    fronts: list[list[tuple[int, float, Any, int]]] = [[(0, 0.0, None, -1)]]
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
        front: list[tuple[int, float, Any, int]] = []
        for state in made:
            if not front or state[1] < front[-1][1]:
                front.append(state)
        if len(front) > _STATES:
            front = _thin(front)
        fronts.append(front)
    index = min(range(len(fronts[-1])), key=lambda at: fronts[-1][at][1])
    chosen: list[T] = []
    for front in reversed(fronts[1:]):
        _, _, choice, before = front[index]
        chosen.append(choice)
        index = before
    return chosen[::-1]


def _thin(front: list[tuple[int, float, Any, int]]) -> list[tuple[int, float, Any, int]]:
    """The cheapest state in each of `_STATES` equal ranges of sizes."""
    low, high = front[0][0], front[-1][0]
    width = (high - low) // _STATES + 1
    return list({(state[0] - low) // width: state for state in front}.values())  # sizes rise, costs fall
