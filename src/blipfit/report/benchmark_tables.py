"""Benchmark scores as tables: MME and VL-RewardBench."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from blipfit.data.mme import COGNITION, PERCEPTION, TRUTHS
from blipfit.report import terminal


def mme(record: Mapping[str, Any]) -> list[Any]:
    """What `score mme` prints: a row a subtask, both totals, and what was not there or not read."""
    table = Table(title=f"MME by the official rule, {record['questions']} questions", title_justify="left")
    table.add_column("subtask")
    for name in ("score", "acc", "acc+", "images", "truth yes: yes / no / other", "truth no: yes / no / other"):
        table.add_column(name, justify="right")
    for total, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        there = [subtask for subtask in subtasks if subtask in record["subtasks"]]
        for subtask in there:
            _mme_row(table, subtask, record["subtasks"][subtask])
        if there:
            best = 200 * len(there)
            part = "" if len(there) == len(subtasks) else f", {len(there)} of {len(subtasks)} subtasks"
            name = f"{total} (of {best}{part})"
            table.add_row(name, f"{record[total]:.2f}", style="bold", end_section=True)
    lines: list[Any] = [table]
    if record["missing"]:
        lines.append(f"not in the totals, no answers: {', '.join(record['missing'])}")
    if record.get("ignored"):
        lines.append(f"not read, named like no subtask: {', '.join(record['ignored'])}")
    return lines


def _mme_row(table: Table, subtask: str, facts: Mapping[str, Any]) -> None:
    confusion = [" / ".join(str(count) for count in facts["confusion"][truth].values()) for truth in TRUTHS]
    table.add_row(
        subtask,
        f"{facts['score']:.2f}",
        f"{facts['acc']:.2f}",
        f"{facts['acc_plus']:.2f}",
        str(facts["images"]),
        *confusion,
    )


def rewardbench(record: Mapping[str, Any]) -> list[Any]:
    """What `score rewardbench` prints: accuracies, then everything that the accuracies leave out."""
    table = Table(title="VL-RewardBench by the official rule", title_justify="left")
    table.add_column("category")
    for name in ("accuracy [95 %]", "strict", "pairs", "right", "wrong", "tie", "unparsed"):
        table.add_column(name, justify="right")
    for name, facts in record["categories"].items():
        table.add_row(name, *_rewardbench_cells(facts))
    table.add_section()
    table.add_row("pooled", *_rewardbench_cells(record["pooled"]), style="bold")
    table.add_row("macro", _number(record["macro"]), style="bold")
    lines: list[Any] = [table, "strict: ties and unparsed pairs count as wrong; accuracy leaves them out"]
    if record["macro"] is None:
        lines.append("no macro average: it needs decided pairs of all three categories")
    return lines + _judged(record) + [f"{record['repeated_ids']} pairs share their id with an earlier pair"]


def _judged(record: Mapping[str, Any]) -> list[str]:
    """How the pairs were judged: by likelihoods, or by judgements in words."""
    if "judgements" not in record:
        return [f"{record['rows']} rows, {record['repeated_rows']} of them repeat another and count once"]
    low, high = record["samples"]
    chosen, orders = record["chosen"], record["both_orders"]
    each = str(low) if low == high else f"{low}–{high}"
    return [
        f"{record['judgements']} judgements, {each} a pair; mean over judgements {_number(record['mean']['pooled'])}",
        f"answer 1 chosen {chosen['answer_1']} times, answer 2 {chosen['answer_2']}, another {chosen['neither']}",
        f"{orders['pairs']} pairs judged in both orders, {orders['steady']} of them alike",
    ]


def _rewardbench_cells(facts: Mapping[str, Any]) -> list[str]:
    counts = [str(facts[name]) for name in ("pairs", "right", "wrong", "tie", "unparsed")]
    return [terminal.percent(facts), _number(facts["strict"]), *counts]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
