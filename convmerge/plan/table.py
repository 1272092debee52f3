"""The table of interval dynamic programming: the best plan of every beginning of a chain."""

from __future__ import annotations

import math

from convmerge.cost.model import ZERO, Cost, Objective
from convmerge.plan.site import Part

ROUNDING = 1e-9  # of sums of costs
Total = tuple[float, float]


class Table:
    """Filled from the left: when a part is offered, what comes before it is final."""

    def __init__(self, length: int, objective: Objective) -> None:
        self._objective = objective
        self._best: list[tuple[Total, Part | None]] = [((0.0, 0.0), None)]
        self._best += [((math.inf, math.inf), None)] * length

    def offer(self, part: Part, *, split: bool) -> None:
        """A part that could follow the best plan of what is before it.

        split: whether an identity in front of it belongs to another part; of equals, others are then better.
        """
        reached, key = self._best[part.first][0], part.cost.key(self._objective)
        total = (reached[0] + key[0], reached[1] + key[1])
        known = self._best[part.last + 1][0]
        if _less(total, known) or (not split and _at_most(total, known)):
            self._best[part.last + 1] = (total, part)

    def parts(self, end: int) -> list[Part]:
        """The best plan of the first ``end`` elements."""
        parts: list[Part] = []
        while end > 0:
            last = self._best[end][1]
            assert last is not None  # every element can stay as it is
            parts.append(last)
            end = last.first
        return parts[::-1]

    def cost(self, end: int) -> Cost:
        """What the best plan of the first ``end`` elements costs."""
        return sum((part.cost for part in self.parts(end)), ZERO)


def _at_most(total: Total, best: Total) -> bool:
    """Whether a cost is lower; of equals the later counts, so that a batch norm joins what precedes it."""
    return _less(total, best) or (
        total[0] <= best[0] * (1 + ROUNDING) and total[1] <= best[1] * (1 + ROUNDING)
    )


def _less(total: Total, best: Total) -> bool:
    """Whether a cost is lower by more than rounding."""
    if best[0] == math.inf or total[0] < best[0] * (1 - ROUNDING):
        return True
    return total[0] <= best[0] * (1 + ROUNDING) and total[1] < best[1] * (1 - ROUNDING)
