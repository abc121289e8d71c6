"""Prefetching: order of the results, number of results in memory, errors, and leaving the loop early."""

import threading
import time

import pytest

from blipfit.data.prefetch import prefetch


def test_results_keep_the_order_of_the_items():
    seconds = [0.03, 0.0, 0.02, 0.0, 0.01, 0.0]

    def prepare(n: int) -> int:
        time.sleep(seconds[n])
        return n

    assert list(prefetch(range(6), prepare, threads=3, depth=3)) == list(range(6))
    assert list(prefetch([], prepare)) == []


def test_at_most_depth_items_are_prepared_in_advance():
    consumed: list[int] = []
    prepared = threading.Semaphore(0)

    def items():
        for n in range(10):
            consumed.append(n)
            yield n

    def prepare(n: int) -> int:
        prepared.release()
        return n

    results = prefetch(items(), prepare, depth=2)
    assert next(results) == 0
    for _ in range(3):  # item 0, and items 1 and 2 while the caller uses 0
        assert prepared.acquire(timeout=5)
    assert consumed == [0, 1, 2]
    assert next(results) == 1
    assert consumed == [0, 1, 2, 3]


def test_an_error_is_raised_when_its_item_is_due():
    def prepare(n: int) -> int:
        if n == 2:
            raise ValueError("two")
        return n

    results = prefetch(range(5), prepare, depth=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)


def test_leaving_the_loop_cancels_what_has_not_started():
    gate, started = threading.Event(), []

    def prepare(n: int) -> int:
        started.append(n)
        if n == 1:
            gate.wait(5)
        return n

    results = prefetch(range(100), prepare, depth=20)
    assert next(results) == 0
    threading.Timer(0.05, gate.set).start()
    results.close()
    assert len(started) <= 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
