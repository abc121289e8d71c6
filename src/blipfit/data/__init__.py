"""Data sets by name: how each is prepared, loaded and asked. Importing this imports none of them."""

import difflib
import hashlib
import json
import tempfile
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from blipfit.data import records
from blipfit.data.question import SPLITS, Question
from blipfit.data_sets import DATA_SETS, DataSet
from blipfit.errors import UserError


def dataset(name: str) -> DataSet:
    """Return the data set of that name."""
    if name not in DATA_SETS:
        raise UserError(_unknown("data set", name, DATA_SETS))
    return DATA_SETS[name]


def prepare(name: str, *args: Any, **kwargs: Any) -> Any:
    """Write a prepared folder; see the `prepare` of the data set's own module for what it takes and reports."""
    return import_module(dataset(name).module).prepare(*args, **kwargs)


DRAWN = {"mme": ("write_mme", 200), "rewardbench": ("write_preferences", 3000)}
"""What the world of icons can be drawn as, and how many pictures a subtask or pairs."""
DRAWING = "drawn.json"
"""In a folder of these: how it was drawn."""


def prepare_drawn(name: str, to: Path, count: int | None = None, seed: int = 42) -> Any:
    """Write a prepared folder of `mme` or `rewardbench` whose pictures and texts are of the world of icons."""
    if name not in DRAWN:
        raise UserError(f"{name} cannot be drawn from icons; {' and '.join(DRAWN)} can")
    writer, usual = DRAWN[name]
    drawing = {"drawn": name, "count": count or usual, "seed": seed}
    there = records.read_json(to / DRAWING) if (to / DRAWING).is_file() else None
    if to.exists() and any(to.iterdir()) and there != drawing:
        raise UserError(f"{to} holds something else ({there or 'not drawn'}); delete it or choose another folder")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as aside:
        source = Path(aside) / name
        getattr(import_module("blipfit.data.icons"), writer)(source, n=count or usual, seed=seed)
        report = prepare(name, source, to)
    (to / DRAWING).write_text(json.dumps(drawing) + "\n", encoding="utf-8")
    return report


def load(name: str, folder: Path, split: str, limit: int | None = None) -> list[Question]:
    """Read one split of a prepared folder, at least one question; `limit` keeps the first so many."""
    found = dataset(name)
    if split not in SPLITS:
        raise UserError(_unknown("split", split, SPLITS))
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be 1 or more")
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; run `blipfit prepare {name} --from DIR --to {folder}`")
    questions: list[Question] = import_module(found.module).load(folder, split)
    if not questions:
        raise UserError(f"{folder} has no {name} questions in split {split}")
    return questions[:limit]


def fingerprint(splits: Iterable[Iterable[Question]]) -> str:
    """SHA-256 over all that a result depends on of the questions: ids, texts, choices and answers, in order.

    The images' bytes are not read for it.
    """
    digest = hashlib.sha256()
    for questions in splits:
        for q in questions:
            digest.update(repr((q.id, q.question, q.choices, q.answer, q.answer_index, q.context)).encode())
        digest.update(b"/")
    return digest.hexdigest()


def _unknown(what: str, name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown {what} {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
