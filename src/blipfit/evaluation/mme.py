"""MME by the official rule: files of answers in, scores of 14 subtasks and two totals out.

The rule, as in the official tool's `calculation.py`: a response is lower-cased and not stripped; `yes` and `no` count
as such; else its first four characters decide: `yes` in them, else `no` in them, else it is of neither kind and wrong.
So `none` and `not sure` are a no, and a `yes` after four blanks is neither. acc = right answers / questions;
acc+ = images with both answers right / images; score = 100 acc + 100 acc+; a total is a sum of scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipfit import run
from blipfit.data.mme import COGNITION, PERCEPTION, SUBTASKS, TRUTHS, check_pairs, columns, truth
from blipfit.data.question import Question
from blipfit.errors import UserError

COLUMNS = ("image", "question", "Yes|No", "response")
KINDS = (*TRUTHS, "other")


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of an answer file; `truth` is `yes` or `no`, `response` as the model gave it."""

    image: str
    question: str
    truth: str
    response: str


def kind(response: str) -> str:
    """What a response counts as: `yes`, `no` or `other`."""
    lowered = response.lower()
    if lowered in TRUTHS:
        return lowered
    beginning = lowered[:4]
    return "yes" if "yes" in beginning else "no" if "no" in beginning else "other"


def read_answers(folder: Path) -> dict[str, list[Answer]]:
    """Read every `SUBTASK.txt` of a folder: `image, question, Yes|No, response` with tabs between, two lines an image.

    Any line that is odd, and any pair that does not name one image, is a UserError with file and line.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the one that holds SUBTASK.txt files, e.g. existence.txt")
    files = {subtask: folder / f"{subtask}.txt" for subtask in SUBTASKS}
    found = {subtask: _read(file) for subtask, file in files.items() if file.is_file()}
    if not found:
        raise UserError(f"{folder} holds none of MME's answer files ({SUBTASKS[0]}.txt, {SUBTASKS[1]}.txt, …)")
    return found


def _read(file: Path) -> list[Answer]:
    answers = [
        Answer(image, question, truth(right, where), response)
        for where, (image, question, right, response) in columns(file, COLUMNS)
    ]
    check_pairs([answer.image for answer in answers], str(file))
    return answers


def write_answers(folder: Path, questions: Sequence[Question], responses: Sequence[str]) -> None:
    """Write responses to MME questions as official answer files, one a subtask, each file whole or not at all.

    The questions come two by two, as `read_questions` gives them. A tab or line break in a response becomes a blank,
    one for one, so it counts as it would have counted.
    """
    lines: dict[str, list[str]] = {}
    images: dict[str, list[str]] = {}
    for question, response in zip(questions, responses, strict=True):
        subtask, image = question.tags["subtask"], question.tags["file"]
        images.setdefault(subtask, []).append(image)
        line = "\t".join(map(_one_line, (image, question.question, question.answer, response)))
        lines.setdefault(subtask, []).append(line + "\n")
    for subtask, named in images.items():
        check_pairs(named, subtask)
    if foreign := [s for s in SUBTASKS if s not in lines and (folder / f"{s}.txt").is_file()]:
        raise UserError(f"{folder} holds answers to other subtasks ({', '.join(foreign)}); give a new folder")
    for subtask, written in lines.items():
        run.write_text(folder / f"{subtask}.txt", "".join(written))


def _one_line(text: str) -> str:
    return text.replace("\t", " ").replace("\r", " ").replace("\n", " ")


def score(answers: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """Score answers by subtask; pairs that do not name one image are a UserError.

    Scores and totals are rounded to two decimals, as published; everything follows from the counts beside them. A
    total sums the subtasks that are there; `missing` names the others.
    """
    exact = {subtask: _subtask(subtask, answers[subtask]) for subtask in SUBTASKS if subtask in answers}
    return {
        "judge": "mme",
        "perception": round(sum(exact[s]["score"] for s in PERCEPTION if s in exact), 2),
        "cognition": round(sum(exact[s]["score"] for s in COGNITION if s in exact), 2),
        "questions": sum(facts["questions"] for facts in exact.values()),
        "missing": [subtask for subtask in SUBTASKS if subtask not in exact],
        "subtasks": {subtask: {**facts, "score": round(facts["score"], 2)} for subtask, facts in exact.items()},
    }


def _subtask(subtask: str, answers: Sequence[Answer]) -> dict[str, Any]:
    check_pairs([answer.image for answer in answers], subtask)
    confusion = {right: dict.fromkeys(KINDS, 0) for right in TRUTHS}
    hits = []
    for answer in answers:
        said = kind(answer.response)
        confusion[answer.truth][said] += 1
        hits.append(said == answer.truth)
    both = sum(first and second for first, second in zip(hits[::2], hits[1::2], strict=True))
    right, questions, images = sum(hits), len(hits), len(hits) // 2
    acc, acc_plus = right / questions, both / images
    return {
        "score": 100 * acc + 100 * acc_plus,
        "acc": round(100 * acc, 4),
        "acc_plus": round(100 * acc_plus, 4),
        "right": right,
        "questions": questions,
        "both_right": both,
        "images": images,
        "confusion": confusion,
    }


def score_mme(folder: Path | str) -> dict[str, Any]:
    """Score a folder of finished answers; `ignored` names its other text files."""
    folder = Path(folder)
    record = score(read_answers(folder))
    ignored = sorted(file.name for file in folder.glob("*.txt") if file.stem not in SUBTASKS)
    return {**record, "folder": str(folder), "ignored": ignored}
