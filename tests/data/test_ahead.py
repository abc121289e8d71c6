"""Order, bound, errors and early leaving of work done ahead."""

import threading
import time

import pytest

from blipfit.data.ahead import ahead


def test_results_come_in_order_whatever_takes_longest():
    waits = [0.03, 0.0, 0.02, 0.0, 0.01, 0.0]

    def prepare(n: int) -> int:
        time.sleep(waits[n])
        return n

    assert list(ahead(range(6), prepare, threads=3, depth=3)) == list(range(6))
    assert list(ahead([], prepare)) == []


def test_the_next_ones_are_prepared_during_use_and_no_more_than_depth():
    drawn: list[int] = []
    prepared = threading.Semaphore(0)

    def items():
        for n in range(10):
            drawn.append(n)
            yield n

    def prepare(n: int) -> int:
        prepared.release()
        return n

    results = ahead(items(), prepare, depth=2)
    assert next(results) == 0
    for _ in range(3):  # 0 and, while it is in use, 1 and 2
        assert prepared.acquire(timeout=5)
    assert drawn == [0, 1, 2]
    assert next(results) == 1
    assert drawn == [0, 1, 2, 3]


def test_an_error_is_raised_at_its_turn():
    def prepare(n: int) -> int:
        if n == 2:
            raise ValueError("two")
        return n

    results = ahead(range(5), prepare, depth=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)


def test_leaving_early_drops_what_has_not_begun():
    gate, begun = threading.Event(), []

    def prepare(n: int) -> int:
        begun.append(n)
        if n == 1:
            gate.wait(5)
        return n

    results = ahead(range(100), prepare, depth=20)
    assert next(results) == 0
    threading.Timer(0.05, gate.set).start()
    results.close()
    assert len(begun) <= 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
