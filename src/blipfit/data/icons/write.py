"""The world of icons on disk: IconQA's official layout, MME's files and VL-RewardBench's rows.

Every folder appears whole or not at all. `icons.json` in it says how it was made: the same call again finds
its work done, another call is refused.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from blipfit.data import prepared, records
from blipfit.data.icons.draw import draw
from blipfit.data.icons.scene import Scene, scene
from blipfit.data.icons.skills import HELD_OUT, Ask, asked, chosen
from blipfit.data.icons.words import SUBTASKS, Preference, YesNo, preference, yes_no
from blipfit.data.prepared import Folder, PrepareReport
from blipfit.data.question import SPLITS, Question
from blipfit.errors import UserError

SETTINGS = "icons.json"
TYPE = "choose_txt"  # the one of IconQA's three question types that this world has
VERSION = 3  # raise it when the same seed gives other pictures or questions than before


def prepare(
    to: Path | str,
    train: int = 2000,
    val: int = 200,
    test: int = 500,
    seed: int = 42,
    skills: Iterable[str] | None = HELD_OUT,
    size: int = 64,
) -> PrepareReport:
    """Write a data set of that many questions a split in IconQA's official layout, and its annotations.

    The skills (names in `SKILLS`; None: all) take turns. No picture occurs twice with the same question, in
    one split or in two. Written are `problems.json`, `pid_splits.json`, `annotations/SPLIT.json` (a list of
    the records with their `id`) and `SPLIT/choose_txt/PID/` with `image.png` and `data.json`. A record's key
    `skill` is ours.
    """
    names = chosen(skills)
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    to = Path(to)
    with _folder(to, {"data": "icons", **counts, "seed": seed, "skills": list(names), "size": size}) as folder:
        if folder is not None:
            _write_problems(folder, counts, _unrepeated(asked(seed, names)), size)
    images = folder.placed if folder is not None else Counter(kept=sum(counts.values()))
    return PrepareReport("icons", to, counts, images=images)


def _write_problems(folder: Folder, counts: Mapping[str, int], drawn: Iterator[tuple[Scene, Ask]], size: int) -> None:
    problems: dict[str, dict[str, Any]] = {}
    members: dict[str, list[str]] = {split: [] for split in counts}
    for split, count in counts.items():
        for _ in range(count):
            of, ask = next(drawn)
            pid = str(len(problems) + 1)
            record = _record(ask)
            folder.write_image(_png(of, size), f"{split}/{TYPE}/{pid}/image.png")
            folder.write_json(record, f"{split}/{TYPE}/{pid}/data.json", indent=2)
            problems[pid] = {**record, "split": split}
            members[split].append(pid)
        annotations = [{"id": pid, **problems[pid]} for pid in members[split]]
        folder.write_json(annotations, f"annotations/{split}.json", indent=2)
    folder.write_json(problems, "problems.json", indent=2)
    folder.write_json({f"{TYPE}_{split}": pids for split, pids in members.items()}, "pid_splits.json")


def _png(of: Scene, size: int) -> bytes:
    file = BytesIO()
    draw(of, size).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _record(ask: Ask) -> dict[str, Any]:
    """A question with the field names of IconQA; `grade` and `label`, places in a curriculum, are empty."""
    return {
        "question": ask.question,
        "choices": list(ask.choices),
        "answer": ask.answer_index,
        "ques_type": TYPE,
        "grade": "",
        "label": "",
        "skill": ask.skill,
    }


def _unrepeated(pairs: Iterator[tuple[Scene, Ask]]) -> Iterator[tuple[Scene, Ask]]:
    """Leave out a question about a picture that has been asked about the same picture before."""
    seen = set()
    for of, ask in pairs:
        key = (of.picture, ask.question)
        if key not in seen:
            seen.add(key)
            yield of, ask


@contextmanager
def _folder(to: Path, settings: Mapping[str, Any]) -> Iterator[Folder | None]:
    """Yield a folder in the making that becomes `to` at the end, or None if `to` holds just that already."""
    settings = {"version": VERSION, **settings}
    if (to / SETTINGS).is_file():
        there = records.read_json(to / SETTINGS)
        if there != settings:
            raise UserError(f"{to} holds icons made otherwise ({there}); delete it or choose another folder")
        yield None
        return
    with prepared.folder(to, ours=()) as folder:
        yield folder
        folder.write_json(settings, SETTINGS)


def load(folder: Path | str, split: str) -> list[Question]:
    """The questions of one split of a folder that `prepare` wrote, in order; tags: skill.

    A split, file, picture or field that is missing is a `UserError` with its name.
    """
    folder = Path(folder)
    if split not in SPLITS:
        raise UserError(f"there is no split '{split}'; choose one of {', '.join(SPLITS)}")
    file = folder / "annotations" / f"{split}.json"
    listed = records.listed(records.read_json(file), str(file))
    return [_question(folder, split, record, f"{file}: record {at}") for at, record in enumerate(listed)]


def _question(folder: Path, split: str, value: Any, where: str) -> Question:
    record = records.mapping(value, where)
    pid = records.text(record, "id", where)
    choices = records.choices(record, where)
    right = records.index(record, choices, where)
    image = records.find_image(
        [folder / split / TYPE / pid / "image.png"], where, f"delete {folder} and prepare it again"
    )
    tags = {"skill": records.text(record, "skill", where)}
    return Question(pid, image, records.text(record, "question", where), choices[right], choices, right, tags=tags)


def write_mme(folder: Path | str, n: int = 50, seed: int = 42, size: int = 64) -> Path:
    """Write `n` pictures with two questions each for existence, count, position and color, as MME has them.

    `SUBTASK.txt` has lines `image \\t question \\t Yes|No`, two consecutive ones a picture, the true one
    first; the pictures are `SUBTASK/NUMBER.png`. No picture occurs twice in a subtask.
    """
    folder = Path(folder)
    with _folder(folder, {"data": "mme", "n": n, "seed": seed, "size": size}) as making:
        if making is not None:
            for subtask in SUBTASKS:
                lines = []
                for number, (of, pair) in zip(range(n), _pairs(subtask, seed), strict=False):
                    name = f"{number:06d}.png"
                    making.write_image(_png(of, size), f"{subtask}/{name}")
                    lines += [f"{name}\t{pair.yes}\tYes\n", f"{name}\t{pair.no}\tNo\n"]
                making.write_text("".join(lines), f"{subtask}.txt")
    return folder


def _scenes(seed: int) -> Iterator[Scene]:
    """The endless series of that seed without its repetitions."""
    seen, index = set(), 0
    while True:
        of = scene(seed, index)
        index += 1
        if of.picture not in seen:
            seen.add(of.picture)
            yield of


def _pairs(subtask: str, seed: int) -> Iterator[tuple[Scene, YesNo]]:
    for of in _scenes(seed):
        for pair in yes_no(of):
            if pair.subtask == subtask:
                yield of, pair


def write_preferences(folder: Path | str, n: int = 200, seed: int = 42, size: int = 64) -> Path:
    """Write `n` pairs of descriptions, one true and one with a planted error, with VL-RewardBench's fields.

    `test.jsonl` has one row a line; `image` is a path below the folder. The true one stands first or second
    by lot, and `human_ranking` is [0, 1] where the first is the better one. By their ids the rows belong to
    its category hallucination.
    """
    folder = Path(folder)
    with _folder(folder, {"data": "preferences", "n": n, "seed": seed, "size": size}) as making:
        if making is not None:
            rows = []
            fair = ((of, pair) for of in _scenes(seed) if (pair := preference(of)) is not None)
            for number, (of, pair) in zip(range(n), fair, strict=False):
                row = _row(number, of, pair)
                making.write_image(_png(of, size), row["image"])
                rows.append(json.dumps(row) + "\n")
            making.write_text("".join(rows), "test.jsonl")
    return folder


def _row(number: int, of: Scene, pair: Preference) -> dict[str, Any]:
    first = of.lot("order").randrange(2)  # the place of the true description
    name = f"hallucination_pair-{number}"
    return {
        "id": name,
        "query": pair.query,
        "image": f"images/{name}.png",
        "response": [pair.good, pair.bad] if first == 0 else [pair.bad, pair.good],
        "human_ranking": [0, 1] if first == 0 else [1, 0],
        "models": ["icons", "icons"],
        "judge": "icons",
        "rationale": f"planted error: {pair.error}",
        "query_source": "icons",
        "ground_truth": pair.good,
    }
