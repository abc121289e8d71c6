"""Write and load icons on disk: IconQA's official layout, MME's files and VL-RewardBench's rows.

Every folder is written completely or not at all. Its file `icons.json` records the settings: a second call with the
same settings leaves the folder as it is, and a call with other settings is refused.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from blipfit.data import annotations, write_prepared
from blipfit.data.icons.draw import draw
from blipfit.data.icons.questions import SceneQuestion, check_skills, iterate_questions
from blipfit.data.icons.scene import Scene, make_scene
from blipfit.data.icons.skills import HELD_OUT
from blipfit.data.icons.statements import SUBTASKS, Preference, YesNoPair, make_preference, make_yes_no_pairs
from blipfit.data.question import SPLITS, Question
from blipfit.data.write_prepared import OutputFolder, PrepareReport
from blipfit.errors import UserError

SETTINGS_FILE = "icons.json"
QUESTION_TYPE = "choose_txt"  # IconQA has three types of questions; icons have only this one
VERSION = 3  # increase it when the same seed no longer gives the same pictures and questions


def prepare(
    to: Path | str,
    train: int = 2000,
    val: int = 200,
    test: int = 500,
    seed: int = 42,
    skills: Iterable[str] | None = HELD_OUT,
    size: int = 64,
) -> PrepareReport:
    """Write a data set in IconQA's official layout, with annotations, into the folder `to`.

    `train`, `val` and `test` are the numbers of questions. `skills` are keys of `SKILLS`, which take turns; None
    stands for all. `size` is the side of the pictures in pixels. No pair of picture and question occurs twice, neither
    within a split nor across splits.

    The folder contains `problems.json`, `pid_splits.json`, `annotations/SPLIT.json` (a list of the records with their
    `id`) and `SPLIT/choose_txt/PID/` with `image.png` and `data.json`. The key `skill` of a record is not in IconQA.

    Raises ValueError if a skill is unknown, and UserError if `to` holds other files or other settings.
    """
    skill_names = check_skills(skills)
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    to = Path(to)
    settings = {"data": "icons", **counts, "seed": seed, "skills": list(skill_names), "size": size}
    with _open_output(to, settings) as folder:
        if folder is not None:
            _write_problems(folder, counts, _drop_repeated(iterate_questions(seed, skill_names)), size)
    images = folder.image_counts if folder is not None else Counter({"kept": sum(counts.values())})
    return PrepareReport("icons", to, counts, images=images)


def _write_problems(
    folder: OutputFolder, counts: Mapping[str, int], pairs: Iterator[tuple[Scene, SceneQuestion]], size: int
) -> None:
    """Write `counts[split]` of the pairs for every split, in order, in IconQA's official layout."""
    # A question has two files of one block each: a compressed picture takes at most 0.7 bytes per pixel.
    folder.require_space(file_sizes=[size * size * 3 // 4, 1] * sum(counts.values()))
    problems: dict[str, dict[str, Any]] = {}
    split_pids: dict[str, list[str]] = {split: [] for split in counts}
    for split, count in counts.items():
        for _ in range(count):
            scene, question = next(pairs)
            pid = str(len(problems) + 1)
            record = _make_record(question)
            folder.write_image(_encode_png(scene, size), f"{split}/{QUESTION_TYPE}/{pid}/image.png")
            folder.write_json(record, f"{split}/{QUESTION_TYPE}/{pid}/data.json", indent=2)
            problems[pid] = {**record, "split": split}
            split_pids[split].append(pid)
        annotations = [{"id": pid, **problems[pid]} for pid in split_pids[split]]
        folder.write_json(annotations, f"annotations/{split}.json", indent=2)
    folder.write_json(problems, "problems.json", indent=2)
    folder.write_json({f"{QUESTION_TYPE}_{split}": pids for split, pids in split_pids.items()}, "pid_splits.json")


def _encode_png(scene: Scene, size: int) -> bytes:
    buffer = BytesIO()
    draw(scene, size).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _make_record(question: SceneQuestion) -> dict[str, Any]:
    """Make a record with IconQA's field names; its school grade and topic (`label`) stay empty."""
    return {
        "question": question.question,
        "choices": list(question.choices),
        "answer": question.answer_index,
        "ques_type": QUESTION_TYPE,
        "grade": "",
        "label": "",
        "skill": question.skill,
    }


def _drop_repeated(pairs: Iterator[tuple[Scene, SceneQuestion]]) -> Iterator[tuple[Scene, SceneQuestion]]:
    """Yield every pair of picture and question text only the first time."""
    known_keys = set()
    for scene, question in pairs:
        key = (scene.picture_key, question.question)
        if key not in known_keys:
            known_keys.add(key)
            yield scene, question


@contextmanager
def _open_output(to: Path, settings: Mapping[str, Any]) -> Iterator[OutputFolder | None]:
    """Yield a temporary folder that becomes `to` at the end, or None if `to` was written with the same settings.

    Raises UserError if `to` was written with other settings or holds other files.
    """
    settings = {"version": VERSION, **settings}
    if (to / SETTINGS_FILE).is_file():
        previous = annotations.read_json(to / SETTINGS_FILE)
        if previous != settings:
            raise UserError(
                f"{to} was written with other settings ({previous}, now {settings}); delete it or choose another folder"
            )
        yield None
        return
    with write_prepared.output_folder(to, known_names=()) as folder:
        yield folder
        folder.write_json(settings, SETTINGS_FILE)


def load(folder: Path | str, split: str) -> list[Question]:
    """Load one split of a folder written by `prepare`, in order; every question has the tag `skill`.

    Raises UserError, with the name of the file and the record, if the split is unknown or if a file, a picture or a
    field is missing or invalid.
    """
    folder = Path(folder)
    if split not in SPLITS:
        raise UserError(f"unknown split '{split}' of {folder}; expected one of {', '.join(SPLITS)}")
    file = folder / "annotations" / f"{split}.json"
    records = annotations.require_list(annotations.read_json(file), str(file))
    return [_load_question(folder, split, record, f"{file}: record {i}") for i, record in enumerate(records)]


def _load_question(folder: Path, split: str, value: Any, where: str) -> Question:
    """Convert one record of an annotation file; `where` names the record in error messages."""
    record = annotations.require_object(value, where)
    pid = annotations.require_text(record, "id", where)
    choices = annotations.require_choices(record, where)
    index = annotations.require_answer_index(record, choices, where)
    file = folder / split / QUESTION_TYPE / pid / "image.png"
    image = annotations.find_image([file], where, f"delete {folder} and prepare it again")
    tags = {"skill": annotations.require_text(record, "skill", where)}
    text = annotations.require_text(record, "question", where)
    return Question(pid, image, text, choices[index], choices, index, tags=tags)


def write_mme(folder: Path | str, n: int = 50, seed: int = 42, size: int = 64) -> Path:
    """Write yes/no questions in MME's layout: `n` pictures with two questions each for every subtask.

    The subtasks are existence, count, position and color. `SUBTASK.txt` has lines `image \\t question \\t Yes|No`, two
    per picture, with the answer yes first; the pictures are `SUBTASK/NUMBER.png` with `size` pixels per side. No
    picture occurs twice in a subtask. The return value is `folder`.

    Raises UserError if `folder` holds other files or other settings.
    """
    folder = Path(folder)
    with _open_output(folder, {"data": "mme", "n": n, "seed": seed, "size": size}) as output:
        if output is not None:
            for subtask in SUBTASKS:
                lines = []
                for number, (scene, pair) in zip(range(n), _iterate_pairs(subtask, seed), strict=False):
                    name = f"{number:06d}.png"
                    output.write_image(_encode_png(scene, size), f"{subtask}/{name}")
                    lines += [f"{name}\t{pair.yes}\tYes\n", f"{name}\t{pair.no}\tNo\n"]
                output.write_text("".join(lines), f"{subtask}.txt")
    return folder


def _iterate_scenes(seed: int) -> Iterator[Scene]:
    """Yield the endless series of a seed without scenes whose picture occurred before."""
    known_keys, index = set(), 0
    while True:
        scene = make_scene(seed, index)
        index += 1
        if scene.picture_key not in known_keys:
            known_keys.add(scene.picture_key)
            yield scene


def _iterate_pairs(subtask: str, seed: int) -> Iterator[tuple[Scene, YesNoPair]]:
    """Yield the scenes of a seed that allow yes/no questions of a subtask, with these questions."""
    for scene in _iterate_scenes(seed):
        for pair in make_yes_no_pairs(scene):
            if pair.subtask == subtask:
                yield scene, pair


def write_preferences(folder: Path | str, n: int = 200, seed: int = 42, size: int = 64) -> Path:
    """Write `n` pairs of descriptions, one true and one with an error, with VL-RewardBench's fields.

    `test.jsonl` has one row per line; `image` is a path relative to the folder, and the pictures have `size` pixels per
    side. The order of the two descriptions is random; `human_ranking` is [0, 1] if the first is the better one. The
    ids of the rows put them into VL-RewardBench's category hallucination. The return value is `folder`.

    Raises UserError if `folder` holds other files or other settings.
    """
    folder = Path(folder)
    with _open_output(folder, {"data": "preferences", "n": n, "seed": seed, "size": size}) as output:
        if output is not None:
            lines = []
            pairs = ((scene, pair) for scene in _iterate_scenes(seed) if (pair := make_preference(scene)) is not None)
            for number, (scene, pair) in zip(range(n), pairs, strict=False):
                row = _make_row(number, scene, pair)
                output.write_image(_encode_png(scene, size), row["image"])
                lines.append(json.dumps(row) + "\n")
            output.write_text("".join(lines), "test.jsonl")
    return folder


def _make_row(number: int, scene: Scene, pair: Preference) -> dict[str, Any]:
    """Make a row of VL-RewardBench."""
    good_index = scene.make_rng("order").randrange(2)
    name = f"hallucination_pair-{number}"
    return {
        "id": name,
        "query": pair.query,
        "image": f"images/{name}.png",
        "response": [pair.good, pair.bad] if good_index == 0 else [pair.bad, pair.good],
        "human_ranking": [0, 1] if good_index == 0 else [1, 0],
        "models": ["icons", "icons"],
        "judge": "icons",
        "rationale": f"planted error: {pair.error}",
        "query_source": "icons",
        "ground_truth": pair.good,
    }
