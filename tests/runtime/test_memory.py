"""Freed memory stays with the process until it is given back."""

import subprocess
import sys
from unittest import mock

import pytest

from blipfit.runtime import memory

FAULTS = """
import resource, sys, torch
from blipfit.runtime import memory
if sys.argv[1] == "keep":
    assert memory.keep_freed()
for _ in range(20):  # its holes settle first
    torch.ones(8 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(8 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
memory.give_back()
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


@pytest.mark.skipif(memory._glibc() is None, reason="only glibc lets a process keep its memory")
def test_kept_memory_is_not_asked_for_again():
    def run(how):
        command = [sys.executable, "-c", FAULTS, how]
        return map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())

    (kept, kept_size), (ordinary, ordinary_size) = run("keep"), run("ordinarily")
    assert ordinary > 50  # 160 MB are 40 960 pages of 4 kB, or 80 huge ones
    assert kept < ordinary / 10
    assert kept_size < ordinary_size + 10 * 1024, "given back"


def test_elsewhere_nothing_is_done():
    with mock.patch.object(sys, "platform", "darwin"):
        assert memory._glibc.__wrapped__() is None
    with mock.patch.object(memory, "_glibc", return_value=None):
        assert memory.keep_freed.__wrapped__() is False
        memory.give_back()


@pytest.mark.skipif(not memory.peak(), reason="only Linux tells")
def test_the_peak_since_it_was_forgotten():
    there = memory.forget_peak()
    bytearray(b"1" * 50_000_000)
    assert memory.peak() - there > 50_000_000
    assert memory.forget_peak() < there + 25_000_000
