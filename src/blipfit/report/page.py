"""The HTML report: one file without references to anything outside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

import blipfit
from blipfit import grid
from blipfit.report import evaluations, figures, grid_table, published, terminal
from blipfit.report.charts import Chart
from blipfit.report.evaluations import BaseScore, EvaluationRow, MMETable, RetentionRow
from blipfit.report.examples import ExampleSet
from blipfit.report.experiments import Collection, Experiment
from blipfit.report.numbers import Number, Record

_TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True, slots=True)
class EffectTable:
    """The effects of one collection, as `blipfit ablation` computes them."""

    collection: Collection
    groups: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
    """Title of a kind of effects and their records."""


@dataclass(frozen=True, slots=True)
class RankTable:
    """AdaLoRA's ranks at the end of a run."""

    experiment: Experiment
    columns: Sequence[int]
    """Block numbers."""
    rows: Sequence[tuple[str, Mapping[int, Number]]]
    """Kind of module, and its rank by block."""
    sublayers: Mapping[str, Mapping[str, Any]]
    """By sublayer, as `blipfit ranks` computes them."""
    start_rank: int


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything that a report is made from."""

    collections: Sequence[Collection]
    model_evaluations: Sequence[Record] = ()
    retentions: Sequence[Record] = ()
    effects: Sequence[EffectTable] = ()
    ranks: Sequence[RankTable] = ()
    examples: Sequence[ExampleSet] = ()

    @property
    def all_evaluations(self) -> list[Record]:
        """Evaluations of models and of runs."""
        of_runs = [r for c in self.collections for experiment in c.experiments for r in experiment.evaluations]
        return [*self.model_evaluations, *of_runs]


@dataclass(frozen=True, slots=True)
class CollectionView:
    """What the page shows of one data set."""

    collection: Collection
    bases: Sequence[BaseScore]
    parameters_chart: Chart | None
    marker_names: Sequence[tuple[str, str]]
    curves: Sequence[Chart]
    missing: Sequence[str]
    chance: Number | None
    questions: Number | None
    """Of the test split."""
    train_questions: Number | None
    models: Sequence[str]
    """Base models, each once."""
    epochs: Sequence[int]
    """Numbers of the epochs in the logs, from 0."""


def render(contents: Contents, watched: bool = False) -> str:
    """The page as HTML. `watched`: it reloads itself when `blipfit report --watch` has made a new one."""
    views = [_view(collection, contents) for collection in contents.collections]
    records = contents.all_evaluations
    retentions: list[tuple[Record, Chart | None, list[RetentionRow]]] = [
        (record, figures.retention_chart(record, str(number)), evaluations.retention_rows(record))
        for number, record in enumerate(contents.retentions, 1)
    ]
    tables = grid_table.make_tables(contents.collections)
    rows: list[EvaluationRow] = evaluations.make_rows(records)
    mme: MMETable | None = evaluations.make_mme_table(records)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            contents=contents,
            views=views,
            tables=tables,
            others=grid_table.other_comparisons(contents.collections),
            has_published=any(table.has_published for table in tables),
            rule=grid_table.RULE,
            ranks=grid.RANKS,
            published_source=published.record().text("source"),
            lavin_source=published.record().text("mme", "LaVIN", "source"),
            evaluation_rows=rows,
            mme=mme,
            retentions=retentions,
            version=blipfit.__version__,
            watched=watched,
        )
    )


def render_waiting(message: str) -> str:
    """The page of `--watch` as long as there is nothing to report."""
    return _environment().get_template("waiting.html.j2").render(message=message, watched=True)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_escape_controls,
    )
    filters: dict[str, Callable[..., Any]] = {
        "breakable": make_breakable,
        "spans": format_spans,
        "count_of": terminal.format_count,
        "signed": lambda value: f"{value:+.2f}".replace("-", "−"),
        "facts": experiment_facts,
        "recipe_text": recipe_text,
    }
    environment.filters.update(filters)
    return environment


def _escape_controls(value: Any) -> Any:
    """Texts of files with control characters as escapes; what is HTML already stays."""
    return terminal.escape_controls(value) if type(value) is str else value


def make_breakable(text: str) -> markupsafe.Markup:
    """A placement as HTML whose lines may break after a plus."""
    return markupsafe.escape(_escape_controls(text)).replace("+", markupsafe.Markup("+<wbr>"))


def _view(collection: Collection, contents: Contents) -> CollectionView:
    records = [*contents.model_evaluations, *(r for e in collection.experiments for r in e.evaluations)]
    logs = [experiment.log.content for experiment in collection.experiments]
    best = collection.best
    return CollectionView(
        collection,
        evaluations.base_scores(collection, records),
        figures.parameters_chart(collection),
        figures.families_of(collection),
        figures.learning_curves(collection),
        collection.missing(),
        best.number("metrics", "test", "chance") if best else None,
        best.number("metrics", "test", "questions", digits=0) if best else None,
        best.number("counts", "train", digits=0) if best else None,
        list(dict.fromkeys(experiment.model for experiment in collection.experiments if experiment.model)),
        range(max((len(lines) for lines in logs if isinstance(lines, list)), default=0)),
    )


def format_spans(names: Sequence[str]) -> str:
    """`1–3, 7, baseline` for `1`, `2`, `3`, `7` and `baseline`."""
    groups: list[list[str]] = []
    for name in names:
        last = groups[-1][-1] if groups else ""
        if name.isdecimal() and last.isdecimal() and int(name) == int(last) + 1:
            groups[-1].append(name)
        else:
            groups.append([name])
    return ", ".join(group[0] if len(group) == 1 else f"{group[0]}–{group[-1]}" for group in groups)


def experiment_facts(experiment: Experiment) -> list[tuple[str, str | Number]]:
    """What is recorded on a finished experiment besides its scores: name → value."""
    result = experiment.result
    if result is None:
        return []
    facts: dict[str, str | Number | None] = {
        "run folder": str(experiment.run.folder),
        "model": experiment.model,
        "trained parameters": result.number("trained_parameters", digits=0),
        "share of all parameters, %": result.number("trained_share", digits=2, factor=100),
        "best epoch": result.number("best_epoch", digits=0),
        "epochs": result.number("epochs", digits=0),
        "time": result.number("seconds", duration=True),
        "machine": result.text("device"),
        "precision": result.text("precision"),
        "prompt": result.text("prompt"),
        "one prompt in full": result.text("prompt_example"),
        "versions": ", ".join(f"{name} {value}" for name, value in result.mapping("versions").items()),
        "adapter (SHA-256)": result.text("adapter_sha256"),
        "base weights (SHA-256)": result.text("base_sha256"),
        "test questions (SHA-256)": result.text("questions_sha256", "test"),
        "test images (SHA-256)": result.text("images_sha256", "test"),
    }
    return [(name, value) for name, value in facts.items() if value]


def recipe_text(experiment: Experiment) -> str:
    """The recipe's file, or empty if it cannot be read."""
    try:
        return experiment.run.recipe_file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
