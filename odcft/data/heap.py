"""Let the C library keep memory that was freed, for work that allocates and frees megabytes for every image."""

import ctypes
import functools
import platform

KEPT_BYTES = 1 << 28  # how much free memory the process may keep
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt (glibc's malloc.h)


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc not to return freed memory to the kernel at once; does nothing with another C library.

    By default it does so when more than a megabyte or so is free, and the next image takes it back, page by page. For
    rotation and colour jitter on a CPU that was more than half of the time (650 page faults an image of 224 pixels).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, KEPT_BYTES // 4)  # larger blocks still go back when they are freed
    mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
