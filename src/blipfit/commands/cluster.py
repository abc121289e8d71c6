"""`blipfit sweep --engine slurm|ray`, `--status`, `--cancel`, and `--plan --gpus`: a sweep on many machines."""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blipfit import run_folder, sweep
from blipfit.cluster import plan as cluster_plan
from blipfit.cluster import ray_engine, slurm
from blipfit.cluster import status as cluster_status
from blipfit.cluster.ray_engine import RayOptions as RayOptions
from blipfit.cluster.schedule import Failures as Failures
from blipfit.cluster.slurm import SlurmOptions as SlurmOptions
from blipfit.cluster.status import Job, UnitStatus
from blipfit.cluster.units import SweepFolder, Unit
from blipfit.commands import sweep as sweep_command
from blipfit.commands import train
from blipfit.errors import UserError
from blipfit.recipe import Recipe
from blipfit.report import terminal
from blipfit.report.progress import TrainingDisplay
from blipfit.report.workers_display import WorkersDisplay
from blipfit.run_folder import Run
from blipfit.runtime import distributed
from blipfit.runtime.save_interval import SaveInterval
from blipfit.training.model_cache import ModelCache

STATES = ("waiting", "running", "finished", "failed", "lost")


@dataclass(frozen=True, slots=True)
class ClusterSweep:
    """The arguments of a sweep that does not run in this process."""

    recipes: Sequence[Recipe]
    data: Mapping[str, Path]
    results: Path
    bank: int | None = None
    device: str | None = None
    save_interval: SaveInterval | None = None

    @property
    def folder(self) -> SweepFolder:
        """Where its units are."""
        return SweepFolder.of(self.recipes, self.data, self.results)

    def make_units(self, workers: int | None) -> list[Unit]:
        """Its units, written if they are not there. Raises UserError as `plan.make_units`."""
        results = self.results.resolve()
        template = Unit(0, (), Path(), results, self.device, self.save_interval)
        return cluster_plan.make_units(self.recipes, self.data, results, self.folder, self.bank, workers, template)

    def summarize(self) -> dict[str, Any]:
        """Results of all experiments, as after a sweep on this machine."""
        return train.summarize([Run.of(self.results, recipe) for recipe in self.recipes])


def run_plan(
    arguments: ClusterSweep, gpus: Sequence[int], failures: Failures, price: float | None, device: torch.device
) -> dict[str, Any]:
    """Measure trial steps on this machine, write them to the sweep's folder, and estimate time and cost on many.

    Raises UserError if an input cannot be used or no bank fits into memory.
    """
    model_cache = ModelCache(device)
    started = time.perf_counter()
    model_cache.splits(arguments.recipes[0], arguments.data[arguments.recipes[0].data.name])
    start_seconds = time.perf_counter() - started
    with TrainingDisplay() as display:
        plan = sweep.make_plan(
            arguments.recipes, arguments.data, arguments.results, model_cache, arguments.bank, display
        )
    device_name = distributed.device_name(device)
    measured = cluster_plan.MeasuredPlan(plan.groups, device_name, start_seconds)
    run_folder.write_json(arguments.folder.plan_file, measured.to_json())
    return {
        "plan": sweep_command.plan_record(plan),
        "measured_on": device_name,
        "start_seconds": round(start_seconds, 1),
        "failures_per_hour": failures.per_hour,
        "gpus": cluster_plan.estimate(measured, gpus, failures, price),
    }


def render_plan(record: Mapping[str, Any]) -> list[Any]:
    """The banks on one worker, and the table of numbers of GPUs."""
    has_price = any("price" in row for row in record["gpus"])
    table = Table(title=f"Measured on {record['measured_on']}", title_justify="left")
    for name in ("GPUs", "units", "shortest", "longest unit", "time", "busy", "GPU hours", *(["price"] * has_price)):
        table.add_column(name, justify="right")
    for row in record["gpus"]:
        table.add_row(
            str(row["gpus"]),
            str(row["units"]),
            terminal.format_duration(row["shortest_unit_seconds"]),
            terminal.format_duration(row["longest_unit_seconds"]),
            terminal.format_duration(row["seconds"]),
            f"{100 * row['busy']:.0f} %",
            f"{row['gpu_hours']:.2f}",
            *([f"{row['price']:.2f}"] if has_price else []),
        )
    note = f"with {24 * record['failures_per_hour']:.2g} failures per GPU and day; the mean of 20 simulations"
    return [sweep_command.plan_table(record["plan"]), table, note]


def run_slurm(arguments: ClusterSweep, options: SlurmOptions, is_waiting: bool) -> dict[str, Any]:
    """Submit the units that are not finished, running or queued.

    With `is_waiting`, wait for all and return the results.

    Raises UserError if an input, submitit or Slurm cannot be used.
    """
    folder, units = arguments.folder, arguments.make_units(options.parallelism)
    statuses = cluster_status.collect(folder, units, slurm.query(folder))
    not_to_submit = {status.number for status in statuses if status.state in ("finished", "running")}
    not_to_submit |= {status.number for status in statuses if status.state == "waiting" and status.job}
    to_submit = [unit for unit in units if unit.number not in not_to_submit]
    job = slurm.submit(folder, to_submit, options) if to_submit else None
    record = {
        "sweep": str(folder.folder),
        "engine": "slurm",
        "submitted": len(to_submit),
        "units": len(units),
        "job": job,
    }
    if not is_waiting:
        return record | {"logs": str(folder.engine_folder), "next": _next_commands()}
    with WorkersDisplay() as display:
        latest = ""

        def report(jobs: Mapping[int, Job]) -> None:
            nonlocal latest
            counts = {state: sum(job.state == state for job in jobs.values()) for state in ("waiting", "running")}
            line = f"Slurm: {counts['running']} running, {counts['waiting']} waiting of {len(units)} units"
            if line != latest:
                display.print(line)
            latest = line

        slurm.wait(folder, report)
    return record | arguments.summarize() | {"status": _status_records(arguments)}


def run_ray(arguments: ClusterSweep, options: RayOptions) -> dict[str, Any]:
    """Train all units on a Ray cluster, and return the results.

    Raises UserError if an input or ray cannot be used.
    """
    folder = arguments.folder
    ray = ray_engine.connect(options.address)
    workers = max(1, int(ray.cluster_resources().get("GPU", 0) or ray.cluster_resources().get("CPU", 1)))
    units = [unit for unit in arguments.make_units(workers) if not unit.is_finished]
    failures: dict[int, str] = {}
    if units:
        with WorkersDisplay() as display:
            failures = ray_engine.run(folder, units, options, display)
    return {
        "sweep": str(folder.folder),
        "engine": "ray",
        **arguments.summarize(),
        "unit_failures": {f"unit {number}": reason for number, reason in failures.items()},
    }


def render_run(record: Mapping[str, Any]) -> list[Any]:
    """What was submitted and what to type next, or the results."""
    if "results" in record:
        failures = [f"{name}: {reason}" for name, reason in record.get("unit_failures", {}).items()]
        return [*sweep_command.render({**record, "plan": {}}), *failures]
    if not record["submitted"]:
        return [f"nothing to submit: all {record['units']} units are finished, running or waiting", *record["next"]]
    units = terminal.format_count(record["submitted"], "unit")
    return [f"Slurm job {record['job']}: {units} of {record['units']}; logs in {record['logs']}", *record["next"]]


def run_status(arguments: ClusterSweep) -> dict[str, Any]:
    """The state of every unit. Raises UserError if the sweep has no units."""
    return {"sweep": str(arguments.folder.folder), "units": _status_records(arguments)}


def render_status(record: Mapping[str, Any]) -> list[Any]:
    """A table of units, and how many are in each state."""
    table = Table(title=record["sweep"], title_justify="left")
    for name in ("unit", "experiments", "state", "details"):
        table.add_column(name, overflow="fold")
    for unit in record["units"]:
        details = [f"on {unit['host']}" if unit["host"] else "", f"since {unit['since']}" if unit["since"] else ""]
        details += [f"job {unit['job']}" if unit["job"] else "", unit["reason"] or ""]
        finished = (
            f" ({unit['finished']} of {len(unit['experiments'])} finished)" if unit["state"] != "finished" else ""
        )
        table.add_row(
            str(unit["unit"]),
            sweep_command.format_titles(unit["experiments"]),
            unit["state"] + finished,
            ", ".join(detail for detail in details if detail),
        )
    counts = [(state, sum(unit["state"] == state for unit in record["units"])) for state in STATES]
    return [table, ", ".join(f"{count} {state}" for state, count in counts if count)]


def run_cancel(arguments: ClusterSweep, address: str | None) -> dict[str, Any]:
    """Cancel the jobs of the engines that the sweep was given to. Raises UserError if an engine does not answer."""
    folder = arguments.folder
    jobs = folder.read_jobs()
    engines = {job["engine"] for job in jobs}
    if not engines:
        raise UserError(f"{folder.folder}: nothing of this sweep was given to an engine; see --engine slurm or ray")
    canceled = slurm.cancel(folder) if "slurm" in engines else []
    if "ray" in engines:
        latest = [job["id"] for job in jobs if job["engine"] == "ray"][-1]
        target = address or (latest if latest != "local" else None)
        canceled += ray_engine.cancel(folder, target) if target else []
    return {"sweep": str(folder.folder), "canceled": canceled}


def render_cancel(record: Mapping[str, Any]) -> list[Any]:
    """What was canceled."""
    canceled = record["canceled"]
    return [f"canceled: {', '.join(canceled)}" if canceled else "no job of this sweep is waiting or running"]


def _status_records(arguments: ClusterSweep) -> list[dict[str, Any]]:
    folder = arguments.folder
    units = folder.read_units()
    if not units:
        raise UserError(f"{folder.folder}: this sweep has no units; --engine slurm or ray makes them")
    statuses: list[UnitStatus] = cluster_status.collect(folder, units, slurm.query(folder))
    return [status.to_json() for status in statuses]


def _next_commands() -> list[str]:
    command = shlex.join(["blipfit", *(argument for argument in sys.argv[1:] if argument != "--json")])
    return [
        f"state:   {command} --status",
        f"cancel:  {command} --cancel",
        f"results: {command} --wait (the same command also submits what was lost)",
    ]
