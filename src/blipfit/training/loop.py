"""The one training loop: a list of recipes in, finished run folders out. A single run is a list of one recipe."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from blipfit import data as data_sets
from blipfit.adapters import peft_format
from blipfit.adapters.adalora import RankSchedule
from blipfit.adapters.bank import Bank
from blipfit.data import prompts
from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.question import SPLITS, Question
from blipfit.errors import UserError
from blipfit.evaluation import split_evaluation
from blipfit.model import loading
from blipfit.model.backbone import fingerprint, head
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe
from blipfit.run_folder import Run
from blipfit.runtime import cpu_memory, distributed
from blipfit.training import batch_order, distillation, events, record
from blipfit.training.bank_member import Member, group_into_banks
from blipfit.training.bank_session import BankSession, fail_run
from blipfit.training.events import Listener
from blipfit.training.model_cache import ModelCache


def train(
    recipes: Sequence[Recipe],
    data: Path,
    results: Path,
    *,
    device: str | torch.device | None = None,
    model_cache: ModelCache | None = None,
    listener: Listener = events.ignore,
) -> list[Run]:
    """Train, evaluate and record experiments; those that can share a bank do.

    Finished runs are skipped, interrupted ones continue. A `model_cache` shares its device, loaded model and features
    between several calls. Returns the runs in the recipes' order; a failed one has `failure.json` and no result.
    Raises UserError, before anything is trained, if the data, a model or a run folder cannot be used: a folder with
    another recipe's results above all.
    """
    runs = [Run.of(results, recipe) for recipe in recipes]
    if len({run.folder for run in runs}) < len(runs):
        raise UserError("two of the recipes have the same data set and experiment name; give each its own name")
    model_cache = model_cache or ModelCache(device)
    if not distributed.is_main():
        listener = events.ignore
    hashes = check_inputs(recipes, data)
    members = [Member(run, recipe, digest) for run, recipe, digest in zip(runs, recipes, hashes, strict=True)]
    for member in members:
        member.run.refuse_other(member.recipe, member.data_sha256)
    with ExitStack() as locks:
        for run in runs:
            if distributed.is_main() and run.state() != "finished":
                locks.enter_context(run.lock())
        _train_members(members, model_cache, data, listener)
    cpu_memory.release_freed_memory()
    return runs


def _train_members(members: Sequence[Member], model_cache: ModelCache, data: Path, listener: Listener) -> None:
    """Claim the folders of all members that are not finished, and train them."""
    base_sha256 = {model: loading.base_sha256(model) for model in {member.recipe.model for member in members}}
    unfinished: list[Member] = []
    for member in members:
        with distributed.main_first():
            state = member.run.claim(member.recipe, member.data_sha256, base_sha256[member.recipe.model])
        if state == "finished":
            listener(events.RunSkipped(member.run, member.recipe))
            continue
        member.run.failure_file.unlink(missing_ok=True)
        member.load_checkpoint()
        unfinished.append(member)
    distributed.wait()
    with tempfile.TemporaryDirectory() as scratch:
        if not distributed.is_main():  # the other processes do the same work, and write it where nobody reads it
            unfinished = [
                dataclasses.replace(member, run=Run.of(Path(scratch), member.recipe).create()) for member in unfinished
            ]
        for bank in group_into_banks(unfinished):
            _train_bank(model_cache, bank, data, listener)
        distributed.wait()


def check_inputs(recipes: Sequence[Recipe], data: Path) -> list[str]:
    """Check data, models and teachers before a run folder is claimed or a model loaded.

    Returns, for each recipe, the hash of the questions that it is trained and evaluated on. Raises UserError if
    something is missing, damaged or does not fit the recipe.
    """
    splits_by_limit: dict[tuple[str, int | None], dict[str, list[Question]]] = {}
    for recipe in recipes:
        key = (recipe.data.name, recipe.data.limit)
        if key not in splits_by_limit:
            splits_by_limit[key] = {
                split: data_sets.load(recipe.data.name, data, split, recipe.data.limit) for split in SPLITS
            }
        prompts.get_prompt(recipe.data.prompt)
        _check_questions(recipe, splits_by_limit[key])
    for model in {recipe.model for recipe in recipes}:
        loading.locate_checkpoint(model)
    for name in {recipe.distillation.teacher for recipe in recipes} - {None}:
        distillation.check_teacher(str(name))
    hashes = {key: data_sets.fingerprint(splits.values()) for key, splits in splits_by_limit.items()}
    return [hashes[recipe.data.name, recipe.data.limit] for recipe in recipes]


def _check_questions(recipe: Recipe, questions: Mapping[str, Sequence[Question]]) -> None:
    """UserError if the questions are fewer than one batch, or cannot be evaluated."""
    size, count = recipe.training.batch_size * recipe.training.accumulation, len(questions["train"])
    if recipe.training.batch_size < (processes := distributed.state().num_processes):
        raise UserError(f"{processes} processes cannot share batches of {recipe.training.batch_size}; launch fewer")
    if count < size:
        raise UserError(
            f"{count} training questions are fewer than one batch of {size}; lower it with --set training.batch_size=…"
        )
    if recipe.adapter.method == "adalora":
        RankSchedule.from_config(recipe.adapter, 1, batch_order.total_steps(count, recipe.training))
    split_evaluation.check_evaluation(recipe.evaluation, recipe.data.name, questions)


def _build_features(image_features: ImageFeatures, encoded_split: EncodedSplit, listener: Listener) -> None:
    """Fill the feature store, reporting first how much that is."""
    images = 0

    def advance(count: int) -> None:
        nonlocal images
        images += count
        listener(events.FeaturesBuilding(images=images))

    image_features.announce = lambda sentence: listener(events.FeaturesBuilding(message=sentence))
    image_features.prepare(encoded_split.questions, advance)


def _train_bank(model_cache: ModelCache, members: Sequence[Member], data: Path, listener: Listener) -> None:
    recipe = members[0].recipe
    backbone = model_cache.backbone(recipe)
    head_before = fingerprint(head(backbone.hf))
    _ = backbone.base_sha256  # hashed now, because the files may change before the result is written
    splits = model_cache.splits(recipe, data)
    training_features, evaluation_features = model_cache.image_features(recipe)
    for split, source in zip(SPLITS, (training_features, evaluation_features, evaluation_features), strict=True):
        with distributed.main_first():
            _build_features(source, splits[split], listener)
    session = None
    try:
        session = BankSession(backbone, members, splits, (training_features, evaluation_features), listener)
        session.run()
    except torch.OutOfMemoryError:
        raise UserError(
            f"{len(members)} experiments at once need more memory than {model_cache.device} has; train fewer together "
            "(`blipfit sweep --bank K`), or lower training.batch_size and raise training.accumulation"
        ) from None
    finally:
        if session is not None:
            session.release()
    if fingerprint(head(backbone.hf)) != head_before:
        raise AssertionError("the language model's head changed during training")
    _evaluate_finished(session, head_before)


def _evaluate_finished(session: BankSession, head_hash: str) -> None:
    """Evaluate the best epoch of all finished experiments on validation and test split, and write their results."""
    finished, backbone = session.finished, session.backbone
    if not finished:
        return
    bank = Bank(backbone, [experiment.recipe.adapter for experiment in finished], [0] * len(finished))
    try:
        for k, experiment in enumerate(finished):
            before = bank.state(k)
            bank.load_state(k, experiment.state)
            if not peft_format.changes(experiment.recipe.adapter, before, experiment.state):
                raise AssertionError(f"{experiment.recipe.title}: training changed nothing")  # our defect, never data
        config, features = finished[0].recipe.evaluation, session.evaluation_features.features
        evaluations = {
            split: split_evaluation.evaluate_split(backbone, session.splits[split], features, config)
            for split in ("val", "test")
        }
    finally:
        bank.remove()
    for k, experiment in enumerate(finished):
        own_evaluations = {split: evaluations[split][k] for split in evaluations}
        if failed := [(split, e.non_finite_question) for split, e in own_evaluations.items() if not e.finite]:
            split, question_id = failed[0]
            subject = f"scores in the evaluation of {split}, first in question {question_id}"
            fail_run(experiment.run, experiment.recipe, subject, session.listener)
            continue
        result = record.write(experiment, backbone, session.splits, own_evaluations, head_hash, session.texts)
        session.listener(events.RunFinished(experiment.run, experiment.recipe, result))
