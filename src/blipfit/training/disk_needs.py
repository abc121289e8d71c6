"""The space on disk that training needs: checkpoints, results, and image features that are not stored yet."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from blipfit import data as blipfit_data
from blipfit import disk_space
from blipfit.adapters import parameter_counts
from blipfit.data import feature_store
from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.question import Question
from blipfit.evaluation.disk_needs import prediction_bytes
from blipfit.model import shapes
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import DataConfig, Recipe
from blipfit.run_folder import Run
from blipfit.training import checkpoint
from blipfit.training.bank_member import Member, bank_key

RECORD_BYTES = 64 * 1024
"""Recipe, log, result, hashes, the adapter's configuration and tensor names of one experiment."""
_VALUE_BYTES = 4  # fp32
_NUMBERS_PER_VALUE = {"adalora": 6}
_DEFAULT_NUMBERS_PER_VALUE = 4
"""What a checkpoint holds of each trained value: its current and best value, two moments; AdaLoRA's two importances."""


def group_recipes(recipes: Sequence[Recipe]) -> list[list[Recipe]]:
    """Group recipes into the largest banks that they can share."""
    banks: dict[object, list[Recipe]] = {}
    for recipe in recipes:
        banks.setdefault(bank_key(recipe), []).append(recipe)
    return list(banks.values())


def require_space(banks: Sequence[Sequence[Recipe]], data: Mapping[str, Path], results: Path) -> None:
    """Raise UserError if the disk of `results` has too little room to train these banks one after the other.

    `data`: folder of each data set. Checkpoints that are there already are part of what is needed.
    """
    recipes = [recipe for bank in banks for recipe in bank]
    if not recipes:
        return
    predictions = {
        config: prediction_bytes(_load_evaluated(config, data[config.name]))
        for config in {recipe.data for recipe in recipes}
    }
    values = _count_values(recipes)
    lasting = sum(_result_bytes(values[recipe.title]) + predictions[recipe.data] for recipe in recipes)
    # A bank's checkpoints and the scores of an unfinished evaluation are deleted before the next bank starts.
    temporary = max(
        sum(_checkpoint_bytes(recipe, values[recipe.title]) + predictions[recipe.data] for recipe in bank)
        for bank in banks
    )
    existing = sum(disk_space.folder_bytes(Run.of(results, recipe).checkpoint) for recipe in recipes)
    count = "1 experiment" if len(recipes) == 1 else f"{len(recipes)} experiments"
    disk_space.require_space(results, lasting + temporary - existing, f"checkpoints and results of {count}")


def require_feature_space(
    sources: Sequence[ImageFeatures], splits: Sequence[EncodedSplit], members: Sequence[Member]
) -> None:
    """Raise UserError if the disk of the feature store has too little room for the features that it lacks.

    `sources`: the image features of each split. Checkpoints on the same disk count too.
    """
    missing: dict[Path, set[str]] = {}
    for source, split in zip(sources, splits, strict=True):
        if source.store is not None:
            missing.setdefault(source.store.home, set()).update(source.missing(split.questions))
    stores = {source.store.home: source.store for source in sources if source.store is not None}
    for home, images in missing.items():
        if images:
            beside = [member for member in members if disk_space.is_same_disk(member.run.folder, home)]
            values = _count_values([member.recipe for member in beside])
            needed = feature_store.estimate_bytes(len(images), stores[home].spec.shape)
            needed += sum(
                _checkpoint_bytes(member.recipe, values[member.recipe.title])
                - disk_space.folder_bytes(member.run.checkpoint)
                for member in beside
            )
            contents = f"image features of {len(images)} images and the checkpoints beside them"
            disk_space.require_space(home, needed, contents)


def _load_evaluated(config: DataConfig, folder: Path) -> Iterable[Question]:
    """The questions whose predictions a run records."""
    return [q for split in ("val", "test") for q in blipfit_data.load(config.name, folder, split, config.limit)]


def _count_values(recipes: Sequence[Recipe]) -> dict[str, int]:
    """Return the number of values that each experiment trains, by title."""
    models = {name: (shapes.on_meta(name), shapes.family(name)) for name in {recipe.model.name for recipe in recipes}}
    return {
        recipe.title: sum(parameter_counts.trained_parameters(*models[recipe.model.name], recipe.adapter).values())
        for recipe in recipes
    }


def _checkpoint_bytes(recipe: Recipe, values: int) -> int:
    """Return the bytes of an experiment's checkpoints: those that are kept, while the next one is written."""
    numbers = _NUMBERS_PER_VALUE.get(recipe.adapter.method, _DEFAULT_NUMBERS_PER_VALUE)
    return (checkpoint.KEPT_SAVES + 1) * (numbers * _VALUE_BYTES * values + disk_space.BLOCK_BYTES)


def _result_bytes(values: int) -> int:
    """Return the bytes that an experiment leaves, without its predictions."""
    return _VALUE_BYTES * values + RECORD_BYTES
