"""Training's events as a person sees them on stderr: what is trained, one live line, one line per epoch."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from blipfit import methods
from blipfit.report import terminal
from blipfit.training import events
from blipfit.training.events import Event


def live_progress(console: Console, *more_columns: ProgressColumn) -> Progress:
    """Create live lines, erased when they stop: description, bar, count, the field `facts`, then `more_columns`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        *more_columns,
        console=console,
        transient=True,
    )


def stop_progress(progress: Progress) -> None:
    """Erase the live lines, if there are any; stopping idle ones would print an empty line."""
    if progress.live.is_started:
        progress.stop()


class TrainingDisplay:
    """A listener for training and sweeps; use it as a context manager, so that the terminal is given back."""

    def __init__(self) -> None:
        self.console = terminal.console(stderr=True)
        self.progress = live_progress(self.console, TimeRemainingColumn())
        self.task: Any = None
        self.batch_size = self.steps = 0
        self.started_at, self.first_step = time.monotonic(), 0
        self.bank_label = ""

    def __enter__(self) -> "TrainingDisplay":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stop_progress(self.progress)

    def __call__(self, event: Event) -> None:
        match event:
            case events.FeaturesBuilding(message=str() as message):
                self._print(message)
            case events.FeaturesBuilding(images=images):
                if self.console.is_terminal:
                    self.console.print(f"  {images} images", end="\r")
            case events.TrialStarted(group=group, experiments=experiments):
                self._print(f"trial steps for {terminal.format_count(experiments, 'experiment')}: {group} …")
            case events.BankStarted(number=number, banks=banks, recipes=recipes):
                self.bank_label = f"bank {number} of {banks}, "
                self._print(f"bank {number} of {banks}: {terminal.format_count(len(recipes), 'experiment')}")
            case events.TrainingStarted():
                self._start(event)
            case events.StepsDone():
                self._show_steps(event)
            case events.EpochDone(results=results):
                for result in results:
                    self._print_epoch(result)
            case events.CheckpointDamaged(file=file, used_file=used_file):
                older = f"continues from {used_file.name}" if used_file else "starts from the beginning"
                self._print(f"{file} is damaged; its bank {older}, which was saved before")
            case events.RunSkipped(run=run, recipe=recipe, warning=warning):
                self._print(f"{recipe.title}: finished already, skipped ({run.folder})")
                if warning is not None:
                    self._print(f"warning: {warning}")
            case events.RunFinished(recipe=recipe, result=result):
                stop_progress(self.progress)
                self._print(f"{recipe.title}: test {terminal.format_score(result['metrics']['test'])}")
            case events.RunFailed(recipe=recipe, reason=reason):
                self._print(f"{recipe.title}: {reason}")

    def _start(self, event: events.TrainingStarted) -> None:
        recipes = event.recipes
        first = recipes[0]
        counts = " / ".join(f"{count} {split}" for split, count in event.question_counts.items())
        self._print(f"{first.data.name}: {counts} questions")
        self._print(f"prompt {first.data.prompt}, evaluated by {first.evaluation.method}; one in full:")
        self._print(f"  {event.prompt!r} → {event.target!r}")
        for note in event.notes:
            self._print(f"note: {note}")
        for recipe, trained, differences in zip(
            recipes, event.trained_parameters, event.differences_from_grid, strict=True
        ):
            parts = ", ".join(f"{part} {number:,}" for part, number in trained.items())
            has_rank = recipe.adapter.has_lora and methods.has_rank(recipe.adapter.method)
            rank = f", rank {recipe.adapter.rank}" if has_rank else ""
            placement = terminal.format_placement(recipe.adapter)
            self._print(f"{recipe.title} on {recipe.model.name} ({placement}{rank})")
            self._print(f"  trains {sum(trained.values()):,} parameters: {parts}")
            if differences:
                changes = ", ".join(f"{path} {before!r} → {after!r}" for path, (before, after) in differences.items())
                self._print(f"  differs from the grid's recipe: {changes}")
        self.batch_size = first.training.batch_size * first.training.accumulation
        self.steps = event.steps_per_epoch
        epochs = max(recipe.training.max_epochs for recipe in recipes)
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task("training", total=epochs * self.steps, facts="")
        self.progress.update(self.task, completed=event.epoch * self.steps)
        self.started_at, self.first_step = time.monotonic(), event.epoch * self.steps + event.step
        if self.console.is_terminal:
            self.progress.start()

    def _show_steps(self, event: events.StepsDone) -> None:
        completed = event.epoch * self.steps + event.step
        experiments = len(event.losses)
        seconds = time.monotonic() - self.started_at
        rate = (completed - self.first_step) * self.batch_size * experiments / seconds
        loss = sum(event.losses) / experiments
        self.progress.update(
            self.task,
            completed=completed,
            description=f"{self.bank_label}epoch {event.epoch + 1}",
            facts=f"loss {loss:.3f} · {rate:.0f} samples/s" + (f" · {experiments} experiments" * (experiments > 1)),
        )

    def _print_epoch(self, result: events.EpochResult) -> None:
        line = result.log_line
        end = "  (done)" if result.is_last else ""
        validation = _format_validation(line)
        self._print(f"epoch {line['epoch']:>2}  {result.experiment:>8}  loss {line['loss']:.4f}  {validation}{end}")

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)


def _format_validation(line: dict[str, Any]) -> str:
    """The value that decides on the best epoch: `val accuracy 86.42` or `val loss 0.1234`."""
    if "val_loss" in line:
        return f"val loss {line['val_loss']:.4f}"
    return f"val accuracy {line['val_accuracy']:.2f}"
