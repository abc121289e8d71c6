"""The process's memory on a CPU: kept while training, given back on request, its peak."""

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

# The numbers of two settings, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


@cache
def keep_freed() -> bool:
    """Let the process keep what tensors freed, for the next ones; whether it does (glibc on Linux).

    Otherwise every activation of some megabytes goes back to the system when freed, and the next one is paid for page
    by page: tens of thousands of page faults in a step of a bank. The peak stays what it is.
    """
    libc = _glibc()
    if libc is None:
        return False
    # glibc before 2.35 takes 32 MiB at most.
    large = libc.mallopt(_MMAP_THRESHOLD, 2**28) or libc.mallopt(_MMAP_THRESHOLD, 2**25)
    return bool(libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1) and large)


def give_back() -> None:
    """Give the system what nothing uses."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def peak() -> int:
    """Bytes: the most that was ever resident of this process, or since `forget_peak`; 0 where nobody tells."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def forget_peak() -> int:
    """Give back what nothing uses and let `peak` begin anew; what it begins from, 0 where it cannot be forgotten.

    Linux forgets when asked to, without any right beyond one's own process.
    """
    give_back()  # what is taken from there again would not be seen to rise
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return peak()


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
