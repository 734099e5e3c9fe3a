"""Keep freed memory in the process while training on a CPU."""

from __future__ import annotations

import ctypes
import platform

# Parameter numbers of mallopt(3) in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to reuse large blocks, not to hand them back to the system.

    Every training step frees and asks for the same arrays of many megabytes. By default each is mapped anew, and the
    page faults took 40 % of a step of the nano network (float32, batch 16, 120x160, one core: 3.2 s against 1.9 s).

    Returns:
        Whether the allocator took the settings; ``False`` on other systems.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
