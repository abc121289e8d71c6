"""The one training loop: a list of recipes in, finished run folders out. A single run is a list of one recipe."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from blipfit import data as blipfit_data
from blipfit import run_folder
from blipfit.adapters import open_model, peft_format
from blipfit.adapters.adalora import RankSchedule
from blipfit.adapters.bank import Bank
from blipfit.data import prompts
from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.image_hashes import digest_images
from blipfit.data.question import SPLITS, Question
from blipfit.errors import UserError
from blipfit.evaluation import evaluate_split
from blipfit.model import loading
from blipfit.model.backbone import fingerprint, head
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe
from blipfit.run_folder import Inputs, Run
from blipfit.runtime import cpu_memory, distributed, interruption
from blipfit.runtime.save_interval import SaveInterval
from blipfit.training import batch_order, disk_needs, distillation, events, write_result
from blipfit.training.bank_member import Member, group_into_banks, load_checkpoints, remove_unused_checkpoints
from blipfit.training.bank_session import BankSession, fail_run
from blipfit.training.events import Listener
from blipfit.training.model_cache import ModelCache, refuse_conflicting_settings


def train(
    recipes: Sequence[Recipe],
    data: Path,
    results: Path,
    *,
    device: str | torch.device | None = None,
    model_cache: ModelCache | None = None,
    listener: Listener = events.ignore,
    save_interval: SaveInterval | None = None,
) -> list[Run]:
    """Train, evaluate and record experiments; those that can share a bank do.

    Finished runs are skipped, interrupted ones continue. A `model_cache` shares its device, loaded model and features
    between several calls. `save_interval`: time or steps from one checkpoint within an epoch to the next, 5 minutes if
    None; it changes no result. Returns the runs in the recipes' order; a failed one has `failure.json` and no result.
    Raises UserError, before anything is trained, if the data, a model or a run folder cannot be used: a folder with
    another recipe's results above all.
    """
    runs = [Run.of(results, recipe) for recipe in recipes]
    if len({run.folder for run in runs}) < len(runs):
        raise UserError("two of the recipes have the same data set and experiment name; give each its own name")
    model_cache = model_cache or ModelCache(device)
    if not distributed.is_main():
        listener = events.ignore
    inputs = check_inputs(recipes, data)
    members = [Member(*member) for member in zip(runs, recipes, inputs, strict=True)]
    for member in members:
        member.run.refuse_other(member.recipe, member.inputs)
    unfinished = [member.recipe for member in members if member.run.state() != "finished"]
    folders = {recipe.data.name: data for recipe in unfinished}
    disk_needs.require_space(disk_needs.group_recipes(unfinished), folders, results)
    with run_folder.lock_all([run for run in runs if distributed.is_main() and run.state() != "finished"]):
        _train_members(members, model_cache, data, listener, save_interval or SaveInterval())
    cpu_memory.release_freed_memory()
    return runs


def _train_members(
    members: Sequence[Member], model_cache: ModelCache, data: Path, listener: Listener, save_interval: SaveInterval
) -> None:
    """Claim the folders of all members that are not finished, and train them."""
    unfinished: list[Member] = []
    for member in members:
        with distributed.main_first():
            state = member.run.claim(member.recipe, member.inputs)
        if state == "finished":
            listener(events.RunSkipped(member.run, member.recipe, open_model.describe_adapter_problem(member.run)))
            continue
        member.run.failure_file.unlink(missing_ok=True)
        unfinished.append(member)
    load_checkpoints(unfinished, lambda file, used: listener(events.CheckpointDamaged(file, used)))
    distributed.wait()
    if distributed.is_main():
        remove_unused_checkpoints(unfinished)
    with tempfile.TemporaryDirectory() as scratch:
        if not distributed.is_main():  # the other processes do the same work, and write it where nobody reads it
            unfinished = [
                dataclasses.replace(member, run=Run.of(Path(scratch), member.recipe).create()) for member in unfinished
            ]
        for bank in group_into_banks(unfinished):
            _train_bank(model_cache, bank, data, listener, save_interval)
        distributed.wait()


def check_inputs(recipes: Sequence[Recipe], data: Path) -> list[Inputs]:
    """Check data, models and teachers before a run folder is claimed or a model loaded.

    Returns what each recipe is trained and evaluated with; for that, images, weights and adapters are read and hashed.
    Raises UserError if something is missing, damaged or does not fit the recipe.
    """
    splits_by_limit: dict[tuple[str, int | None], dict[str, list[Question]]] = {}
    for recipe in recipes:
        key = (recipe.data.name, recipe.data.limit)
        if key not in splits_by_limit:
            splits_by_limit[key] = {
                split: blipfit_data.load(recipe.data.name, data, split, recipe.data.limit) for split in SPLITS
            }
        prompts.get_prompt(recipe.data.prompt)
        _check_questions(recipe, splits_by_limit[key])
        refuse_conflicting_settings(recipe)
    for model in {recipe.model for recipe in recipes}:
        loading.locate_checkpoint(model)
    names = {name for recipe in recipes if (name := recipe.distillation.teacher) is not None}
    teachers = {name: distillation.identify_teacher(name) for name in names}
    inputs = {key: _identify_data(splits) for key, splits in splits_by_limit.items()}
    return [
        dataclasses.replace(
            inputs[recipe.data.name, recipe.data.limit],
            base_sha256=loading.base_sha256(recipe.model),
            teacher=teachers.get(recipe.distillation.teacher or ""),
        )
        for recipe in recipes
    ]


def _identify_data(splits: Mapping[str, Sequence[Question]]) -> Inputs:
    return Inputs(
        blipfit_data.fingerprint(splits.values()),
        questions={split: blipfit_data.fingerprint([questions]) for split, questions in splits.items()},
        images={split: digest_images(questions) for split, questions in splits.items()},
    )


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
    evaluate_split.check_evaluation(recipe.evaluation, recipe.data.name, questions)


def _build_features(image_features: ImageFeatures, encoded_split: EncodedSplit, listener: Listener) -> None:
    """Fill the feature store, reporting first how much that is."""
    images = 0

    def advance(count: int) -> None:
        nonlocal images
        images += count
        listener(events.FeaturesBuilding(images=images))

    image_features.announce = lambda sentence: listener(events.FeaturesBuilding(message=sentence))
    image_features.prepare(encoded_split.questions, advance)


def _train_bank(
    model_cache: ModelCache, members: Sequence[Member], data: Path, listener: Listener, save_interval: SaveInterval
) -> None:
    recipe = members[0].recipe
    backbone = model_cache.backbone(recipe)
    head_before = fingerprint(head(backbone.hf))
    for member in members:
        # Hashed now, because the files may change before the result is written.
        if backbone.base_sha256 != member.inputs.base_sha256:  # they were downloaded only now
            member.inputs = dataclasses.replace(member.inputs, base_sha256=backbone.base_sha256)
            member.run.claim(member.recipe, member.inputs)
    splits = model_cache.splits(recipe, data)
    training_features, evaluation_features = model_cache.image_features(recipe)
    sources = (training_features, evaluation_features, evaluation_features)
    disk_needs.require_feature_space(sources, [splits[split] for split in SPLITS], members)
    for split, source in zip(SPLITS, sources, strict=True):
        with distributed.first_on_machine():  # machines have their own stores, or share one and its work
            _build_features(source, splits[split], listener)
    features = (training_features, evaluation_features)
    session = None
    try:
        session = BankSession(backbone, members, splits, features, listener, save_interval)
        with interruption.deferred():
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
    with interruption.deferred():
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
        partial = session.open_partial_scores(finished)
        evaluations = {
            split: evaluate_split.evaluate_split(
                backbone, session.splits[split], features, config, partial.section(split)
            )
            for split in ("val", "test")
        }
        partial.save()  # a kill between two results must not leave the others to be evaluated in a smaller bank
    finally:
        bank.remove()
    for k, experiment in enumerate(finished):
        own_evaluations = {split: evaluations[split][k] for split in evaluations}
        if failed := [(split, e.non_finite_question) for split, e in own_evaluations.items() if not e.finite]:
            split, question_id = failed[0]
            subject = f"scores in the evaluation of {split}, first in question {question_id}"
            fail_run(experiment.run, experiment.recipe, subject, session.listener)
            continue
        result = write_result.write(
            experiment, backbone, session.splits, own_evaluations, head_hash, session.text_counts
        )
        session.listener(events.RunFinished(experiment.run, experiment.recipe, result))
