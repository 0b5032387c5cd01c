"""Settings of the process's memory allocator: freed memory is kept."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT = 1 << 30


def keep_freed_memory() -> bool:
    """Lets glibc keep up to 1 GiB of freed memory for the next allocation instead of giving it back.

    A step of training or attack on the CPU frees and asks for the same megabytes again and again; with glibc's own
    settings the kernel unmaps, maps and clears them each time. The command line calls this; a script of your own may.

    Returns:
        Whether the allocator took it; False on other systems than Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Both, because setting one of them switches off that glibc adapts the other.
    return mallopt is not None and all(mallopt(setting, _KEPT) == 1 for setting in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
