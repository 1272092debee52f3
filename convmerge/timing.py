"""Timing calls on a machine that does other things as well."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

Run = Callable[[], object]
Timer = Callable[[Sequence[Run]], list[float]]  # seconds of a call of each


class Stopwatch:
    """Times calls in turn, each round beside a reference, so that whatever else the machine does meets both.

    The time of a call is the median, over ``rounds``, of its ratio to the reference in the same round, times
    the best time the reference ever took. A round repeats short calls for ``burst`` seconds.
    """

    def __init__(
        self, *, rounds: int = 7, burst: float = 2e-3, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._rounds = rounds
        self._burst = burst
        self._clock = clock
        self._best = math.inf
        layer, x = nn.Conv2d(32, 32, 3, padding=1), torch.zeros(1, 32, 32, 32)
        self._reference: Run = lambda: layer(x)

    def __call__(self, runs: Sequence[Run]) -> list[float]:
        """Seconds of one call of each."""
        every = [self._reference, *runs]
        with torch.inference_mode():
            for run in every:
                run()  # what a first call sets up is not what it takes
            counts = [max(1, int(self._burst / max(self._per_call(run, 1), 1e-9))) for run in every]
            rounds = [
                [self._per_call(run, count) for run, count in zip(every, counts, strict=True)]
                for _ in range(self._rounds)
            ]
        self._best = min(self._best, *(times[0] for times in rounds))
        ratios = zip(*([time / times[0] for time in times[1:]] for times in rounds), strict=True)
        return [statistics.median(ratio) * self._best for ratio in ratios]

    def _per_call(self, run: Run, count: int) -> float:
        start = self._clock()
        for _ in range(count):
            run()
        return (self._clock() - start) / count
