"""How durations and sizes are written."""

from __future__ import annotations

import pytest

from ddgen.units import readable_bytes, readable_memory, readable_seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (4.24, "4.2 s"), (9.96, "10 s"), (42.4, "42 s"), (89, "89 s"), (600, "10 min"),
        (5399, "90 min"), (5400, "1.5 h"), (9000, "2.5 h"),
    ],
)  # fmt: skip
def test_seconds(seconds: float, text: str) -> None:
    assert readable_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (41_300, "41.3 kB"), (999_600, "1.0 MB"), (5_000_000, "5.0 MB"),
        (12_345_678_900, "12.3 GB"), (3e15, "3000.0 TB"),
    ],
)  # fmt: skip
def test_bytes(count: int, text: str) -> None:
    assert readable_bytes(count) == text


def test_memory() -> None:
    assert readable_memory(310 * 2**20) == "310 MiB" and readable_memory(1.4 * 2**30) == "1.4 GiB"
