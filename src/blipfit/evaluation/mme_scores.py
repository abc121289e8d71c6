"""MME's official scores: read and write answer files, score 14 subtasks and two totals.

The rule, as in the official tool's `calculation.py`: a response is lower-cased but not stripped. If it is not exactly
`yes` or `no`, its first four characters decide: they contain `yes`, or else `no`, or else the response is `other` and
wrong. So `none` and `not sure` count as no, and `yes` after four blanks counts as other.
acc = right answers / questions; acc+ = images with both answers right / images; score = 100 acc + 100 acc+;
a total is the sum of its subtasks' scores.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipfit import run_folder
from blipfit.data.mme import (
    COGNITION,
    PERCEPTION,
    SUBTASKS,
    TRUTHS,
    check_pairs,
    find_deviations,
    parse_columns,
    parse_truth,
    read_columns,
)
from blipfit.data.question import Question
from blipfit.errors import UserError

COLUMNS = ("image", "question", "Yes|No", "response")
KINDS = (*TRUTHS, "other")


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of an answer file: `truth` is `yes` or `no`, `response` the model's unchanged text."""

    image: str
    question: str
    truth: str
    response: str


def classify_response(response: str) -> str:
    """Return what a response counts as by the official rule: `yes`, `no` or `other`."""
    text = response.lower()
    if text in TRUTHS:
        return text
    prefix = text[:4]
    return "yes" if "yes" in prefix else "no" if "no" in prefix else "other"


def read_answers(folder: Path) -> dict[str, list[Answer]]:
    """Read every `SUBTASK.txt` of a folder; return the answers by subtask.

    A line is `image, question, Yes|No, response`, separated by tabs; two consecutive lines belong to one image. Raises
    UserError with file and line if a line or a pair does not follow this format.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder with the SUBTASK.txt files, e.g. existence.txt")
    files = {subtask: folder / f"{subtask}.txt" for subtask in SUBTASKS}
    answers = {subtask: _read_file(file) for subtask, file in files.items() if file.is_file()}
    if not answers:
        raise UserError(
            f"{folder} contains none of MME's answer files ({SUBTASKS[0]}.txt, {SUBTASKS[1]}.txt, …); give the folder "
            "that contains them"
        )
    return answers


def _read_file(file: Path) -> list[Answer]:
    return _parse_lines(read_columns(file, COLUMNS), str(file))


def parse_answers(text: str, source: str) -> list[Answer]:
    """Return the answers in the text of an answer file; `source` names it in errors. Raises as `read_answers` does."""
    return _parse_lines(parse_columns(text, source, COLUMNS), source)


def _parse_lines(lines: Iterable[tuple[str, list[str]]], source: str) -> list[Answer]:
    answers = [
        Answer(image, question, parse_truth(expected, location), response)
        for location, (image, question, expected, response) in lines
    ]
    check_pairs([answer.image for answer in answers], source)
    return answers


def write_answers(folder: Path, questions: Sequence[Question], responses: Sequence[str]) -> None:
    """Write responses to MME questions as official answer files, one per subtask; each file is written atomically.

    The two questions of an image must be consecutive, as `read_questions` returns them. Every tab or line break in a
    response is replaced by one blank, which does not change what the response counts as. Raises UserError if the
    questions are not in this order or the folder contains answers to other subtasks.
    """
    lines: dict[str, list[str]] = {}
    images: dict[str, list[str]] = {}
    for question, response in zip(questions, responses, strict=True):
        subtask, image = question.tags["subtask"], question.tags["file"]
        images.setdefault(subtask, []).append(image)
        line = "\t".join(map(_to_single_line, (image, question.question, question.answer, response)))
        lines.setdefault(subtask, []).append(line + "\n")
    for subtask, names in images.items():
        check_pairs(names, subtask)
    if others := [s for s in SUBTASKS if s not in lines and (folder / f"{s}.txt").is_file()]:
        raise UserError(f"{folder} contains answers to other subtasks ({', '.join(others)}); give a new folder")
    for subtask, subtask_lines in lines.items():
        run_folder.write_text(folder / f"{subtask}.txt", "".join(subtask_lines))


def _to_single_line(text: str) -> str:
    return text.replace("\t", " ").replace("\r", " ").replace("\n", " ")


def score_answers(answers: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """Score answers, given by subtask.

    Scores and totals are rounded to two decimals, as published; the record also has the counts behind them. A total
    sums the subtasks that have answers; `missing` lists the others. `deviations` says how the questions differ from
    the benchmark (`data.mme.find_deviations`), and `benchmark` is whether they do not. Raises UserError if two
    consecutive answers of a subtask do not name one image.
    """
    questions = {subtask: [(a.image, a.question, a.truth) for a in rows] for subtask, rows in answers.items()}
    deviations = find_deviations(questions)
    exact = {subtask: _score_subtask(subtask, answers[subtask]) for subtask in SUBTASKS if subtask in answers}
    return {
        "judge": "mme",
        "benchmark": not deviations,
        "deviations": deviations,
        "perception": round(sum(exact[s]["score"] for s in PERCEPTION if s in exact), 2),
        "cognition": round(sum(exact[s]["score"] for s in COGNITION if s in exact), 2),
        "questions": sum(facts["questions"] for facts in exact.values()),
        "missing": [subtask for subtask in SUBTASKS if subtask not in exact],
        "subtasks": {subtask: {**facts, "score": round(facts["score"], 2)} for subtask, facts in exact.items()},
    }


def _score_subtask(subtask: str, answers: Sequence[Answer]) -> dict[str, Any]:
    check_pairs([answer.image for answer in answers], subtask)
    confusion = {expected: dict.fromkeys(KINDS, 0) for expected in TRUTHS}
    correct = []
    for answer in answers:
        kind = classify_response(answer.response)
        confusion[answer.truth][kind] += 1
        correct.append(kind == answer.truth)
    both_right = sum(first and second for first, second in zip(correct[::2], correct[1::2], strict=True))
    right, questions, images = sum(correct), len(correct), len(correct) // 2
    acc, acc_plus = right / questions, both_right / images
    return {
        "score": 100 * acc + 100 * acc_plus,
        "acc": round(100 * acc, 4),
        "acc_plus": round(100 * acc_plus, 4),
        "right": right,
        "questions": questions,
        "both_right": both_right,
        "images": images,
        "confusion": confusion,
    }


def score_mme(folder: Path | str) -> dict[str, Any]:
    """Score a folder of answer files; `ignored` lists its other text files. Raises UserError as `read_answers` does."""
    folder = Path(folder)
    record = score_answers(read_answers(folder))
    ignored = sorted(file.name for file in folder.glob("*.txt") if file.stem not in SUBTASKS)
    return {**record, "folder": str(folder), "ignored": ignored}
