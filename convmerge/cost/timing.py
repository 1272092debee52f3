"""Timing calls on a machine that does other things as well."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

Run = Callable[[], object]
Timer = Callable[[Sequence[Run]], list[float]]  # seconds of a call of each


class Stopwatch:
    """Times calls in turn, round after round, so that whatever else the machine does meets all of them.

    Other work only ever adds time. So a round repeats every call for ``burst`` seconds and keeps the best
    time, and rounds go on until the two best of every call agree within ``agreement``: at least ``least``
    and at most ``most`` of them.
    """

    def __init__(
        self,
        *,
        least: int = 5,
        most: int = 50,
        burst: float = 2e-3,
        agreement: float = 0.03,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._least, self._most = least, most
        self._burst = burst
        self._agreement = agreement
        self._clock = clock

    def __call__(self, runs: Sequence[Run]) -> list[float]:
        """Seconds of one call of each: the best of all rounds."""
        rounds: list[list[float]] = []
        with torch.inference_mode():
            for run in runs:
                run()  # what a first call sets up is not what it takes
            while len(rounds) < self._least or (len(rounds) < self._most and not self._agree(rounds)):
                rounds.append([self._best_of_burst(run) for run in runs])
        return [min(times) for times in zip(*rounds, strict=True)]

    def _agree(self, rounds: Sequence[Sequence[float]]) -> bool:
        best = (sorted(times)[:2] for times in zip(*rounds, strict=True))
        return all(second <= first * (1 + self._agreement) for first, second in best)

    def _best_of_burst(self, run: Run) -> float:
        best = math.inf
        end = self._clock() + self._burst
        while (start := self._clock()) < end or best == math.inf:
            run()
            best = min(best, self._clock() - start)
        return best
