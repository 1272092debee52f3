"""Time by stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convmerge.cli.terminal import Progress


class Clock:
    """Time since it was made, and by stage."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.stages: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, progress: Progress) -> Iterator[None]:
        """Time what is done inside."""
        progress(name, 0, 0)
        start = time.perf_counter()
        yield
        self.stages[name] = time.perf_counter() - start

    def around(self, between: dict[str, float]) -> dict[str, float]:
        """The stages with those ``between`` the first and the second, in order."""
        first = dict(list(self.stages.items())[:1])
        return first | between | self.stages

    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start
