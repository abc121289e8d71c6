"""Freed memory stays with the process until it is released; its peak can be read and reset."""

import subprocess
import sys
from unittest import mock

import pytest

from blipfit.runtime import cpu_memory

COUNT_PAGE_FAULTS = """
import resource, sys, torch
from blipfit.runtime import cpu_memory
if sys.argv[1] == "keep":
    assert cpu_memory.keep_freed_memory()
for _ in range(20):  # until the allocator reuses freed memory
    torch.ones(8 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(8 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
cpu_memory.release_freed_memory()
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


@pytest.mark.skipif(cpu_memory._glibc() is None, reason="only glibc can keep freed memory")
def test_kept_memory_causes_no_page_faults():
    def run(mode):
        command = [sys.executable, "-c", COUNT_PAGE_FAULTS, mode]
        return map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())

    (faults, size), (ordinary_faults, ordinary_size) = run("keep"), run("ordinary")
    assert ordinary_faults > 50  # 160 MB are 40 960 pages of 4 kB, or 80 huge ones
    assert faults < ordinary_faults / 10
    assert size < ordinary_size + 10 * 1024, "memory is released"


def test_nothing_is_done_without_glibc():
    with mock.patch.object(sys, "platform", "darwin"):
        assert cpu_memory._glibc.__wrapped__() is None
    with mock.patch.object(cpu_memory, "_glibc", return_value=None):
        assert cpu_memory.keep_freed_memory.__wrapped__() is False
        cpu_memory.release_freed_memory()


@pytest.mark.skipif(not cpu_memory.peak_bytes(), reason="only Linux reports the peak")
def test_the_peak_is_counted_from_its_reset():
    start = cpu_memory.reset_peak()
    bytearray(b"1" * 50_000_000)
    assert cpu_memory.peak_bytes() - start > 50_000_000
    assert cpu_memory.reset_peak() < start + 25_000_000
