"""Ray: one actor per GPU trains one unit after the other, and keeps its model loaded between them.

The driver hands out units; an actor that is free gets one of its latest base model if there is one. A killed actor is
started again by Ray, and its unit continues from its checkpoints. Events of the actors come back through a queue.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipfit.cluster.extras import load_engine
from blipfit.cluster.units import SweepFolder, Unit, train_unit
from blipfit.errors import UserError
from blipfit.training.events import Event
from blipfit.training.model_cache import ModelCache

NAMESPACE = "blipfit"
MAX_RETRIES = 3
"""Times that Ray starts a killed actor, and its unit, again; the same command again starts with as many."""
POLL_SECONDS = 0.5

WorkerListener = Callable[[str, Event], None]
"""Receives the name of a worker (host and number) and an event of its unit."""


@dataclass(frozen=True, slots=True)
class RayOptions:
    """Where Ray runs, and what each unit asks for."""

    address: str | None = None
    """Of a running cluster; None starts Ray on this machine."""
    gpus: float | None = None
    """GPUs per unit; None: 1 if the cluster has GPUs, else 0."""
    cpus: float | None = None
    """CPUs per unit; None: 1."""
    memory: str | None = None
    """Memory per unit, for example 48G."""

    @property
    def memory_bytes(self) -> int | None:
        """The memory in bytes. Raises UserError if it cannot be read."""
        if self.memory is None:
            return None
        number, unit = self.memory[:-1], self.memory[-1:].upper()
        if unit not in "MGT" or not number.isdigit():
            raise UserError(f"--memory {self.memory:.20}: expected a number with M, G or T, for example 48G")
        return int(number) * 2 ** {"M": 20, "G": 30, "T": 40}[unit]


class UnitWorker:
    """The actor: trains units, and keeps the latest model."""

    def __init__(self, name: str, queue: Any):
        self.name, self.queue = name, queue
        self.model_cache: ModelCache | None = None

    def train(self, file: str, device: str | None) -> str | None:
        """Train a unit; returns the sentence of a mistake of the user, or None."""
        self.model_cache = self.model_cache or ModelCache(device)
        try:
            train_unit(Path(file), self.model_cache, lambda event: self.queue.put((self.name, event)))
        except UserError as error:
            return str(error)
        return None


def run(folder: SweepFolder, units: Sequence[Unit], options: RayOptions, listener: WorkerListener) -> dict[int, str]:
    """Train all units on a Ray cluster; returns the reasons of those that failed, by number of the unit.

    Raises UserError if ray is not installed, or if the cluster cannot be reached or has no place for a unit.
    """
    ray = connect(options.address)
    resources = _request(ray, options)
    count = min(len(units), _capacity(ray, resources))
    from ray.util.queue import Queue  # type: ignore[import-not-found]

    queue = Queue(actor_options={"num_cpus": 0})
    actor = ray.remote(**resources, max_restarts=MAX_RETRIES, max_task_retries=MAX_RETRIES)(UnitWorker)
    workers = [_Worker(f"{folder.name}-{index}") for index in range(count)]
    for worker in workers:
        worker.handle = actor.options(name=worker.name, namespace=NAMESPACE).remote(worker.name, queue)
    folder.add_jobs([{"engine": "ray", "id": options.address or "local", "unit": unit.number} for unit in units])
    try:
        return _distribute(ray, folder, list(units), workers, queue, listener)
    finally:
        for worker in workers:
            ray.kill(worker.handle)
        queue.shutdown()


@dataclass(slots=True)
class _Worker:
    name: str
    handle: Any = None
    unit: Unit | None = None
    """What it trains now."""
    model: Any = None
    """The base model of its latest unit."""


def _distribute(
    ray: Any, folder: SweepFolder, waiting: list[Unit], workers: Sequence[_Worker], queue: Any, listener: WorkerListener
) -> dict[int, str]:
    failures: dict[int, str] = {}
    running: dict[Any, _Worker] = {}
    free = list(workers)
    while waiting or running:
        while free and waiting:
            worker = free.pop(0)
            unit = next((unit for unit in waiting if unit.recipes[0].model == worker.model), waiting[0])
            waiting.remove(unit)
            worker.unit, worker.model = unit, unit.recipes[0].model
            running[worker.handle.train.remote(str(folder.unit_file(unit.number)), unit.device)] = worker
        ended, _ = ray.wait(list(running), timeout=POLL_SECONDS)
        _forward(queue, listener)
        for reference in ended:
            worker = running.pop(reference)
            assert worker.unit is not None
            reason = _outcome(ray, reference)
            if reason is not None:
                failures[worker.unit.number] = reason
            free.append(worker)
    _forward(queue, listener)
    return failures


def _outcome(ray: Any, reference: Any) -> str | None:
    """Why a unit failed, or None."""
    try:
        result = ray.get(reference)
    except ray.exceptions.RayActorError:
        return f"its worker was killed more than {MAX_RETRIES} times or canceled; the same command again continues it"
    except ray.exceptions.RayTaskError as error:
        return str(error).strip().splitlines()[-1]
    return None if result is None else str(result)


def _forward(queue: Any, listener: WorkerListener) -> None:
    """Hand the workers' events to the listener."""
    size = queue.size()
    for worker, event in queue.get_nowait_batch(size) if size else []:
        listener(worker, event)


def connect(address: str | None) -> Any:
    """Connect to a running cluster, or start Ray on this machine; returns the module.

    Raises UserError if ray is not installed or the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = load_engine("ray")
    if not ray.is_initialized():
        try:
            ray.init(
                address=address or "local",  # None would look for a cluster that runs here already
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if address else {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}),
            )
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise UserError(
                f"--address {address}: no Ray cluster accepts this driver ({str(error).splitlines()[0]:.120}); start "
                "one with `ray start --head`, set RAY_AUTH_TOKEN if it has a token, or omit --address"
            ) from None
    return ray


def _request(ray: Any, options: RayOptions) -> dict[str, Any]:
    """Resources of one actor."""
    gpus = options.gpus if options.gpus is not None else min(1.0, ray.cluster_resources().get("GPU", 0.0))
    request: dict[str, Any] = {"num_gpus": gpus, "num_cpus": 1.0 if options.cpus is None else options.cpus}
    return request | ({} if options.memory_bytes is None else {"memory": options.memory_bytes})


def _capacity(ray: Any, request: dict[str, Any]) -> int:
    """How many actors the cluster holds, at least 1: an autoscaling cluster may start with nothing."""
    total = ray.cluster_resources()
    names = {"GPU": request["num_gpus"], "CPU": request["num_cpus"], "memory": request.get("memory", 0)}
    return max(1, min((int(total.get(name, 0) // amount) for name, amount in names.items() if amount), default=1))


def cancel(folder: SweepFolder, address: str) -> list[str]:
    """Kill the sweep's workers on a cluster; returns their names."""
    ray = connect(address)
    names = _list_workers(folder)
    for name in names:
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
    return names


def _list_workers(folder: SweepFolder) -> list[str]:
    from ray.util import list_named_actors  # type: ignore[import-not-found]

    named = list_named_actors(all_namespaces=True)
    return sorted(a["name"] for a in named if a["namespace"] == NAMESPACE and a["name"].startswith(f"{folder.name}-"))
