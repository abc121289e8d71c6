"""Prepare, load and identify a data set by its name; the modules of data sets are imported only when needed."""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from blipfit.data import annotations
from blipfit.data.question import SPLITS, Question
from blipfit.data_sets import DATA_SETS, DataSet
from blipfit.errors import UserError
from blipfit.file_writes import temporary_folder


class DataSetModule(Protocol):
    """What the module of a data set provides."""

    @property
    def prepare(self) -> Callable[..., Any]:
        """`prepare(source, to, …)` writes a prepared folder and returns a report; `icons` takes no source."""

    @property
    def load(self) -> Callable[[Path, str], list[Question]]:
        """`load(folder, split)` reads one split of a prepared folder."""


def _scienceqa() -> DataSetModule:
    from blipfit.data import scienceqa

    return scienceqa


def _iconqa() -> DataSetModule:
    from blipfit.data import iconqa

    return iconqa


def _icons() -> DataSetModule:
    from blipfit.data import icons

    return icons


def _own() -> DataSetModule:
    from blipfit.data import own

    return own


def _rewardbench() -> DataSetModule:
    from blipfit.data import rewardbench

    return rewardbench


def _mme() -> DataSetModule:
    from blipfit.data import mme

    return mme


MODULES: dict[str, Callable[[], DataSetModule]] = {
    "scienceqa": _scienceqa,
    "iconqa": _iconqa,
    "icons": _icons,
    "own": _own,
    "rewardbench": _rewardbench,
    "mme": _mme,
}
"""Functions that import a data set's module when it is first needed, so that `blipfit --help` stays fast."""

DRAWN_COUNTS: Mapping[str, int] = {"mme": 200, "rewardbench": 3000}
"""Data sets that can be drawn from the world of icons, and by default how many images per subtask or pairs in all."""
DRAWING_FILE = "drawn.json"
"""In a folder of a drawn data set: how it was drawn."""


def get_data_set(name: str) -> DataSet:
    """Return the data set of that name. Raises UserError if there is none."""
    if name not in DATA_SETS:
        raise UserError(_unknown("data set", name, DATA_SETS))
    return DATA_SETS[name]


def prepare(name: str, *args: Any, **kwargs: Any) -> Any:
    """Write a prepared folder and return a report; the arguments are those of `prepare` in the data set's module.

    Raises UserError if the source is not the official data.
    """
    return MODULES[get_data_set(name).name]().prepare(*args, **kwargs)


def prepare_drawn(name: str, to: Path, count: int | None = None, seed: int = 42) -> Any:
    """Write a prepared folder of `mme` or `rewardbench` whose images and texts are drawn from the world of icons.

    Raises UserError if the data set cannot be drawn, or if the folder holds something else.
    """
    if name not in DRAWN_COUNTS:
        raise UserError(f"{name} cannot be drawn from icons; {' and '.join(DRAWN_COUNTS)} can")
    drawing = {"drawn": name, "count": count or DRAWN_COUNTS[name], "seed": seed}
    existing = annotations.read_json(to / DRAWING_FILE) if (to / DRAWING_FILE).is_file() else None
    if to.exists() and any(to.iterdir()) and existing != drawing:
        raise UserError(
            f"{to} holds something else ({existing or 'not drawn'}); delete it or choose another folder with --to"
        )
    with temporary_folder(to.with_name(f"{to.name}.drawn")) as temporary:
        source = temporary / name
        _draw(name, source, count or DRAWN_COUNTS[name], seed)
        report = prepare(name, source, to)
    notes = [f"drawn from icons with seed {seed}", *report.notes]
    report = dataclasses.replace(report, published={}, notes=notes)
    (to / DRAWING_FILE).write_text(json.dumps(drawing) + "\n", encoding="utf-8")
    return report


def _draw(name: str, folder: Path, count: int, seed: int) -> None:
    from blipfit.data import icons

    write = icons.write_mme if name == "mme" else icons.write_preferences
    write(folder, n=count, seed=seed)


def load(name: str, folder: Path, split: str, limit: int | None = None) -> list[Question]:
    """Read one split of a prepared folder, at least one question; `limit`: only the first so many.

    Raises UserError if the folder, the split or its questions do not exist or are damaged.
    """
    data_set = get_data_set(name)
    if split not in SPLITS:
        raise UserError(_unknown("split", split, SPLITS))
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be 1 or more")
    if not folder.is_dir():
        source = "" if name == "icons" else " --from DIR"
        raise UserError(f"{folder} does not exist; run `blipfit prepare {name}{source} --to {folder}`")
    questions = MODULES[data_set.name]().load(folder, split)
    if not questions:
        raise UserError(f"{folder} has no {name} questions in split {split}")
    return questions[:limit]


def detect(folder: Path) -> str:
    """Return the name of the data set that a prepared folder holds, by the names of its files.

    Raises UserError if it is no prepared folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that `blipfit prepare` wrote")
    files = {path.name for path in folder.iterdir()}
    splits = {f"{split}.jsonl" for split in SPLITS}
    if any(f"scienceqa_{split}.json" in files for split in SPLITS):
        return "scienceqa"
    if "annotations" in files:
        return "icons" if "icons.json" in files else "iconqa"
    if splits & files:
        return "rewardbench" if "split.json" in files else "own"
    from blipfit.data import mme

    if any(f"{subtask}.txt" in files or subtask in files for subtask in mme.SUBTASKS):
        return "mme"
    raise UserError(
        f"{folder} holds no data set that blipfit reads ({', '.join(DATA_SETS)}); give the folder that `blipfit "
        "prepare` wrote"
    )


def fingerprint(splits: Iterable[Iterable[Question]]) -> str:
    """SHA-256 over everything in the questions that a result depends on: ids, texts, choices and answers, in order.

    The images' bytes are not read for it.
    """
    digest = hashlib.sha256()
    for questions in splits:
        for q in questions:
            digest.update(repr((q.id, q.question, q.choices, q.answer, q.answer_index, q.context)).encode())
        digest.update(b"/")
    return digest.hexdigest()


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown {kind} {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
