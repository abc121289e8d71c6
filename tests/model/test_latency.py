"""Measured cost of one answer."""

import sys

import pytest

from blipfit.model import latency
from blipfit.model.cost import Lengths, weight_bytes


def test_times_and_memory_of_one_answer(backbone):
    record = latency.measure(backbone, Lengths(text=12, qformer=9, answer=3), repeats=5)
    assert record["repeats"] == 5
    assert list(record["stages_s"]) == ["see", "query", "generate"]
    assert 0 < record["answer_s"]["median"] <= record["answer_s"]["p95"]
    medians = [stage["median"] for stage in record["stages_s"].values()]
    assert record["answer_s"]["p95"] >= max(medians)
    if sys.platform == "linux" and record["peak_bytes"] is not None:
        assert record["peak_bytes"] > sum(weight_bytes(backbone.hf).values())


def test_a_longer_answer_takes_longer(backbone):
    short = latency.measure(backbone, Lengths(answer=1), repeats=5)["stages_s"]["generate"]["median"]
    long = latency.measure(backbone, Lengths(answer=40), repeats=5)["stages_s"]["generate"]["median"]
    assert long > 4 * short


def test_median_and_95th_percentile_of_100_values():
    assert latency._summarize([float(n) for n in range(100)]) == {"median": pytest.approx(49.5), "p95": 95.0}
