"""IconQA (Lu et al., 2021; CC BY-NC-SA 4.0): the questions whose choices are text (`choose_txt`).

The annotation files have the names, fields, order and bytes of those of the published experiments
(github.com/AttentionX/InstructBLIP_PEFT), so folders made for either load in both.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from blipfit.data import records
from blipfit.data.prepared import PrepareReport, check_images, folder
from blipfit.data.question import SPLITS, Question
from blipfit.errors import UserError

ARCHIVE = "https://iconqa2021.s3.us-west-1.amazonaws.com/iconqa_data.zip"
PUBLISHED = {"train": 18946, "val": 6316, "test": 6316}
KIND = "choose_txt"
TAG_NAMES = ("grade", "label")


def prepare(source: str | Path, to: Path) -> PrepareReport:
    """Write `annotations/{split}.json` and the images `{split}/choose_txt/{id}/image.png`.

    `source` is the unpacked official archive: `problems.json` beside the folders of the splits, or beside the
    folder `iconqa` that holds them.
    """
    if str(source) == "hub":
        raise UserError(
            "IconQA is not on the hub as the experiments use it (lmms-lab/ICON-QA lacks the train split); "
            f"unpack {ARCHIVE} and give its folder with --from"
        )
    root = _root(Path(source))
    wanted, left_out = _problems(root / "problems.json")
    images = {
        _place(split, pid): _find(root, split, pid, f"{root}: problem {pid}", f"unpack {ARCHIVE} again")
        for split, entries in wanted.items()
        for pid in (entry["id"] for entry in entries)
    }
    check_images(images.values())
    with folder(to, ours=("annotations", *SPLITS)) as out:
        for name, image in images.items():
            out.place(image, name)
        for split, entries in wanted.items():
            out.write_json(entries, f"annotations/{split}.json", ensure_ascii=False, indent=4)
    counts = {split: len(entries) for split, entries in wanted.items()}
    return PrepareReport("iconqa", to, counts, left_out, out.placed, PUBLISHED)


def load(folder: Path, split: str) -> list[Question]:
    """Read a prepared folder, or one made for the published experiments."""
    file = folder / "annotations" / f"{split}.json"
    if not file.is_file():
        raise UserError(
            f"{folder} is no prepared IconQA folder (annotations/{file.name} is missing); "
            f"run `blipfit prepare iconqa --from DIR --to {folder}`"
        )
    entries = records.listed(records.read_json(file), str(file))
    return [_question(entry, f"{file}: entry {n}", folder, split) for n, entry in enumerate(entries, start=1)]


def _root(source: Path) -> Path:
    for root in (source, source / "iconqa_data", source / "iconqa"):
        if (root / "problems.json").is_file():
            return root
    raise UserError(f"{source} is no IconQA folder (problems.json is missing); unpack {ARCHIVE} and give its folder")


def _problems(file: Path) -> tuple[dict[str, list[dict[str, Any]]], Counter[str]]:
    """Return the wanted records by split, each with its `id` added at the end, and the others' counts."""
    wanted: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    left_out: Counter[str] = Counter()
    for pid, problem in records.mapping(records.read_json(file), str(file)).items():
        where = f"{file}: problem {pid}"
        record = records.mapping(problem, where)
        if record.get("ques_type") != KIND:
            left_out[f"of type {record.get('ques_type')}"] += 1
            continue
        split = record.get("split")
        if split not in SPLITS:
            raise UserError(f"{where}: 'split' is {split!r}, which is none of {', '.join(SPLITS)}")
        _check(record, where)
        wanted[split].append(record | {"id": pid})
    if not any(wanted.values()):
        raise UserError(f"{file} has no problem of type {KIND}; give the folder of the unpacked {ARCHIVE}")
    return wanted, left_out


def _check(record: dict[str, Any], where: str) -> tuple[tuple[str, ...], int]:
    records.text(record, "question", where)
    choices = records.choices(record, where)
    return choices, records.index(record, choices, where)


def _question(entry: Any, where: str, folder: Path, split: str) -> Question:
    record = records.mapping(entry, where)
    choices, number = _check(record, where)
    if "id" not in record:
        raise UserError(f"{where}: 'id' is missing")
    pid = str(record["id"])
    return Question(
        id=pid,
        image=_find(folder, split, pid, where, "put the images into the folder, or prepare it again"),
        question=record["question"],
        answer=choices[number],
        choices=choices,
        answer_index=number,
        tags={name: str(record[name]) for name in TAG_NAMES if record.get(name)},
    )


def _place(split: str, pid: str) -> str:
    return f"{split}/{KIND}/{pid}/image.png"


def _find(root: Path, split: str, pid: str, where: str, mend: str) -> Path:
    # The archive has one more folder `iconqa` than the published experiments' folder.
    return records.find_image([root / _place(split, pid), root / "iconqa" / _place(split, pid)], where, mend)
