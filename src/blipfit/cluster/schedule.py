"""How long a grid takes on many workers: banks cut to the number of workers, and a simulation with failures.

Nothing here knows of models or engines; times are seconds, and a unit is a bank that one worker trains.
"""

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass

from blipfit.sweep import split_evenly

MIN_GAIN = 0.01
"""Smaller banks are used only if they shorten the whole by at least this share: each costs work in all."""


@dataclass(frozen=True, slots=True)
class Group:
    """Experiments that can share a bank, and what a bank of each size costs."""

    bank_seconds: tuple[float, ...]
    """Time of a bank of 1, 2, … experiments; as many entries as the group has experiments."""

    @property
    def fastest_size(self) -> int:
        """Experiments per bank with the least time per experiment; the smallest such size."""
        seconds_each = [seconds / size for size, seconds in enumerate(self.bank_seconds, 1)]
        return next(size for size, each in enumerate(seconds_each, 1) if each <= min(seconds_each) * (1 + 1e-9))

    def split_sizes(self, banks: int) -> list[int]:
        """Sizes of `banks` banks, nearly equal."""
        return [len(part) for part in split_evenly(self.bank_seconds, banks)]

    def seconds(self, banks: int) -> list[float]:
        """Time of each bank if the group is divided into `banks` banks."""
        return [self.bank_seconds[size - 1] for size in self.split_sizes(banks)]


@dataclass(frozen=True, slots=True)
class Simulation:
    """What happened when units ran on workers."""

    seconds: float
    """From the start to the end of the last unit."""
    busy: float
    """Share of the workers' time that went into training that was kept: without idle time, restarts, repeated work."""
    failures: int
    workers: int

    @property
    def worker_hours(self) -> float:
        """Time of all workers together until the last unit has ended; what is paid for."""
        return self.workers * self.seconds / 3600


@dataclass(frozen=True, slots=True)
class Failures:
    """How often a worker fails, and what that costs."""

    per_hour: float = 0.0
    """Failures per worker and hour, at random times."""
    restart_seconds: float = 60.0
    """From a failure to the continued unit: the failed worker's lock expires, a process starts, the model is loaded."""
    save_seconds: float = 300.0
    """Longest work that is lost: the time from one checkpoint to the next."""


def choose_bank_counts(groups: Sequence[Group], workers: int, start_seconds: float = 0.0) -> list[int]:
    """Into how many banks each group is divided, so that all together end as early as possible on `workers` workers.

    Starts with banks of the fastest size, then repeatedly gives one more bank to the group with the longest divisible
    bank, and returns the best of all these divisions. `start_seconds`: time until a unit's first step. Banks are kept
    larger if smaller ones gain less than 1 %.
    """
    counts = [-(-len(group.bank_seconds) // group.fastest_size) for group in groups]
    best, best_seconds = list(counts), _end(groups, counts, workers, start_seconds)
    while True:
        divisible = [g for g, group in enumerate(groups) if counts[g] < len(group.bank_seconds)]
        if not divisible:
            return best
        longest = max(divisible, key=lambda g: max(groups[g].seconds(counts[g])))
        counts[longest] += 1
        seconds = _end(groups, counts, workers, start_seconds)
        if seconds < (1 - MIN_GAIN) * best_seconds:
            best, best_seconds = list(counts), seconds


def _end(groups: Sequence[Group], counts: Sequence[int], workers: int, start_seconds: float) -> float:
    units = [start_seconds + s for group, banks in zip(groups, counts, strict=True) for s in group.seconds(banks)]
    return simulate(units, workers).seconds


def simulate(
    unit_seconds: Sequence[float], workers: int, failures: Failures | None = None, seed: int = 0
) -> Simulation:
    """Run units on workers: a free worker takes the longest unit that waits, as an engine with a queue does.

    A unit that fails continues on its worker from its latest checkpoint. The same seed gives the same failures.
    """
    failures, generator = failures or Failures(), random.Random(seed)
    free_at = [(0.0, worker) for worker in range(workers)]
    end, count = 0.0, 0
    for seconds in sorted(unit_seconds, reverse=True):
        now, worker = heapq.heappop(free_at)
        left = seconds
        while failures.per_hour:
            until_failure = generator.expovariate(failures.per_hour / 3600)
            if until_failure >= left:
                break
            lost = min(until_failure, generator.uniform(0, failures.save_seconds))
            left -= until_failure - lost
            now += until_failure + failures.restart_seconds
            count += 1
        now += left
        end = max(end, now)
        heapq.heappush(free_at, (now, worker))
    busy = sum(unit_seconds) / (workers * end) if end else 1.0
    return Simulation(end, busy, count, workers)


def expect(unit_seconds: Sequence[float], workers: int, failures: Failures, runs: int = 20) -> Simulation:
    """The mean of so many simulations, each with other failures; the number of failures is rounded."""
    ended = [simulate(unit_seconds, workers, failures, seed) for seed in range(runs)]
    return Simulation(
        sum(each.seconds for each in ended) / runs,
        sum(each.busy for each in ended) / runs,
        round(sum(each.failures for each in ended) / runs),
        workers,
    )
