"""Banks cut to the number of workers, and the simulation of a grid on them."""

import pytest

from blipfit.cluster.schedule import Failures, Group, choose_bank_counts, expect, simulate

# Seconds per step and experiment, one NVIDIA H200, 2026-11-27 (benchmarks/results/2026-11-27-gpu-h200-*.json).
H200 = {"t5": {1: 0.0902, 8: 0.0754, 16: 0.0658}, "vicuna": {1: 0.1696, 8: 0.1649}}
QUESTIONS = {"scienceqa": 6218, "iconqa": 18946}
EPOCHS, BATCH = 20, 16


def published_grid() -> list[Group]:
    """Both data sets, 16 experiments of each family with a trained and 16 with a LoRA Q-Former."""
    groups = []
    for questions in QUESTIONS.values():
        for sizes in H200.values():
            measured = [max(size for size in sizes if size <= k) for k in range(1, 17)]
            steps = EPOCHS * questions // BATCH
            groups += 2 * [Group(tuple(k * steps * sizes[size] for k, size in enumerate(measured, 1)))]
    return groups


def durations(groups: list[Group], counts: list[int]) -> list[float]:
    return [seconds for group, banks in zip(groups, counts, strict=True) for seconds in group.seconds(banks)]


def test_units_without_failures() -> None:
    ended = simulate([4, 3, 3, 2], 2)
    assert (ended.seconds, ended.busy, ended.failures) == (6, 1.0, 0)
    assert simulate([4, 4], 4).busy == 0.5
    assert simulate([], 3).seconds == 0
    assert ended.worker_hours == pytest.approx(2 * 6 / 3600)


def test_failures_cost_time_and_are_the_same_for_a_seed() -> None:
    failures = Failures(per_hour=0.5, restart_seconds=60, save_seconds=300)
    units = [3600.0] * 64
    first, again, other = (simulate(units, 64, failures, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first.failures > 10
    # Every failure costs its restart and at most one save interval, on its own worker.
    assert 3600 + 60 < first.seconds <= 3600 + first.failures * 360
    assert first.busy < 1


def test_few_workers_get_the_fastest_banks_and_many_get_small_ones() -> None:
    groups = published_grid()
    assert [group.fastest_size for group in groups] == [16, 16, 8, 8] * 2
    assert choose_bank_counts(groups, 1) == [1, 1, 2, 2] * 2
    counts = choose_bank_counts(groups, 64)
    assert sum(counts) >= 64
    large = durations(groups, choose_bank_counts(groups, 1))
    assert simulate(durations(groups, counts), 64).seconds < 0.3 * simulate(large, 64).seconds


@pytest.mark.parametrize("workers", [1, 8, 64])
def test_workers_are_busy_with_the_published_grid(workers: int) -> None:
    groups = published_grid()
    units = durations(groups, choose_bank_counts(groups, workers, start_seconds=60))
    assert expect(units, workers, Failures(per_hour=1 / 24)).busy >= 0.85
    assert simulate(units, workers).busy >= 0.85


def test_experiments_that_cannot_be_balanced_are_no_endless_loop() -> None:
    groups = [Group((1.0,)), Group((10.0,))]
    assert choose_bank_counts(groups, 8) == [1, 1]
    assert choose_bank_counts([], 8) == []
    assert Group((1.0,) * 7).split_sizes(3) == [2, 2, 3]
