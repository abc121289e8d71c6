"""IconQA (Lu et al., 2021; CC BY-NC-SA 4.0): the questions whose choices are text (`choose_txt`).

The annotation files are equal, byte by byte, to those of the published experiments
(github.com/AttentionX/InstructBLIP_PEFT), so a folder prepared for one can be loaded by the other.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from blipfit.data import annotations
from blipfit.data.question import SPLITS, Question
from blipfit.data.write_prepared import PrepareReport, Source, check_images, output_folder
from blipfit.errors import UserError

ARCHIVE = "https://iconqa2021.s3.us-west-1.amazonaws.com/iconqa_data.zip"
PUBLISHED = {"train": 18946, "val": 6316, "test": 6316}
KIND = "choose_txt"
TAG_NAMES = ("grade", "label")


def prepare(source: str | Path, to: Path, *, allow_outside: bool = False) -> PrepareReport:
    """Write `annotations/{split}.json` and the images `{split}/choose_txt/{id}/image.png`.

    `source` is the unpacked official archive: `problems.json` beside the folders of the splits, or beside the folder
    `iconqa` that contains them. Images outside of it need `allow_outside` and are copied. Raises UserError if the
    source is incomplete or damaged, or `to` cannot be written.
    """
    if str(source) == "hub":
        raise UserError(
            "the hub does not have IconQA as the experiments use it (lmms-lab/ICON-QA lacks the train split); "
            f"unpack {ARCHIVE} and give its folder with --from"
        )
    root = _root(Path(source))
    problems, left_out = _read_problems(root / "problems.json")
    images = {
        _image_name(split, pid): _find_image(root, split, pid, f"{root}: problem {pid}", f"unpack {ARCHIVE} again")
        for split, entries in problems.items()
        for pid in (entry["id"] for entry in entries)
    }
    allowed = Source(Path(source), allow_outside)
    check_images(images.values(), allowed)
    with output_folder(to, ("annotations", *SPLITS), allowed) as out:
        out.require_space(images.values())
        for name, image in images.items():
            out.add_image(image, name)
        for split, entries in problems.items():
            out.write_json(entries, f"annotations/{split}.json", ensure_ascii=False, indent=4)
    counts = {split: len(entries) for split, entries in problems.items()}
    return PrepareReport("iconqa", to, counts, left_out, out.image_counts, PUBLISHED)


def load(folder: Path, split: str) -> list[Question]:
    """Load one split of a prepared folder, or of a folder prepared for the published experiments.

    Raises UserError if the folder is not prepared, an entry or its image is missing or invalid, or an id occurs twice.
    """
    file = folder / "annotations" / f"{split}.json"
    if not file.is_file():
        raise UserError(
            f"{folder} is not a prepared IconQA folder (annotations/{file.name} is missing); "
            f"run `blipfit prepare iconqa --from DIR --to {folder}`"
        )
    entries = annotations.require_list(annotations.read_json(file), str(file))
    questions = [_question(entry, f"{file}: entry {n}", folder, split) for n, entry in enumerate(entries, start=1)]
    entry_by_id: dict[str, int] = {}
    for number, question in enumerate(questions, start=1):
        if (first := entry_by_id.setdefault(question.id, number)) != number:
            raise UserError(f"{file}: entries {first} and {number} both have id {question.id}; remove one of them")
    return questions


def _root(source: Path) -> Path:
    for root in (source, source / "iconqa_data", source / "iconqa"):
        if (root / "problems.json").is_file():
            return root
    raise UserError(
        f"{source} is not an IconQA folder (problems.json is missing); unpack {ARCHIVE} and give its folder"
    )


def _read_problems(file: Path) -> tuple[dict[str, list[dict[str, Any]]], Counter[str]]:
    """Return the `choose_txt` problems by split, each with `id` as its last field, and counts of the other types."""
    problems: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    left_out: Counter[str] = Counter()
    for pid, problem in annotations.require_object(annotations.read_json(file), str(file)).items():
        location = f"{file}: problem {pid}"
        record = annotations.require_object(problem, location)
        if record.get("ques_type") != KIND:
            left_out[f"of type {record.get('ques_type')}"] += 1
            continue
        split = record.get("split")
        if split not in SPLITS:
            raise UserError(f"{location}: 'split' is {split!r}, which is none of {', '.join(SPLITS)}")
        _require_choices(record, location)
        problems[split].append(record | {"id": pid})
    if not any(problems.values()):
        raise UserError(f"{file} has no problem of type {KIND}; give the folder of the unpacked {ARCHIVE}")
    return problems, left_out


def _require_choices(record: dict[str, Any], location: str) -> tuple[tuple[str, ...], int]:
    """Check the question of a record; return its choices and the index of the answer."""
    annotations.require_text(record, "question", location)
    choices = annotations.require_choices(record, location)
    return choices, annotations.require_answer_index(record, choices, location)


def _question(entry: Any, location: str, folder: Path, split: str) -> Question:
    record = annotations.require_object(entry, location)
    choices, answer_index = _require_choices(record, location)
    if "id" not in record:
        raise UserError(f"{location}: 'id' is missing")
    pid = str(record["id"])
    return Question(
        id=pid,
        image=_find_image(folder, split, pid, location, "put the images into the folder, or prepare it again"),
        question=record["question"],
        answer=choices[answer_index],
        choices=choices,
        answer_index=answer_index,
        tags={name: str(record[name]) for name in TAG_NAMES if record.get(name)},
        transparency="dropped",
    )


def _image_name(split: str, pid: str) -> str:
    return f"{split}/{KIND}/{pid}/image.png"


def _find_image(root: Path, split: str, pid: str, location: str, fix: str) -> Path:
    # The archive has its images one folder deeper, in `iconqa`, than the published experiments.
    name = _image_name(split, pid)
    return annotations.find_image([root / name, root / "iconqa" / name], location, fix)
