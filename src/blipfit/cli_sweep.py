"""The commands `sweep` and `unit`, and the options of engines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from blipfit.commands import options
from blipfit.errors import UserError
from blipfit.runtime import launcher

ENGINES = ("local", "slurm", "ray")
CLUSTER = "On many machines"

Engine = Annotated[str, typer.Option(help="local, slurm or ray.", rich_help_panel=CLUSTER)]
Partition = Annotated[str | None, typer.Option(help="slurm: partition.", rich_help_panel=CLUSTER)]
Gres = Annotated[str | None, typer.Option(help="slurm: resources of a unit, such as gpu:1.", rich_help_panel=CLUSTER)]
TimeLimit = Annotated[
    str,
    typer.Option("--time", help="slurm: time limit of a unit; it saves before that.", rich_help_panel=CLUSTER),
]
Container = Annotated[
    str | None, typer.Option(help="slurm: image of pyxis, or a .sif file of Apptainer.", rich_help_panel=CLUSTER)
]
Parallelism = Annotated[
    int | None,
    typer.Option("--array-parallelism", min=1, help="slurm: units that run at once.", rich_help_panel=CLUSTER),
]
Wait = Annotated[bool, typer.Option("--wait", metavar="", help="slurm: wait for all units.", rich_help_panel=CLUSTER)]
Address = Annotated[
    str | None, typer.Option(help="ray: auto or HOST:PORT. Default: start Ray here.", rich_help_panel=CLUSTER)
]
GpusPerUnit = Annotated[
    float | None, typer.Option(min=0, help="ray: GPUs of a unit. Default: 1 if there are any.", rich_help_panel=CLUSTER)
]
CpusPerUnit = Annotated[
    int | None, typer.Option(min=1, help="CPUs of a unit. Default: ray 1, slurm its own.", rich_help_panel=CLUSTER)
]
MemoryPerUnit = Annotated[str | None, typer.Option(help="Memory of a unit, for example 48G.", rich_help_panel=CLUSTER)]
Status = Annotated[
    bool, typer.Option("--status", metavar="", help="Show the state of all units.", rich_help_panel=CLUSTER)
]
Cancel = Annotated[
    bool, typer.Option("--cancel", metavar="", help="Cancel the engine's jobs.", rich_help_panel=CLUSTER)
]
Gpus = Annotated[str | None, typer.Option(help="With --plan: numbers of GPUs: 1,8,64.", rich_help_panel=CLUSTER)]
Price = Annotated[
    float | None,
    typer.Option("--price-per-hour", min=0, help="With --gpus: price of one GPU.", rich_help_panel=CLUSTER),
]
FailuresPerDay = Annotated[
    float, typer.Option(min=0, help="With --gpus: failures of one GPU.", rich_help_panel=CLUSTER)
]


def sweep(
    datasets: Annotated[str, typer.Argument(metavar="DATASET", help="One data set or several: scienceqa,iconqa.")],
    ids: Annotated[
        list[str], typer.Argument(metavar="IDS", help="1-32, 13,15,28, all or names such as baseline; or recipe files.")
    ],
    model: options.Model = None,
    data: Annotated[Path | None, typer.Option("--data", help="Data folder (one data set); else data/DATASET.")] = None,
    results: options.Results = Path("results"),
    sets: options.Sets = None,
    bank: options.SweepBank = None,
    plan: Annotated[bool, typer.Option("--plan", metavar="", help="Only print the plan.")] = False,
    save_every: options.SaveEvery = None,
    processes: options.Processes = None,
    device: options.Device = None,
    engine: Engine = "local",
    partition: Partition = None,
    gres: Gres = None,
    time: TimeLimit = "24:00:00",
    container: Container = None,
    array_parallelism: Parallelism = None,
    wait: Wait = False,
    address: Address = None,
    gpus_per_unit: GpusPerUnit = None,
    cpus_per_unit: CpusPerUnit = None,
    memory_per_unit: MemoryPerUnit = None,
    status: Status = False,
    cancel: Cancel = False,
    gpus: Gpus = None,
    price_per_hour: Price = None,
    failures_per_day: FailuresPerDay = 1.0,
    as_json: options.Json = False,
) -> None:
    """Train many experiments, several at a time in one frozen model (a bank). Finds the fastest bank size first."""
    from blipfit.commands import resolve_arguments

    _check_engine(engine, processes)
    counts = _parse_counts(gpus, plan)
    recipes, folders = resolve_arguments.load_sweep(datasets, ids, model, sets or [], data)
    arguments = recipes, folders, results, bank, device, save_every
    if status or cancel:
        _inspect(arguments, cancel, address, as_json)
    elif counts:
        _plan_cluster(arguments, counts, failures_per_day / 24, price_per_hour, as_json)
    elif engine == "slurm":
        limits = partition, gres, time, cpus_per_unit, memory_per_unit, container, array_parallelism
        _start_slurm(arguments, limits, wait, as_json)
    elif engine == "ray":
        _start_ray(arguments, (address, gpus_per_unit, cpus_per_unit, memory_per_unit), as_json)
    else:
        _sweep_here(arguments, plan, processes, as_json)


def unit(
    file: Annotated[Path, typer.Argument(help="A unit's file: RESULTS/.sweep/NAME/units/NUMBER.json.")],
    as_json: options.Json = False,
) -> None:
    """Train one unit of a sweep; `sweep --engine` writes the files."""
    from blipfit.commands import unit as command

    _print(command.run(file), as_json, command.render)


def _sweep_here(arguments: Any, plan: bool, processes: int | None, as_json: bool) -> None:
    launcher.launch(processes)
    from blipfit.commands import sweep as command

    recipes, folders, results, bank, device, save_every = arguments
    record = command.run(recipes, folders, results, bank, plan, _device(device), save_every)
    _print(record, as_json, command.render)


def _inspect(arguments: Any, cancel: bool, address: str | None, as_json: bool) -> None:
    from blipfit.commands import cluster as command

    own_sweep = command.ClusterSweep(*arguments)
    if cancel:
        _print(command.run_cancel(own_sweep, address), as_json, command.render_cancel)
    else:
        _print(command.run_status(own_sweep), as_json, command.render_status)


def _plan_cluster(
    arguments: Any, gpus: Sequence[int], failures_per_hour: float, price: float | None, as_json: bool
) -> None:
    from blipfit.commands import cluster as command

    own_sweep, failures = command.ClusterSweep(*arguments), command.Failures(failures_per_hour)
    record = command.run_plan(own_sweep, gpus, failures, price, _device(own_sweep.device))
    _print(record, as_json, command.render_plan)


def _start_slurm(arguments: Any, limits: Any, wait: bool, as_json: bool) -> None:
    from blipfit.commands import cluster as command

    record = command.run_slurm(command.ClusterSweep(*arguments), command.SlurmOptions(*limits), wait)
    _print(record, as_json, command.render_run)


def _start_ray(arguments: Any, requests: Any, as_json: bool) -> None:
    from blipfit.commands import cluster as command

    record = command.run_ray(command.ClusterSweep(*arguments), command.RayOptions(*requests))
    _print(record, as_json, command.render_run)


def _check_engine(engine: str, processes: int | None) -> None:
    if engine not in ENGINES:
        raise UserError(f"--engine {engine:.40}: expected {', '.join(ENGINES)}")
    if engine != "local" and processes is not None:
        raise UserError(f"--processes and --engine {engine} exclude each other; a unit is one process")


def _parse_counts(gpus: str | None, plan: bool) -> list[int]:
    """The numbers of `--gpus`. Raises UserError if they are not positive, or if `--plan` is missing."""
    if gpus is None:
        return []
    counts = [int(part) for part in gpus.split(",") if part.strip().isdecimal()]
    if len(counts) != len(gpus.split(",")) or not all(0 < count <= 100_000 for count in counts):
        raise UserError(f"--gpus {gpus:.40}: expected positive numbers, for example 1,8,64")
    if not plan:
        raise UserError("--gpus belongs to a plan; add --plan")
    return counts


def _device(name: str | None) -> Any:
    from blipfit.runtime import distributed

    return distributed.select_device(name)


def _print(record: Any, as_json: bool, render: Any) -> None:
    from blipfit.report import terminal

    terminal.print_record(record, as_json, render)
    if record.get("failed"):
        raise typer.Exit(1)
