"""Measured cost of one answer."""

import sys

import pytest

from blipfit.model import latency
from blipfit.model.cost import Lengths, weight_bytes


def test_times_and_memory_of_one_answer(backbone):
    found = latency.measure(backbone, Lengths(text=12, qformer=9, answer=3), repeats=5)
    assert found["repeats"] == 5
    assert list(found["stages_s"]) == ["see", "query", "generate"]
    assert 0 < found["answer_s"]["median"] <= found["answer_s"]["p95"]
    medians = [stage["median"] for stage in found["stages_s"].values()]
    assert found["answer_s"]["p95"] >= max(medians)
    if sys.platform == "linux" and found["peak_bytes"] is not None:
        assert found["peak_bytes"] > sum(weight_bytes(backbone.hf).values())


def test_a_longer_answer_takes_longer(backbone):
    short = latency.measure(backbone, Lengths(answer=1), repeats=5)["stages_s"]["generate"]["median"]
    long = latency.measure(backbone, Lengths(answer=40), repeats=5)["stages_s"]["generate"]["median"]
    assert long > 4 * short


def test_the_95th_of_a_hundred():
    assert latency._told([float(n) for n in range(100)]) == {"median": pytest.approx(49.5), "p95": 95.0}
