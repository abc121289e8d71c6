"""Compare the questions and images of an evaluation with those that a run was trained and evaluated on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blipfit import data as blipfit_data
from blipfit.data.image_hashes import digest_images
from blipfit.data.question import SPLITS, Question
from blipfit.run_folder import Run


def describe_changes(run: Run, split: str, questions: Sequence[Question], folder: Path) -> list[str]:
    """Return a sentence if a split of the run's own data set has other questions, or other images, than it had for the
    run; empty if both are equal or the run did not record them.

    `questions`: those of the split in `folder`, up to the recipe's limit. Raises UserError if an image is unreadable.
    """
    recorded = run.inputs() or {}
    digest = recorded.get("questions", {}).get(split)
    if digest is not None and digest != blipfit_data.fingerprint([questions]):
        return [f"the questions of split {split} in {folder} are not those that {run.folder} was made with"]
    return _describe_images(run, recorded, split, questions, folder)


def describe_changed_images(run: Run, name: str, split: str, folder: Path) -> list[str]:
    """Return a sentence if the data set in `folder` is the run's own and has other images under the same names.

    Empty also if its questions are others, because it is then simply other data. Raises UserError if the data set
    cannot be read.
    """
    recorded, config = run.inputs() or {}, run.recipe().data
    if config.name != name or split not in SPLITS or not recorded.get("images"):
        return []
    questions = blipfit_data.load(name, folder, split, config.limit)
    if recorded.get("questions", {}).get(split) != blipfit_data.fingerprint([questions]):
        return []
    return _describe_images(run, recorded, split, questions, folder)


def _describe_images(
    run: Run, recorded: Mapping[str, Any], split: str, questions: Sequence[Question], folder: Path
) -> list[str]:
    digest = (recorded.get("images") or {}).get(split)
    if digest is None or digest == digest_images(questions):
        return []
    return [
        f"the images of split {split} in {folder} are not those that {run.folder} was made with, although their names "
        "and questions are; the results are those of other images"
    ]
