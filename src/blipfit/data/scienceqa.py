"""ScienceQA (Lu et al., 2022; CC BY-NC-SA 4.0): the problems that have an image.

The annotation files have the names, fields, order and bytes of those of the published experiments
(github.com/AttentionX/InstructBLIP_PEFT), so folders made for either load in both.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipfit.data import hub, records
from blipfit.data.images import decode_image
from blipfit.data.prepared import Folder, PrepareReport, check_images, folder
from blipfit.data.prompts import options
from blipfit.data.question import SPLITS, Question
from blipfit.errors import UserError

HUB_NAME = "derek-thomas/ScienceQA"
HUB_REVISION = "f18b0a70359ebfb41f658fd564208d0355b013f4"
PUBLISHED = {"train": 6218, "val": 2097, "test": 2017}
ANNOTATIONS = {split: f"scienceqa_{split}.json" for split in SPLITS}
FACTS = "scienceqa_facts.json"
FACT_NAMES = ("subject", "grade", "topic", "category", "skill")
IMAGE_ZIPS = "https://scienceqa.s3.us-west-1.amazonaws.com/images"


@dataclass(frozen=True, slots=True)
class Problem:
    """One entry of the data set; `where` names it in errors, the image is a file, its bytes or not there."""

    id: str
    split: str
    record: Mapping[str, Any]
    image: Path | bytes | None
    where: str


def prepare(source: str | Path, to: Path) -> PrepareReport:
    """Write `scienceqa_{split}.json`, the images and the facts that results are broken down by.

    `source` is `hub`, a folder of the official layout (`problems.json`, `pid_splits.json`,
    `images/SPLIT/PID/image.png`), or a download of the hub's parquet files.
    """
    if str(source) == "hub":
        return _write(_of_parquet(hub.download(HUB_NAME, HUB_REVISION)), to)
    source = Path(source)
    root = _official_root(source)
    if root is None and hub.is_download(source):
        return _write(_of_parquet(source), to)
    if root is None:
        raise UserError(
            f"{source} is no ScienceQA folder: it has neither problems.json with pid_splits.json nor "
            f"data/train-*.parquet; give the folder that holds them, or --from hub"
        )
    problems = list(_official(root))
    check_images(problem.image for problem in problems if isinstance(problem.image, Path))
    return _write(problems, to)


def load(folder: Path, split: str) -> list[Question]:
    """Read a prepared folder, or one made for the published experiments."""
    file = folder / ANNOTATIONS[split]
    if not file.is_file():
        raise UserError(
            f"{folder} is no prepared ScienceQA folder ({file.name} is missing); "
            f"run `blipfit prepare scienceqa --from DIR --to {folder}`"
        )
    facts = _facts(folder)
    entries = records.listed(records.read_json(file), str(file))
    return [_question(entry, f"{file}: entry {n}", folder, facts) for n, entry in enumerate(entries, start=1)]


def _official_root(source: Path) -> Path | None:
    for root in (source, source / "scienceqa", source / "data" / "scienceqa"):
        if (root / "problems.json").is_file() and (root / "pid_splits.json").is_file():
            return root
    return None


def _official(root: Path) -> Iterator[Problem]:
    file = root / "problems.json"
    problems = records.mapping(records.read_json(file), str(file))
    splits_file = root / "pid_splits.json"
    splits = records.mapping(records.read_json(splits_file), str(splits_file))
    for split in SPLITS:
        for pid in map(str, records.listed(splits.get(split), f"{splits_file}: {split}")):
            if pid not in problems:
                raise UserError(f"{splits_file}: {split} names problem {pid}, which {file} lacks")
            where = f"{file}: problem {pid}"
            record = records.mapping(problems[pid], where)
            image = None
            if record.get("image"):
                image = records.find_image(
                    [root / "images" / split / pid / "image.png", root / split / pid / "image.png"],
                    where,
                    f"unpack {IMAGE_ZIPS}/{split}.zip there",
                )
            yield Problem(pid, split, record, image, where)


def _of_parquet(download: Path) -> Iterator[Problem]:
    """Problems of the hub's data set, which has no problem numbers: named by split and row, from 0."""
    for split in SPLITS:
        for row, record in enumerate(hub.rows(download, split)):
            where = f"{download}: {split} row {row}"
            image = (records.mapping(record, where).get("image") or {}).get("bytes")
            if image is not None:
                decode_image(image, where)
            yield Problem(f"{split}-{row}", split, record, image, where)


def _write(problems: Iterable[Problem], to: Path) -> PrepareReport:
    annotations: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    facts: dict[str, dict[str, str]] = {}
    left_out: Counter[str] = Counter()
    with folder(to, ours=(*ANNOTATIONS.values(), "images")) as out:
        for problem in problems:
            if problem.image is None:
                left_out["without an image"] += 1
                continue
            annotations[problem.split].append(_annotation(problem))
            facts[problem.id] = _tags(problem.record)
            _place(out, problem.image, f"images/{problem.split}/{problem.id}/image.png")
        if not facts:
            raise UserError(f"nothing to prepare: none of {sum(left_out.values())} problems has an image")
        out.write_json(facts, FACTS)
        for split, entries in annotations.items():
            out.write_json(entries, ANNOTATIONS[split])
    counts = {split: len(entries) for split, entries in annotations.items()}
    return PrepareReport("scienceqa", to, counts, left_out, out.placed, PUBLISHED)


def _place(out: Folder, image: Path | bytes, name: str) -> None:
    if isinstance(image, Path):
        out.place(image, name)
    else:
        out.write_image(image, name)


def _annotation(problem: Problem) -> dict[str, Any]:
    """The published form; its image path starts at the folder ABOVE the annotations, named `scienceqa`."""
    record, where = problem.record, problem.where
    choices = records.choices(record, where)
    return {
        "image": f"scienceqa/images/{problem.split}/{problem.id}/image.png",
        "question": records.text(record, "question", where),
        "answer": options(choices)[records.index(record, choices, where)],
        "choices": choices,
        "context": records.text(record, "hint", where) + " " + records.text(record, "lecture", where),
        "question_id": problem.id,
    }


def _tags(record: Mapping[str, Any]) -> dict[str, str]:
    """The facts the official leaderboard splits by; its TXT column is the problems with a hint."""
    context = "text+image" if record.get("hint") else "image"
    return {name: str(record[name]) for name in FACT_NAMES if record.get(name)} | {"context": context}


def _facts(folder: Path) -> Mapping[str, Mapping[str, str]]:
    """Facts by problem: of `prepare`, else of the official file if it lies there, else none."""
    if (file := folder / FACTS).is_file():
        return records.mapping(records.read_json(file), str(file))
    if (file := folder / "problems.json").is_file():
        problems = records.mapping(records.read_json(file), str(file))
        return {pid: _tags(records.mapping(record, f"{file}: {pid}")) for pid, record in problems.items()}
    return {}


def _question(entry: Any, where: str, folder: Path, facts: Mapping[str, Mapping[str, str]]) -> Question:
    record = records.mapping(entry, where)
    choices = records.choices(record, where)
    answer = records.text(record, "answer", where)
    if answer not in options(choices):
        raise UserError(f"{where}: 'answer' is {answer!r}, which is none of {', '.join(options(choices))}")
    number = options(choices).index(answer)
    context = records.text(record, "context", where)
    if "question_id" not in record:
        raise UserError(f"{where}: 'question_id' is missing")
    pid = str(record["question_id"])
    return Question(
        id=pid,
        image=_find(records.text(record, "image", where), folder, where),
        question=records.text(record, "question", where),
        answer=choices[number],
        choices=choices,
        answer_index=number,
        context=context,
        # Without a hint the context, hint + blank + lecture, begins with the blank.
        tags=facts.get(pid) or {"context": "image" if context.startswith(" ") else "text+image"},
    )


def _find(image: str, folder: Path, where: str) -> Path:
    """Find an image by its annotated path, whatever folder that path was written for.

    Published files say `scienceqa/images/…` and mean the folder above their own; others hold absolute paths
    of another machine. The part from `images/` on is the same everywhere.
    """
    start = image.rfind("images/")
    tail = [folder / image[start:]] if start >= 0 else []
    tries = [*tail, folder / image, folder.parent / image]
    return records.find_image(tries, where, "put the images into the folder, or prepare it again")
