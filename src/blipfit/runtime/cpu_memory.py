"""The process's memory on a CPU: keep freed memory for reuse, return it to the system, and measure its peak."""

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

# The numbers of two settings, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


@cache
def keep_freed_memory() -> bool:
    """Let the process keep the memory of freed tensors and reuse it for new ones.

    Otherwise every activation of some megabytes goes back to the system when it is freed, and the system maps the next
    one page by page: tens of thousands of page faults in each step of a bank. The peak does not change.

    Returns whether this is possible: only with glibc on Linux.
    """
    libc = _glibc()
    if libc is None:
        return False
    # glibc before 2.35 accepts 32 MiB at most.
    large = libc.mallopt(_MMAP_THRESHOLD, 2**28) or libc.mallopt(_MMAP_THRESHOLD, 2**25)
    return bool(libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1) and large)


def release_freed_memory() -> None:
    """Return freed memory to the system."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def peak_bytes() -> int:
    """The largest resident memory of this process in bytes, since its start or the last `reset_peak`.

    Returns 0 where the system does not report it (only Linux does).
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def reset_peak() -> int:
    """Release freed memory and let `peak_bytes` count from the present memory on.

    Linux allows this for a process's own counter, without any special right. Returns the present memory in bytes, or 0
    where the peak cannot be reset.
    """
    # Memory that the process still keeps would be reused without a visible rise.
    release_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return peak_bytes()


@cache
def _glibc() -> Any:
    """The C library of this process, or None where it is not glibc."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
