"""What training, sweeps and feature builds report while they run: one dataclass per event, one listener type."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipfit.recipe import Recipe
from blipfit.run_folder import Run


@dataclass(frozen=True, slots=True)
class FeaturesBuilding:
    """Image features are being computed: a sentence on how much that is, or how many images are done."""

    message: str | None = None
    images: int = 0


@dataclass(frozen=True, slots=True)
class TrialStarted:
    """A sweep measures trial steps for a group of experiments that can share a bank."""

    group: str
    experiments: int


@dataclass(frozen=True, slots=True)
class BankStarted:
    """A sweep starts one of its banks; `number` counts from 1."""

    number: int
    banks: int
    recipes: Sequence[Recipe]


@dataclass(frozen=True, slots=True)
class TrainingStarted:
    """A bank starts or continues training; sequences have one entry per experiment."""

    recipes: Sequence[Recipe]
    runs: Sequence[Run]
    steps_per_epoch: int
    epoch: int
    """Current epoch, from 0."""
    step: int
    """Steps of it that are done."""
    prompt: str
    """Of the first training question, in full."""
    target: str
    question_counts: Mapping[str, int]
    """By split."""
    trained_parameters: Sequence[Mapping[str, int]]
    """By component."""
    differences_from_grid: Sequence[Mapping[str, Any] | None]
    device: str
    notes: Sequence[str] = ()
    """Sentences on texts that are cut and questions without a clear answer."""


@dataclass(frozen=True, slots=True)
class StepsDone:
    """Losses were read from the device; they are means over the epoch so far, one per experiment."""

    epoch: int
    step: int
    losses: Sequence[float]


@dataclass(frozen=True, slots=True)
class EpochResult:
    """One experiment's line in `log.jsonl`."""

    experiment: str
    log_line: dict[str, Any]
    is_last: bool


@dataclass(frozen=True, slots=True)
class EpochDone:
    """All experiments of a bank were validated; `epoch` counts finished epochs."""

    epoch: int
    results: Sequence[EpochResult]


@dataclass(frozen=True, slots=True)
class RunSkipped:
    """The run folder holds a finished result already."""

    run: Run
    recipe: Recipe
    warning: str | None = None
    """A sentence if its adapter is missing, damaged or exchanged."""


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The result is written."""

    run: Run
    recipe: Recipe
    result: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunFailed:
    """The experiment had to stop; `failure.json` holds the reason."""

    run: Run
    recipe: Recipe
    reason: str


@dataclass(frozen=True, slots=True)
class CheckpointDamaged:
    """A checkpoint file is not what was written; all experiments of its bank continue from the save before."""

    file: Path
    used_file: Path | None
    """The older checkpoint that is used instead; None if training starts from the beginning."""


Event = (
    FeaturesBuilding
    | CheckpointDamaged
    | TrialStarted
    | BankStarted
    | TrainingStarted
    | StepsDone
    | EpochDone
    | RunSkipped
    | RunFinished
    | RunFailed
)
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A listener that does nothing."""
