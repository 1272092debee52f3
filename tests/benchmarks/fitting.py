"""Rates of the roofline fitted to measured times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from convmerge.cost.roofline import Load, Rate, latency


def off(rate: Rate, loads: Sequence[Load], seconds: Sequence[float]) -> float:
    """The mean absolute logarithm of predicted over measured: 0.05 is 5 % off."""
    errors = [abs(math.log(latency(rate, x) / s)) for x, s in zip(loads, seconds, strict=True)]
    return sum(errors) / len(errors)


def fitted(rate: Rate, loads: Sequence[Load], seconds: Sequence[float]) -> Rate:
    """The rate that is least off, from ``rate`` on: one figure at a time, in steps that get smaller."""
    step, least = 2.0, off(rate, loads, seconds)
    while step > 1.01:
        changed = [
            replace(rate, **{name: getattr(rate, name) * factor})
            for name in ("peak", "bandwidth", "overhead")
            for factor in (step, 1 / step)
        ]
        best = min(changed, key=lambda candidate: off(candidate, loads, seconds))
        if (found := off(best, loads, seconds)) < least:
            rate, least = best, found
        else:
            step = math.sqrt(step)
    return rate


def rate_line(name: str, rate: Rate) -> str:
    """A line of ``RATES``."""
    figures = ["math.inf" if math.isinf(x) else f"{x / 1e9:.3g}e9" for x in (rate.peak, rate.bandwidth)]
    return f'    "{name}": Rate({", ".join(figures)}, {rate.overhead * 1e6:.2g}e-6),'
