"""What the units of a sweep are doing: from run folders, from the units' attempts, and from the engine."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from blipfit import folder_lock
from blipfit.cluster.units import SweepFolder, Unit

State = Literal["waiting", "running", "finished", "failed", "lost"]
PATIENCE = 2.5
"""Heartbeats after which an owner that gave no sign of life is not counted as running."""


@dataclass(frozen=True, slots=True)
class Job:
    """What an engine says of a unit."""

    id: str
    state: Literal["waiting", "running", "failed", "ended"]
    host: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class UnitStatus:
    """The state of a unit, with all that is known of it."""

    number: int
    experiments: tuple[str, ...]
    state: State
    finished: int
    """Number of its experiments that have a result."""
    host: str | None = None
    since: str | None = None
    reason: str | None = None
    job: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the status as a record."""
        return {"unit": self.number, **{name: value for name, value in asdict(self).items() if name != "number"}}


def collect(folder: SweepFolder, units: Sequence[Unit], jobs: Mapping[int, Job]) -> list[UnitStatus]:
    """The status of all units; `jobs`: what the engine says, by number of the unit.

    Waits a few seconds if a run folder has an owner, to see whether it lives.
    """
    owners = {unit.number: owner for unit in units if (owner := _owner(unit)) is not None}
    living = _find_living([unit for unit in units if unit.number in owners])
    submitted = {job["unit"] for job in folder.read_jobs()}
    statuses = []
    for unit in units:
        job, attempt = jobs.get(unit.number), folder.read_attempt(unit.number)
        owner = owners.get(unit.number) if unit.number in living else None
        state, reason = _decide_state(unit, owner is not None, job, attempt, unit.number in submitted)
        is_running = state == "running"
        statuses.append(
            UnitStatus(
                unit.number,
                tuple(recipe.title for recipe in unit.recipes),
                state,
                sum(run.state() == "finished" for run in unit.runs),
                host=(owner.host if owner else job.host if job else None) or None if is_running else None,
                since=(owner.since if owner else attempt["since"] if attempt else None) if is_running else None,
                reason=reason,
                job=job.id if job else None,
            )
        )
    return statuses


def _decide_state(
    unit: Unit, is_alive: bool, job: Job | None, attempt: Mapping[str, Any] | None, is_submitted: bool
) -> tuple[State, str | None]:
    """The state of a unit, and the reason if it failed."""
    if unit.is_finished:
        return "finished", None
    if is_alive or (job is not None and job.state == "running"):
        return "running", None
    if job is not None and job.state == "waiting":
        return "waiting", job.reason or None
    failures = [run.failure() for run in unit.runs if run.failure_file.exists()]
    if failures or (attempt and attempt.get("reason")):
        return "failed", "; ".join(dict.fromkeys(failures)) or (attempt or {})["reason"]
    if job is not None and job.state == "failed":
        return "failed", job.reason
    return ("lost", None) if attempt is not None or is_submitted else ("waiting", None)


def _owner(unit: Unit) -> folder_lock.Owner | None:
    """The process that one of the unit's unfinished run folders names as its owner."""
    owners = (folder_lock.read_owner(run.folder) for run in unit.runs if run.state() != "finished")
    return next((owner for owner in owners if owner is not None and not owner.is_provably_gone), None)


def _find_living(units: Sequence[Unit]) -> set[int]:
    """Numbers of the units of which an owner gives a sign of life within a few seconds."""
    before = {unit.number: _signs(unit) for unit in units}
    living: set[int] = set()
    deadline = time.monotonic() + PATIENCE * folder_lock.HEARTBEAT_SECONDS
    while len(living) < len(units) and time.monotonic() < deadline:
        time.sleep(folder_lock.HEARTBEAT_SECONDS / 10)
        living |= {unit.number for unit in units if _signs(unit) != before[unit.number]}
    return living


def _signs(unit: Unit) -> list[str | None]:
    return [folder_lock.read_sign_of_life(run.folder) for run in unit.runs]
