"""What a person sees in the terminal: tables on stdout, progress on stderr."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from blipfit import methods
from blipfit.recipe import AdapterConfig


def show(record: Any, as_json: bool, drawn: Callable[[], Any]) -> None:
    """Print the JSON object, or what a person reads; of several processes only the main one speaks."""
    if "accelerate" in sys.modules:
        from blipfit.runtime import distributed

        if not distributed.is_main():
            return
    if as_json:
        value = record if isinstance(record, dict | list) else _plain(record)
        print(json.dumps(value, ensure_ascii=False, default=str))
        return
    shown = drawn()
    for part in shown if isinstance(shown, list | tuple) else (shown,):
        console().print(part, soft_wrap=isinstance(part, str), markup=False)


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as a mapping; its own `asdict` would miscount a Counter."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def console(stderr: bool = False) -> Console:
    """A console that never breaks a line of data when its output is no terminal."""
    made = Console(stderr=stderr, highlight=False, soft_wrap=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=160)


def placement(adapter: AdapterConfig | Mapping[str, Any]) -> str:
    """One phrase for a placement, and for the method where it is not LoRA: `QF full · LLM attn+ffn · DoRA`."""
    values = adapter.model_dump() if isinstance(adapter, AdapterConfig) else adapter
    qformer, llm = values["qformer"], values["llm"]
    parts = []
    if qformer:
        parts.append("QF full" if qformer == "full" else "QF " + "+".join(qformer))
    if llm:
        parts.append("LLM " + "+".join(llm) + _blocks(values.get("llm_layers")))
    if parts and (method := values.get("method", "lora")) != "lora":
        parts.append(methods.title(method))
    return " · ".join(parts) or "always-trained parts only"


def _blocks(layers: Sequence[int] | None) -> str:
    """Which blocks, where not all: ` in blocks 0–7, 24–31`."""
    if layers is None:
        return ""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][-1] + 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    return " in blocks " + ", ".join(str(s[0]) if len(s) == 1 else f"{s[0]}–{s[-1]}" for s in spans)


def percent(metrics: Mapping[str, Any] | None) -> str:
    """`86.4 [84.9–87.8]`, or a dash."""
    if not metrics or metrics.get("accuracy") is None:
        return "–"
    low, high = metrics["interval"]
    return f"{metrics['accuracy']:.1f} [{low:.1f}–{high:.1f}]"


def score(metrics: Mapping[str, Any] | None) -> str:
    """What a split's judgement comes to: accuracy, or ROUGE-L of open answers."""
    if not metrics or metrics.get("method") != "generation":
        return percent(metrics)
    found = metrics["texts"]["rougeL"]
    return f"ROUGE-L {interval(found['mean'], found['interval'], 100)}"


def interval(value: float | None, ends: Sequence[float | None] | None, times: float = 1) -> str:
    """`45.1 [43.0–47.2]`, or a dash."""
    if value is None or ends is None:
        return "–"
    low, high = ("–" if end is None else f"{times * end:.1f}" for end in ends)
    return f"{times * value:.1f} [{low}–{high}]"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def results(records: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """The table at the end: one finished experiment a row."""
    table = Table(title=title or None, title_justify="left")
    for name in ("data set", "id", "placement", "rank"):
        table.add_column(name, justify="right" if name == "rank" else "left")
    for name in ("val score", "test score", "chance", "trained", "share", "best epoch", "time"):
        table.add_column(name, justify="right")
    for record in records:
        adapter, metrics = record["recipe"]["adapter"], record["metrics"]
        has_lora = adapter["llm"] or (adapter["qformer"] and adapter["qformer"] != "full")
        table.add_row(
            record["dataset"],
            record["experiment"],
            placement(adapter),
            str(adapter["rank"]) if has_lora and methods.ranked(adapter.get("method", "lora")) else "–",
            score(metrics.get("val")),
            score(metrics.get("test")),
            f"{metrics['test']['chance']:.1f}" if "chance" in metrics.get("test", {}) else "–",
            f"{record['trained_parameters']:,}",
            f"{100 * record['trained_share']:.2f} %",
            f"{record['best_epoch']} of {record['epochs']}",
            duration(record["seconds"]),
        )
    return table


def breakdown(metrics: Mapping[str, Any], title: str) -> Table:
    """Accuracies by group, as a leaderboard prints them."""
    table = Table(title=title, title_justify="left")
    for name in ("group", "value", "accuracy [95 %]", "questions"):
        table.add_column(name, justify="left" if name in ("group", "value") else "right")
    for group, values in metrics["by"].items():
        for value, found in values.items():
            table.add_row(group, value, percent(found), str(found["questions"]))
    return table


def components(trained: Mapping[str, int], total: Mapping[str, int] | None = None) -> Table:
    """Trained parameters a component, and of how many."""
    table = Table(title="trained parameters", title_justify="left")
    table.add_column("component")
    table.add_column("trained", justify="right")
    if total is not None:
        table.add_column("in the model", justify="right")
    for part in dict.fromkeys([*(total or {}), *trained]):
        row = [part, f"{trained.get(part, 0):,}"]
        table.add_row(*row, *([f"{total.get(part, 0):,}"] if total is not None else []))
    ends = ["sum", f"{sum(trained.values()):,}"]
    table.add_row(*ends, *([f"{sum(total.values()):,}"] if total is not None else []), style="bold")
    return table


def _validated(line: Mapping[str, Any]) -> str:
    """What decided on the epoch: `val accuracy 86.42` or `val loss 0.1234`."""
    if "val_loss" in line:
        return f"val loss {line['val_loss']:.4f}"
    return f"val accuracy {line['val_accuracy']:.2f}"


class TrainingDisplay:
    """Shows training's events: what is trained before it starts, then one live line, then a line an epoch."""

    def __init__(self) -> None:
        self.console = console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.task: Any = None
        self.batch = self.steps = 0
        self.since, self.done = time.monotonic(), 0
        self.place = ""

    def __call__(self, event: str, facts: dict[str, Any]) -> None:
        getattr(self, f"_{event}")(facts)

    def _skipped(self, facts: dict[str, Any]) -> None:
        self._say(f"{facts['recipe'].title}: finished already, skipped ({facts['run'].folder})")

    def close(self) -> None:
        """Give the terminal back, whatever happened."""
        self.progress.stop()

    def _building(self, facts: dict[str, Any]) -> None:
        if "sentence" in facts:
            self._say(facts["sentence"])
        elif self.console.is_terminal:
            self.console.print(f"  {facts['done']} seen", end="\r")

    def _planning(self, facts: dict[str, Any]) -> None:
        self._say(f"trial steps for {facts['experiments']} experiments: {facts['group']} …")

    def _bank(self, facts: dict[str, Any]) -> None:
        self.place = f"bank {facts['number']} of {facts['of']}, "
        self._say(f"bank {facts['number']} of {facts['of']}: {len(facts['recipes'])} experiments")

    def _start(self, facts: dict[str, Any]) -> None:
        recipes, counts = facts["recipes"], facts["counts"]
        first = recipes[0]
        self._say(f"{first.data.name}: " + " / ".join(f"{n} {split}" for split, n in counts.items()) + " questions")
        self._say(f"prompt {first.data.prompt}, judged by {first.evaluation.method}; one in full:")
        self._say(f"  {facts['prompt']!r} → {facts['target']!r}")
        for recipe, trained, changed in zip(recipes, facts["trained"], facts["differs"], strict=True):
            parts = ", ".join(f"{part} {number:,}" for part, number in trained.items())
            rank = f", rank {recipe.adapter.rank}" if methods.ranked(recipe.adapter.method) else ""
            self._say(f"{recipe.title} on {recipe.model.name} ({placement(recipe.adapter)}{rank})")
            self._say(f"  trains {sum(trained.values()):,} parameters: {parts}")
            if changed:
                told = ", ".join(f"{path} {old!r} → {new!r}" for path, (old, new) in changed.items())
                self._say(f"  differs from the grid's recipe: {told}")
        self.batch = first.training.batch_size * first.training.accumulation
        self.steps = facts["steps"]
        epochs = max(recipe.training.max_epochs for recipe in recipes)
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task("training", total=epochs * self.steps, facts="")
        self.progress.update(self.task, completed=facts["epoch"] * self.steps)
        self.since, self.done = time.monotonic(), facts["epoch"] * self.steps + facts["step"]
        if self.console.is_terminal:
            self.progress.start()

    def _step(self, facts: dict[str, Any]) -> None:
        completed = facts["epoch"] * self.steps + facts["step"]
        losses = facts["losses"]
        rate = (completed - self.done) * self.batch * len(losses) / (time.monotonic() - self.since)
        loss = sum(losses) / len(losses)
        self.progress.update(
            self.task,
            completed=completed,
            description=f"{self.place}epoch {facts['epoch'] + 1}",
            facts=f"loss {loss:.3f} · {rate:.0f} samples/s" + (f" · {len(losses)} experiments" * (len(losses) > 1)),
        )

    def _epoch(self, facts: dict[str, Any]) -> None:
        for experiment, line in zip(facts["experiments"], facts["lines"], strict=True):
            end = "  (done)" if experiment in facts["leaving"] else ""
            self._say(f"epoch {line['epoch']:>2}  {experiment:>8}  loss {line['loss']:.4f}  {_validated(line)}{end}")

    def _finished(self, facts: dict[str, Any]) -> None:
        self.progress.stop()
        self._say(f"{facts['recipe'].title}: test {score(facts['result']['metrics']['test'])}")

    def _failed(self, facts: dict[str, Any]) -> None:
        self._say(f"{facts['recipe'].title}: {facts['reason']}")

    def _say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)
