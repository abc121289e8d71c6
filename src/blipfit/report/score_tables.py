"""Benchmark scores as tables: MME and VL-RewardBench."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from blipfit.data.mme import COGNITION, MAX_SCORE, PERCEPTION, TRUTHS
from blipfit.report import terminal


def mme(record: Mapping[str, Any]) -> list[Any]:
    """MME: one row per subtask, both totals, then differences from the benchmark and files that were not read."""
    subject = "MME" if record["benchmark"] else "NOT the MME benchmark, scored"
    table = Table(title=f"{subject} by the official rule, {record['questions']} questions", title_justify="left")
    table.add_column("subtask")
    for name in ("score", "acc", "acc+", "images", "truth yes: yes / no / other", "truth no: yes / no / other"):
        table.add_column(name, justify="right")
    for total, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        present = [subtask for subtask in subtasks if subtask in record["subtasks"]]
        for subtask in present:
            _mme_row(table, subtask, record["subtasks"][subtask])
        if present:
            best = MAX_SCORE * len(present)
            part = "" if len(present) == len(subtasks) else f", {len(present)} of {len(subtasks)} subtasks"
            table.add_row(f"{total} (of {best}{part})", f"{record[total]:.2f}", style="bold", end_section=True)
    lines: list[Any] = [table, *(f"differs from the MME benchmark: {text}" for text in record["deviations"])]
    if record["missing"]:
        lines.append(f"not in the totals, no answers: {', '.join(record['missing'])}")
    if record.get("ignored"):
        lines.append(f"not read, because no subtask has that name: {', '.join(record['ignored'])}")
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
    """VL-RewardBench: accuracies by category, then the pairs and judgments that they leave out."""
    table = Table(title="VL-RewardBench by the official rule", title_justify="left")
    table.add_column("category")
    for name in ("accuracy [95 %]", "strict", "complete", "pairs", "right", "wrong", "tie", "unparsed"):
        table.add_column(name, justify="right")
    complete = record.get("complete", record)  # a likelihood is always there, so no pair is incomplete
    for name, facts in record["categories"].items():
        table.add_row(name, *_rewardbench_cells(facts, complete["categories"][name]))
    table.add_section()
    table.add_row("pooled", *_rewardbench_cells(record["pooled"], complete["pooled"]), style="bold")
    table.add_row("macro", _number(record["macro"]), "", _number(complete["macro"]), style="bold")
    lines: list[Any] = [table, "strict: ties and unparsed pairs count as wrong; accuracy leaves them out"]
    if "complete" in record:
        lines.append("complete: accuracy of the pairs whose judgments all have a verdict (stricter than the official)")
    if record["macro"] is None:
        lines.append("no macro average: it needs decided pairs of all three categories")
    if record["equal_responses"]:
        lines.append(f"{record['equal_responses']} pairs have two equal responses, so neither can be the better one")
    return lines + _judgment_notes(record) + [f"{record['repeated_ids']} pairs share their id with an earlier pair"]


def _judgment_notes(record: Mapping[str, Any]) -> list[str]:
    """How the preferred response was found: by likelihoods, or by written judgments."""
    judgments = record.get("judgments", record.get("judgements"))  # the name in older records
    if judgments is None:
        return [f"{record['rows']} rows, {record['repeated_rows']} of them repeat another and count once"]
    low, high = record["samples"]
    choices, orders = record["chosen"], record["both_orders"]
    per_pair = str(low) if low == high else f"{low}–{high}"
    return [
        f"{judgments} judgments, {per_pair} per pair; their mean {_number(record['mean']['pooled'])}",
        f"answer 1 chosen {choices['answer_1']} times, answer 2 {choices['answer_2']}, another {choices['neither']}",
        f"{orders['pairs']} pairs judged in both orders, {orders['steady']} of them with the same result",
    ]


def _rewardbench_cells(facts: Mapping[str, Any], complete: Mapping[str, Any]) -> list[str]:
    counts = [str(facts[name]) for name in ("pairs", "right", "wrong", "tie", "unparsed")]
    return [terminal.format_accuracy(facts), _number(facts["strict"]), _number(complete["accuracy"]), *counts]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
