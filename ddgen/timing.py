"""How long each stage of a piece of work takes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Timed = Callable[[str], AbstractContextManager[None]]
"""Given the name of a stage, returns a context manager around it."""


def untimed(_: str) -> AbstractContextManager[None]:
    """Measures nothing."""
    return nullcontext()


class Clock:
    """Adds up seconds per stage; a `Timed`. A stage inside another is not counted in that one.

    Args:
        wait: Called at the end of a stage: waits for what a GPU has been given to do.
        now: The time in seconds.

    Attributes:
        seconds: Stage -> seconds so far; 0 for a stage that has not been.
    """

    def __init__(self, wait: Callable[[], None] = lambda: None, now: Callable[[], float] = time.perf_counter) -> None:
        self.wait, self.now = wait, now
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside = 0.0  # seconds of the stages inside the one that is open

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start, outside, self._inside = self.now(), self._inside, 0.0
        try:
            yield
            self.wait()
        finally:
            seconds = self.now() - start
            self.seconds[stage] += seconds - self._inside
            self._inside = outside + seconds

    def shares(self, *, without: str = "") -> str:
        """Returns how the time was shared out so far, but for one stage: ``sampling 81 %, decoding 19 %``."""
        seconds = {stage: spent for stage, spent in self.seconds.items() if stage != without}
        total = sum(seconds.values()) or 1.0
        return ", ".join(f"{stage} {100 * spent / total:.0f} %" for stage, spent in seconds.items())
