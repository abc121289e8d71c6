"""Events of several workers in one terminal: a live line per worker, and a line per finished experiment."""

from types import TracebackType
from typing import Any

from blipfit.report import terminal
from blipfit.report.progress import live_progress, stop_progress
from blipfit.training import events
from blipfit.training.events import Event


class WorkersDisplay:
    """A listener for events with the name of their worker; use it as a context manager."""

    def __init__(self) -> None:
        self.console = terminal.console(stderr=True)
        self.progress = live_progress(self.console)
        self.tasks: dict[str, Any] = {}
        self.steps: dict[str, int] = {}
        """Steps per epoch of the unit that a worker trains."""

    def __enter__(self) -> "WorkersDisplay":
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stop_progress(self.progress)

    def __call__(self, worker: str, event: Event) -> None:
        match event:
            case events.TrainingStarted(recipes=recipes):
                self._start(worker, event)
                titles = ", ".join(recipe.title for recipe in recipes)
                self.print(f"{worker}: {titles} on {event.device}, from epoch {event.epoch + 1}, step {event.step}")
            case events.StepsDone(losses=losses) if worker in self.tasks:
                completed = event.epoch * self.steps[worker] + event.step
                loss = sum(losses) / len(losses)
                self.progress.update(self.tasks[worker], completed=completed, facts=f"loss {loss:.3f}")
            case events.RunFinished(recipe=recipe, result=result):
                self.print(f"{worker}: {recipe.title}: test {terminal.format_score(result['metrics']['test'])}")
            case events.RunFailed(recipe=recipe, reason=reason):
                self.print(f"{worker}: {recipe.title}: {reason}")
            case events.RunSkipped(recipe=recipe):
                self.print(f"{worker}: {recipe.title}: finished already, skipped")

    def print(self, text: str) -> None:
        """Print a line above the live ones."""
        self.console.print(text, soft_wrap=True, markup=False)

    def _start(self, worker: str, event: events.TrainingStarted) -> None:
        self.steps[worker] = event.steps_per_epoch
        total = max(recipe.training.max_epochs for recipe in event.recipes) * event.steps_per_epoch
        if worker not in self.tasks:
            self.tasks[worker] = self.progress.add_task(worker, total=total, facts="")
        self.progress.update(
            self.tasks[worker], total=total, completed=event.epoch * event.steps_per_epoch + event.step
        )
