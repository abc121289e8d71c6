"""How records are formatted for the terminal: numbers, phrases and tables.

Texts of a user's files and a model's answers are printed through `print_record`, `console` and `print_error`, which
write control characters as escapes and read no markup.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from blipfit import methods
from blipfit.recipe import AdapterConfig


def print_record(record: Any, as_json: bool, render: Callable[[Any], Any]) -> None:
    """Print the record as one JSON object, or rendered for a person; of several processes only the main one prints."""
    if "accelerate" in sys.modules:
        from blipfit.runtime import distributed

        if not distributed.is_main():
            return
    if as_json:
        value = record if isinstance(record, dict | list) else _to_dict(record)
        print(_escape_json(json.dumps(value, ensure_ascii=False, default=str)))
        return
    rendered = render(record)
    for part in rendered if isinstance(rendered, list | tuple) else (rendered,):
        if isinstance(part, Table):  # in a narrow terminal, numbers continue on the next line instead of being cut
            for column in part.columns:
                column.overflow = "fold"
        console().print(part, soft_wrap=isinstance(part, str))


def _to_dict(value: Any) -> dict[str, Any]:
    """A dataclass as a dictionary; `dataclasses.asdict` would rebuild a Counter wrongly."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def console(stderr: bool = False) -> Console:
    """A console; where the output is not a terminal it is 160 columns wide, so that no line of data is broken.

    Texts and the cells of tables are printed as they are, except that control characters are written as escapes.
    """
    screen = _PlainTextConsole(stderr=stderr, highlight=False)
    return screen if screen.is_terminal else _PlainTextConsole(stderr=stderr, highlight=False, width=160)


class _PlainTextConsole(Console):
    """A console for texts of unknown origin, the cells of tables included: rich makes all of them by `render_str`."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escape_controls(text), **{**options, "emoji": False, "markup": False})


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Control characters but tab and newline, which a terminal would obey; characters that change the direction of the text
around them; byte order marks; half characters, which cannot be printed."""
_MAX_ERROR = 900


def escape_controls(text: str) -> str:
    """Return a text with control characters written as escapes (`\\x1b`); tabs and newlines stay."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def _escape_json(text: str) -> str:
    """Return a JSON text whose control characters are JSON escapes; it stands for the same value."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def print_error(message: str) -> None:
    """Print a message on stderr as `format_error` does."""
    print(format_error(message), end="", file=sys.stderr)


def format_error(message: str) -> str:
    """A message as one line of `blipfit: …` with its line end, without control characters.

    The middle of a message above 900 characters is left out: its beginning says where, its end how to fix it.
    """
    line = escape_controls(message).replace("\n", "\\n").replace("\t", "\\t")
    if len(line) > _MAX_ERROR:
        line = f"{line[: 2 * _MAX_ERROR // 3]} … {line[-_MAX_ERROR // 3 :]}"
    return f"blipfit: {line}\n"


def format_placement(adapter: AdapterConfig | Mapping[str, Any]) -> str:
    """A placement as a phrase, with the method if it is not LoRA: `QF full · LLM attn+ffn · DoRA`."""
    values = adapter.model_dump() if isinstance(adapter, AdapterConfig) else adapter
    qformer, llm = values["qformer"], values["llm"]
    parts = []
    if qformer:
        parts.append("QF full" if qformer == "full" else "QF " + "+".join(qformer))
    if llm:
        parts.append("LLM " + "+".join(llm) + _format_blocks(values.get("llm_layers")))
    if parts and (method := values.get("method", "lora")) != "lora":
        parts.append(methods.title(method))
    return " · ".join(parts) or "only what is always trained"


def _format_blocks(layers: Sequence[int] | None) -> str:
    """Blocks of the language model, if not all: ` in blocks 0–7, 24–31`."""
    if layers is None:
        return ""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][-1] + 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    return " in blocks " + ", ".join(str(s[0]) if len(s) == 1 else f"{s[0]}–{s[-1]}" for s in spans)


def format_accuracy(metrics: Mapping[str, Any] | None) -> str:
    """An accuracy in percent with its 95 % interval: `86.4 [84.9–87.8]`, or a dash."""
    if not metrics or metrics.get("accuracy") is None:
        return "–"
    low, high = metrics["interval"]
    return f"{metrics['accuracy']:.1f} [{low:.1f}–{high:.1f}]"


def format_score(metrics: Mapping[str, Any] | None) -> str:
    """The accuracy of a split, or ROUGE-L if answers are open."""
    if not metrics or metrics.get("method") != "generation":
        return format_accuracy(metrics)
    rouge = metrics["texts"]["rougeL"]
    return f"ROUGE-L {format_interval(rouge['mean'], rouge['interval'], 100)}"


def format_interval(value: float | None, ends: Sequence[float | None] | None, factor: float = 1) -> str:
    """A value with its interval, both multiplied by `factor`: `45.1 [43.0–47.2]`, or a dash."""
    if value is None or ends is None:
        return "–"
    low, high = ("–" if end is None else f"{factor * end:.1f}" for end in ends)
    return f"{factor * value:.1f} [{low}–{high}]"


def format_count(count: int, noun: str) -> str:
    """`1 bank`, `2 banks`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def format_duration(seconds: float) -> str:
    """`42 s`, `12 min` or `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def distinct_names(paths: Sequence[str | Path]) -> list[str]:
    """The names of files or folders, with as many of the folders above them as it takes to tell them apart."""
    all_parts = [Path(path).parts for path in paths]
    names = []
    for parts in all_parts:
        others = [other for other in all_parts if other != parts]
        lengths = range(1, len(parts))
        length = next((n for n in lengths if all(other[-n:] != parts[-n:] for other in others)), len(parts))
        names.append("/".join(parts[-length:]))
    return names


def results_table(records: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """Finished experiments, one per row."""
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
            format_placement(adapter),
            str(adapter["rank"]) if has_lora and methods.has_rank(adapter.get("method", "lora")) else "–",
            format_score(metrics.get("val")),
            format_score(metrics.get("test")),
            f"{metrics['test']['chance']:.1f}" if "chance" in metrics.get("test", {}) else "–",
            f"{record['trained_parameters']:,}",
            f"{100 * record['trained_share']:.2f} %",
            f"{record['best_epoch']} of {record['epochs']}",
            format_duration(record["seconds"]),
        )
    return table


def breakdown_table(metrics: Mapping[str, Any], title: str) -> Table:
    """Accuracies by group, one per row."""
    table = Table(title=title, title_justify="left")
    for name in ("group", "value", "accuracy [95 %]", "questions"):
        table.add_column(name, justify="left" if name in ("group", "value") else "right")
    for group, values in metrics["by"].items():
        for value, accuracy in values.items():
            table.add_row(group, value, format_accuracy(accuracy), str(accuracy["questions"]))
    return table


def components_table(trained: Mapping[str, int], total: Mapping[str, int] | None = None, adapter: int = 0) -> Table:
    """Trained parameters by component; with `total`, the component's size beside them, and the size of the adapter."""
    table = Table(title="trained parameters", title_justify="left")
    table.add_column("component")
    table.add_column("trained", justify="right")
    if total is not None:
        table.add_column("in the model", justify="right")
    for part in dict.fromkeys([*(total or {}), *trained]):
        row = [part, f"{trained.get(part, 0):,}"]
        table.add_row(*row, *([f"{total.get(part, 0):,}"] if total is not None else []))
    if total is not None and adapter:
        table.add_row("adapter", "", f"{adapter:,}")
    sums = ["sum", f"{sum(trained.values()):,}"]
    table.add_row(*sums, *([f"{sum(total.values()) + adapter:,}"] if total is not None else []), style="bold")
    return table


MAX_COLUMNS = 12
"""Groups with more values than that (ScienceQA's 379 skills) are left to the JSON."""


def leaderboard_tables(records: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Test accuracies by group, one row per experiment and one table per data set; empty without such groups."""
    tables = []
    for dataset in dict.fromkeys(record["dataset"] for record in records):
        rows = {r["experiment"]: r["metrics"]["test"]["by"] for r in records if r["dataset"] == dataset}
        columns = {
            (group, value): None
            for groups in rows.values()
            for group, values in groups.items()
            for value in values
            if len(values) <= MAX_COLUMNS
        }
        if not columns:
            continue
        table = Table(title=f"{dataset}, test accuracy by group (%)", title_justify="left")
        table.add_column("id")
        for _, value in columns:
            table.add_column(value, justify="right")
        for experiment, groups in rows.items():
            cells = [groups.get(group, {}).get(value) for group, value in columns]
            table.add_row(experiment, *("–" if cell is None else f"{cell['accuracy']:.1f}" for cell in cells))
        tables.append(table)
    return tables
