"""The report's figures from the experiments: accuracy against trained parameters, learning curves, retention."""

from collections.abc import Mapping, Sequence
from typing import Any

from blipfit.report import charts, terminal
from blipfit.report.charts import Chart, Line, Point
from blipfit.report.experiments import Collection, Experiment
from blipfit.report.grid_table import FAMILIES
from blipfit.report.numbers import Number, Record

MAX_LABELS = 8
"""Most points of a figure with their name beside them."""


def parameters_chart(collection: Collection) -> Chart | None:
    """Test score against the number of trained parameters, with the best experiment of each size labeled."""
    rows = [
        (experiment, size, score)
        for experiment in collection.finished
        if (size := experiment.number("trained_parameters", digits=0)) and (score := experiment.score()) and size.value
    ]
    if not rows:
        return None
    intervals = [interval for experiment, _, _ in rows if (interval := experiment.interval())]
    chance = next((number for experiment, _, _ in rows if (number := _chance(experiment))), None)
    heights = [score.shown_value for _, _, score in rows]
    heights += [end.shown_value for interval in intervals for end in interval]
    heights += [chance.shown_value] if chance else []
    x = charts.x_axis("trained parameters", [size.value for _, size, _ in rows], log=True)
    y = charts.y_axis(f"test {collection.measure}, %", heights)
    front = _front(rows)
    points = [_point(experiment, size, score, x, y, front) for experiment, size, score in rows]
    best = collection.best
    summary = f"Test {collection.measure} of {terminal.format_count(len(rows), 'experiment')} of {collection.title}"
    if best is not None and (score := best.score()):
        summary += f"; the best is experiment {best.name} with {score.text} %"
    return Chart(
        f"parameters-{collection.key}",
        f"{collection.title}: {collection.measure} against trained parameters",
        f"{summary}. All values are in the table of experiments.",
        x,
        y,
        points,
        reference=None if chance is None else y.position(chance.shown_value),
        reference_label="chance",
    )


def _chance(experiment: Experiment) -> Number | None:
    return experiment.number("metrics", "test", "chance")


def _front(rows: Sequence[tuple[Experiment, Number, Number]]) -> list[Experiment]:
    """Experiments that no other beats with as few or fewer trained parameters, from small to large."""
    front: list[Experiment] = []
    highest = float("-inf")
    for experiment, _, score in sorted(rows, key=lambda row: (row[1].value, -row[2].value)):
        if score.value > highest:
            highest = score.value
            front.append(experiment)
    return front[-MAX_LABELS:]


def _point(
    experiment: Experiment, size: Number, score: Number, x: charts.Axis, y: charts.Axis, front: Sequence[Experiment]
) -> Point:
    interval = experiment.interval()
    low, high = (y.position(end.shown_value) for end in interval) if interval else (None, None)
    spread = f" [{interval[0].text}–{interval[1].text}]" if interval else ""
    return Point(
        x.position(size.value),
        y.position(score.shown_value),
        low,
        high,
        f"{experiment.name}: {experiment.placement}, {size.text} trained parameters, {score.text} %{spread}",
        experiment.family or "other",
        experiment.name if experiment in front else "",
        (size, score),
    )


def families_of(collection: Collection) -> list[tuple[str, str]]:
    """(class name, written name) of the markers that a figure of this collection has."""
    kinds = {experiment.family or "other" for experiment in collection.finished}
    names: dict[str, str] = {**dict(FAMILIES.items()), "other": "other language model"}
    return [(kind, name) for kind, name in names.items() if kind in kinds]


def learning_curves(collection: Collection) -> list[Chart]:
    """Training loss and validation per epoch, one line per experiment, unfinished ones included."""
    measures = {
        "loss": "training loss",
        "val_accuracy": "validation accuracy, %",
        "val_loss": "validation loss",
    }
    return [chart for key, label in measures.items() if (chart := _learning_curve(collection, key, label))]


def _learning_curve(collection: Collection, key: str, label: str) -> Chart | None:
    series = {
        number: pairs for number, experiment in enumerate(collection.experiments) if (pairs := _epochs(experiment, key))
    }
    if not series:
        return None
    numbers = [pair for pairs in series.values() for pair in pairs]
    x = charts.x_axis("epoch", [epoch.value for epoch, _ in numbers], whole=True, width=charts.SMALL_WIDTH)
    y = charts.y_axis(label, [value.value for _, value in numbers])
    lines = []
    for number, pairs in series.items():
        experiment = collection.experiments[number]
        points = [(x.position(epoch.value), y.position(value.value)) for epoch, value in pairs]
        title = f"{experiment.name}: {experiment.placement}"
        lines.append(Line(experiment.name, title, points, pairs, experiment is collection.best))
    lines.sort(key=lambda line: line.is_best)  # drawn last, above the others
    count = terminal.format_count(len(lines), "experiment")
    return Chart(
        f"curve-{key.replace('_', '-')}-{collection.key}",
        f"{collection.title}: {label} per epoch",
        f"{label} of {count}. All values are in the table below the figures.",
        x,
        y,
        lines=lines,
    )


def _epochs(experiment: Experiment, key: str) -> list[tuple[Number, Number]]:
    log = experiment.log
    count = len(log.content) if isinstance(log.content, list) else 0
    pairs = ((log.number(line, "epoch", digits=0), log.number(line, key, digits=3)) for line in range(count))
    return [(epoch, value) for epoch, value in pairs if epoch and value]


def retention_chart(record: Record, key: str) -> Chart | None:
    """Chance-corrected retention against the size of the Q-Former, in percent of the original's."""
    candidates = [c for c in record.get("candidates") or [] if isinstance(c, Mapping)]
    rows: list[tuple[Mapping[str, Any], Number, Number]] = []
    for index, candidate in enumerate(candidates):
        size = record.number("candidates", index, "shares", "qformer_parameters", factor=100)
        retained = record.number("candidates", index, "retention", factor=100)
        if size and retained and size.value > 0:
            rows.append((candidate, size, retained))
    if not rows:
        return None
    x = charts.x_axis("parameters of the Q-Former, % of the original's", [size.shown_value for _, size, _ in rows])
    y = charts.y_axis("chance-corrected retention, %", [100, *(value.shown_value for _, _, value in rows)])
    names = terminal.distinct_names([str(candidate.get("name", "")) for candidate, _, _ in rows])
    points = []
    for (candidate, size, retained), name in zip(rows, names, strict=True):
        title = f"{name}: {size.text} % of the parameters, retains {retained.text} %"
        position = x.position(size.shown_value)
        kind = "front" if candidate.get("pareto") else "other"
        side: charts.Side = "left" if position > charts.WIDTH / 2 else "right"
        points.append(
            Point(position, y.position(retained.shown_value), None, None, title, kind, name, (size, retained), side)
        )
    return Chart(
        f"retention-{key}",
        f"Retention of {record.text('base')}",
        f"Retention of {terminal.format_count(len(rows), 'candidate')} against size. All values are in the table.",
        x,
        y,
        points,
        reference=y.position(100),
        reference_label="original",
    )
