"""The process's memory on a CPU: kept while training, given back on request."""

import ctypes
import sys
from functools import cache
from typing import Any

# The numbers of two settings, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


@cache
def keep() -> bool:
    """Let the process keep what tensors freed, for the next ones; whether it does (glibc on Linux).

    Otherwise every activation of some megabytes goes back to the system when freed, and the next one is paid for page
    by page: tens of thousands of page faults in a step of a bank. The peak stays what it is.
    """
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(_MMAP_THRESHOLD, 2**28) and libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def give_back() -> None:
    """Give the system what nothing uses."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
