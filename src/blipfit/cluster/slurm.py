"""Slurm through submitit: a job array with one unit per task, which saves and is queued again before its time ends.

submitit's own watcher needs Slurm's accounting; what became of a job is asked from `squeue` instead, and results are
read from the run folders.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipfit.cluster.extras import load_engine
from blipfit.cluster.status import Job
from blipfit.cluster.units import SweepFolder, Unit, train_unit
from blipfit.errors import Interrupted, UserError
from blipfit.report.progress import TrainingDisplay
from blipfit.runtime import interruption

SIGNAL = "USR1"
"""Sent before the time limit; blipfit saves and stops on it (`runtime/interruption.py`)."""
SIGNAL_SECONDS = 120
"""Time between the signal and the limit."""
MAX_REQUEUES = 1000
WAITING = frozenset(["PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "CONFIGURING", "SUSPENDED", "PREEMPTED"])
RUNNING = frozenset(["RUNNING", "COMPLETING", "STAGE_OUT", "RESIZING", "SIGNALING"])


@dataclass(frozen=True, slots=True)
class SlurmOptions:
    """What each task of the job array asks for."""

    partition: str | None = None
    gres: str | None = None
    time: str = "24:00:00"
    """MM, HH:MM:SS or D-HH:MM:SS, as sbatch reads it."""
    cpus: int | None = None
    memory: str | None = None
    container: str | None = None
    parallelism: int | None = None
    """Tasks that run at the same time; None: no limit."""

    @property
    def minutes(self) -> int:
        """The time limit in minutes. Raises UserError if it cannot be read."""
        match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", self.time.strip())
        if match is None:
            raise UserError(f"--time {self.time:.40}: expected minutes (90), HH:MM:SS or D-HH:MM:SS")
        days, first, second, third = (int(part or 0) for part in match.groups())
        if match[1] is not None or match[4] is not None:  # D-HH[:MM[:SS]] or HH:MM:SS
            total = days * 1440 + first * 60 + second + (third > 0)
        else:  # MM or MM:SS
            total = first + (second > 0)
        if total < 1:
            raise UserError(f"--time {self.time:.40}: a task needs at least one minute")
        return total


class UnitTask:
    """One task of the array: trains a unit; submitit pickles it, runs it, and calls `checkpoint` to queue it again."""

    def __call__(self, file: Path) -> None:
        requeue = signal.getsignal(signal.SIGUSR1)  # submitit's handler, which queues the job again
        interruption.install()
        try:
            with TrainingDisplay() as display:
                train_unit(file, listener=display)
        except Interrupted as interrupted:
            if interrupted.number == signal.SIGUSR1 and callable(requeue):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends it to a job that is queued again
                requeue(signal.SIGUSR1, None)  # everything is saved; it does not return
            raise SystemExit(interrupted.exit_code) from None  # preempted (Slurm queues it again) or canceled
        except UserError as error:
            print(f"blipfit: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    def checkpoint(self, file: Path) -> Any:
        """The same task again; it continues from the checkpoints of the run folders."""
        return load_engine("submitit").helpers.DelayedSubmission(self, file)


def submit(folder: SweepFolder, units: Sequence[Unit], options: SlurmOptions) -> str:
    """Submit a job array with one task per unit, and record it in the sweep's folder; returns the id of the array.

    Raises UserError if submitit or Slurm is not installed, or if Slurm refuses the job.
    """
    submitit = load_engine("submitit")
    _require_slurm()
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = SIGNAL
    submitit.core.job_environment.JobEnvironment.USR_SIG = SIGNAL  # it was read when submitit was imported
    executor = submitit.SlurmExecutor(
        folder.engine_folder, max_num_timeout=MAX_REQUEUES, python=_python(options.container, folder, units)
    )
    executor.update_parameters(**_parameters(folder, units, options))
    try:
        jobs = executor.map_array(UnitTask(), [folder.unit_file(unit.number) for unit in units])
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"Slurm refused the job: {_last_line(error)}; `sinfo` lists partitions and GPUs") from None
    ids = [str(job.job_id) for job in jobs]
    folder.add_jobs([{"engine": "slurm", "id": id_, "unit": unit.number} for id_, unit in zip(ids, units, strict=True)])
    return ids[0].partition("_")[0]


def _parameters(folder: SweepFolder, units: Sequence[Unit], options: SlurmOptions) -> dict[str, Any]:
    """The executor's parameters."""
    parameters: dict[str, Any] = {
        "job_name": f"blipfit-{folder.name}",
        "time": options.minutes,
        "signal_delay_s": min(SIGNAL_SECONDS, 30 * options.minutes),
        "array_parallelism": options.parallelism or len(units),
        "partition": options.partition,
        "gres": options.gres,
        "cpus_per_task": options.cpus,
        "mem": options.memory,
        "setup": [f"export SUBMITIT_PREEMPT_SIGNAL={SIGNAL}"],
        "additional_parameters": {"requeue": True, "open_mode": "append"},
    }
    if options.container is not None and not options.container.endswith(".sif"):
        folders = ",".join(f"{path}:{path}" for path in _mounted_folders(folder, units))
        parameters["srun_args"] = [f"--container-image={options.container}", f"--container-mounts={folders}"]
    return {name: value for name, value in parameters.items() if value is not None}


def _python(container: str | None, folder: SweepFolder, units: Sequence[Unit]) -> str:
    """The command that starts Python in a task: this one, the image's, or that of an Apptainer image."""
    if container is None:
        return shlex.quote(sys.executable)
    if not container.endswith(".sif"):
        return "python3"
    mounts = ",".join(map(str, _mounted_folders(folder, units)))
    return f"apptainer exec --nv --bind {shlex.quote(mounts)} {shlex.quote(container)} python3"


def _mounted_folders(folder: SweepFolder, units: Sequence[Unit]) -> list[Path]:
    folders = [unit.results for unit in units] + [unit.data for unit in units] + [folder.folder]
    return list(dict.fromkeys(folders))


def query(folder: SweepFolder) -> dict[int, Job]:
    """What Slurm says of the latest job of each unit; nothing if it does not answer."""
    ids = {job["unit"]: job["id"] for job in folder.read_jobs() if job["engine"] == "slurm"}
    if not ids or shutil.which("squeue") is None:
        return {}
    arrays = ",".join(sorted({id_.partition("_")[0] for id_ in ids.values()}))
    command = ["squeue", "--noheader", "--array", "--states=all", "--jobs", arrays, "--format=%i|%T|%r|%N"]
    ended = subprocess.run(command, capture_output=True, text=True)
    lines = {line.split("|")[0]: line.split("|")[1:] for line in ended.stdout.splitlines() if line.count("|") == 3}
    return {unit: _read_job(id_, *lines[id_]) for unit, id_ in ids.items() if id_ in lines}


def _read_job(id_: str, state: str, reason: str, host: str) -> Job:
    if state in RUNNING:
        return Job(id_, "running", host)
    if state in WAITING:
        return Job(id_, "waiting", reason="" if reason == "None" else reason)
    if state == "COMPLETED":
        return Job(id_, "ended", host)
    return Job(id_, "failed", host, f"Slurm: job {id_} {state.lower().replace('_', ' ')}")


def cancel(folder: SweepFolder) -> list[str]:
    """Cancel all jobs of the sweep that wait or run; returns their ids. Raises UserError if Slurm does not answer."""
    _require_slurm()
    ids = [job.id for job in query(folder).values() if job.state in ("waiting", "running")]
    if ids:
        ended = subprocess.run(["scancel", *ids], capture_output=True, text=True)
        if ended.returncode != 0:
            raise UserError(f"Slurm did not cancel the jobs: {ended.stderr.strip()[-200:]}")
    return ids


def wait(folder: SweepFolder, report: Callable[[Mapping[int, Job]], None], seconds: float = 5.0) -> None:
    """Wait until no unit waits or runs in Slurm; `report` is called at every look."""
    while True:
        jobs = query(folder)
        report(jobs)
        if not any(job.state in ("waiting", "running") for job in jobs.values()):
            return
        time.sleep(seconds)


def _require_slurm() -> None:
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not installed here; start the sweep on a machine where Slurm accepts jobs")


def _last_line(error: Exception) -> str:
    return next((line for line in reversed(str(error).splitlines()) if "error" in line), str(error))[-200:].strip()
