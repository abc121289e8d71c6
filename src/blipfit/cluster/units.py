"""Units: planned banks as files, which any machine that sees the folders can train.

`RESULTS/.sweep/NAME/` holds `units/0000.json`, …: recipes, data folder, results folder, options. NAME follows from the
recipes and data folders, so the same command finds its units again. Beside a unit lies what became of its latest
attempt (`0000.attempt.json`); `jobs.json` lists what was submitted, `plan.json` the measured trials.
"""

import hashlib
import os
import platform
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blipfit import run_folder
from blipfit.errors import Interrupted, UserError
from blipfit.recipe import Recipe
from blipfit.run_folder import Run
from blipfit.runtime.save_interval import SaveInterval
from blipfit.training import events
from blipfit.training.events import Listener
from blipfit.training.loop import train
from blipfit.training.model_cache import ModelCache

SWEEPS_FOLDER = ".sweep"


@dataclass(frozen=True, slots=True)
class Unit:
    """A planned bank: its experiments, where they read and write, and how."""

    number: int
    recipes: tuple[Recipe, ...]
    data: Path
    results: Path
    device: str | None = None
    save_interval: SaveInterval | None = None
    seconds: float | None = None
    """Estimated time to the last epoch; None if nothing was measured."""

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.number:04d}"

    @property
    def runs(self) -> list[Run]:
        """The run folders that it owns while it is trained."""
        return [Run.of(self.results, recipe) for recipe in self.recipes]

    @property
    def is_finished(self) -> bool:
        """Whether all experiments have a result."""
        return all(run.state() == "finished" for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        """Return what the unit's file holds."""
        interval = self.save_interval
        return {
            "recipes": [recipe.model_dump(mode="json") for recipe in self.recipes],
            "data": str(self.data),
            "results": str(self.results),
            "device": self.device,
            "save_every": None if interval is None else {"seconds": interval.seconds, "steps": interval.steps},
            "seconds": self.seconds,
        }

    @classmethod
    def read(cls, file: Path) -> "Unit":
        """Read a unit's file. Raises UserError if it is missing or damaged."""
        values = run_folder.read_json(file)
        try:
            return cls(
                number=int(file.stem),
                recipes=tuple(Recipe.model_validate(recipe) for recipe in values["recipes"]),
                data=Path(values["data"]),
                results=Path(values["results"]),
                device=values["device"],
                save_interval=SaveInterval(**values["save_every"]) if values["save_every"] else None,
                seconds=values["seconds"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is not a unit of `blipfit sweep`: {error!s:.200}; run the sweep again") from None


@dataclass(frozen=True, slots=True)
class SweepFolder:
    """`RESULTS/.sweep/NAME/`: the units of one sweep, and what was submitted."""

    folder: Path

    @classmethod
    def of(cls, recipes: Sequence[Recipe], data: Mapping[str, Path], results: Path) -> "SweepFolder":
        """The folder of a sweep of these recipes; the same recipes and data folders have the same one."""
        names = sorted({recipe.data.name for recipe in recipes})
        parts = sorted(recipe.to_yaml() for recipe in recipes) + [str(data[name].resolve()) for name in names]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
        return cls(results.resolve() / SWEEPS_FOLDER / f"{'-'.join(names)}-{digest}")

    @property
    def name(self) -> str:
        """Name of the sweep, for engines."""
        return self.folder.name

    @property
    def plan_file(self) -> Path:
        """The measured trials of its groups."""
        return self.folder / "plan.json"

    @property
    def jobs_file(self) -> Path:
        """What was submitted: engine, job id and unit."""
        return self.folder / "jobs.json"

    @property
    def engine_folder(self) -> Path:
        """Logs and scripts of the engine."""
        return self.folder / "engine"

    def unit_file(self, number: int) -> Path:
        """File of a unit."""
        return self.folder / "units" / f"{number:04d}.json"

    def write_units(self, units: Sequence[Unit]) -> None:
        """Write all units' files."""
        for unit in units:
            run_folder.write_json(self.unit_file(unit.number), unit.to_json())

    def read_units(self) -> list[Unit]:
        """All units, by number; none if the sweep has no units yet."""
        files = (file for file in (self.folder / "units").glob("*.json") if file.stem.isdecimal())
        return [Unit.read(file) for file in sorted(files)]

    def read_jobs(self) -> list[dict[str, Any]]:
        """Everything that was submitted, in that order."""
        return run_folder.read_json(self.jobs_file) if self.jobs_file.exists() else []

    def add_jobs(self, jobs: Sequence[Mapping[str, Any]]) -> None:
        """Record what was submitted."""
        run_folder.write_json(self.jobs_file, [*self.read_jobs(), *jobs])

    def read_attempt(self, number: int) -> dict[str, Any] | None:
        """Host, start and end of a unit's latest attempt; None before the first."""
        file = _attempt_file(self.unit_file(number))
        return run_folder.read_json(file) if file.exists() else None


def train_unit(file: Path, model_cache: ModelCache | None = None, listener: Listener = events.ignore) -> list[Run]:
    """Train a unit: finished experiments are skipped, interrupted ones continue. Returns its runs.

    What becomes of the attempt is written beside the unit's file. Raises UserError as `training.loop.train`.
    """
    unit = Unit.read(file)
    attempt = {"host": platform.node(), "pid": os.getpid(), "since": _now(), "job": os.environ.get("SLURM_JOB_ID")}
    run_folder.write_json(_attempt_file(file), attempt)
    try:
        runs = train(
            unit.recipes,
            unit.data,
            unit.results,
            device=unit.device,
            model_cache=model_cache,
            listener=listener,
            save_interval=unit.save_interval,
        )
    except BaseException as error:
        run_folder.write_json(_attempt_file(file), {**attempt, "until": _now(), "reason": _describe(error)})
        raise
    run_folder.write_json(_attempt_file(file), {**attempt, "until": _now(), "reason": None})
    return runs


def _attempt_file(unit_file: Path) -> Path:
    return unit_file.with_suffix(".attempt.json")


def _describe(error: BaseException) -> str | None:
    """Why an attempt failed; None if it was only interrupted."""
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return None
    if isinstance(error, UserError):
        return str(error)
    return traceback.format_exception_only(error)[-1].strip()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
