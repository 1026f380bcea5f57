"""How durations and sizes are written."""

from __future__ import annotations


def readable_seconds(seconds: float) -> str:
    """Returns a duration such as "4.2 s", "40 s", "12 min" or "3.5 h"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def readable_bytes(count: int) -> str:
    """Returns a size such as "310 B" or "41.3 kB", which is 41,300 bytes."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def readable_memory(count: float) -> str:
    """Returns a size such as "310 MiB" or "1.4 GiB", as memory and free disk are told elsewhere."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
