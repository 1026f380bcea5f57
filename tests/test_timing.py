"""Seconds per stage."""

from __future__ import annotations

import pytest

from ddgen.timing import Clock


def test_a_stage_inside_another_is_counted_once() -> None:
    time = 0.0

    def later(seconds: float) -> None:
        nonlocal time
        time += seconds

    clock = Clock(now=lambda: time)
    with clock("loading"):
        later(100)
    for _ in range(2):
        with clock("ranking"):
            later(1)
            with clock("real images"):
                later(5)
                with clock("reading"):
                    later(2)
            later(1)
            with clock("real images"):
                later(1)
    assert clock.seconds == {"loading": 100, "ranking": 4, "real images": 12, "reading": 4}
    assert clock.shares(without="loading") == "reading 20 %, real images 60 %, ranking 20 %"


def test_a_stage_that_fails_counts_and_what_comes_after_is_right() -> None:
    time = 0.0
    clock = Clock(now=lambda: time)
    with pytest.raises(ZeroDivisionError), clock("outer"), clock("inner"):
        time = 3.0
        raise ZeroDivisionError
    with clock("outer"):
        time = 5.0
    assert clock.seconds == {"outer": 2, "inner": 3}
