"""How the C library keeps memory that was freed."""

from __future__ import annotations

import ctypes
import platform

# malloc.h of glibc: names of mallopt's parameters, and the defaults of its manual page.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _TOP_PAD: 128 * 1024, _MMAP_MAX: 65_536}
_KEEP = {_TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * 2**20, _MMAP_MAX: 0}


def keep_freed_memory(keep: bool = True) -> bool:
    """Lets the process reuse large freed blocks instead of returning them to the system; nothing is computed otherwise.

    By default glibc returns every block of some megabytes, and the system clears each page again when the next layer
    asks for it: training a small network on a CPU spends a tenth to a third of its time so.

    Args:
        keep: Whether to keep freed memory; false goes back to the C library's way.

    Returns:
        Whether that is possible here: under glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(name, value) == 1 for name, value in (_KEEP if keep else _DEFAULTS).items())
