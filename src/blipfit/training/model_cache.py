"""What several banks of a sweep share: the loaded model, the encoded questions, and the image features."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from blipfit.data import encoded_split
from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.question import SPLITS
from blipfit.errors import UserError
from blipfit.methods import PEFT
from blipfit.model import loading
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import ModelConfig, Recipe
from blipfit.runtime import distributed, sharding


class ModelCache:
    """Holds the latest model; its splits and feature stores are loaded once."""

    def __init__(
        self,
        device: torch.device | str | None = None,
        store: Path | None = None,
    ):
        self.device = torch.device(device) if device else distributed.device()
        self.store = store
        self._backbone: tuple[Any, Backbone] | None = None
        self._splits: dict[Any, dict[str, EncodedSplit]] = {}
        self._image_features: dict[str, tuple[ImageFeatures, ImageFeatures]] = {}

    def backbone(self, recipe: Recipe) -> Backbone:
        """The recipe's model, loaded if it is not the latest one. Raises UserError if it cannot be loaded."""
        training = recipe.training
        lengths = training.max_text_tokens, training.max_target_tokens
        is_sharded = recipe.performance.shard_language_model and distributed.process_count() > 1
        key = (recipe.model, training.precision, *lengths, is_sharded)
        if self._backbone is None or self._backbone[0] != key:
            self._backbone = None  # frees the old model before the new one is loaded
            self._splits.clear()
            self._image_features.clear()
            arguments = (recipe.model, training.precision, self.device, *lengths)
            self._backbone = (key, load_sharded(*arguments) if is_sharded else loading.load(*arguments))
        return self._backbone[1]

    def splits(self, recipe: Recipe, data: Path) -> dict[str, EncodedSplit]:
        """All splits of the recipe's data set, encoded for its model. Raises UserError if the data cannot be read."""
        backbone = self.backbone(recipe)
        key = (recipe.data.name, recipe.data.prompt, recipe.data.limit, data)
        if key not in self._splits:
            self._splits[key] = {split: encoded_split.load(backbone.text, recipe.data, data, split) for split in SPLITS}
        return self._splits[key]

    def image_features(self, recipe: Recipe) -> tuple[ImageFeatures, ImageFeatures]:
        """Sources of the features for training and for evaluation."""
        backbone, mode = self.backbone(recipe), recipe.data.images
        if mode not in self._image_features:
            evaluation = ImageFeatures.for_evaluation(backbone, mode, self.store)
            training = ImageFeatures.from_backbone(backbone, mode) if mode == "shared" else evaluation
            self._image_features[mode] = (training, evaluation)
        return self._image_features[mode]


def load_sharded(model: ModelConfig, precision: str, device: torch.device, max_text: int, max_target: int) -> Backbone:
    """Load a model with its language model distributed over all processes, which must all call this.

    The processes of a machine load one after the other, so that its memory holds the whole model once, and the GPU
    never does. Raises UserError as `loading.load`.
    """
    mesh = sharding.create_mesh(device)
    with distributed.in_turn():
        return loading.load(model, precision, device, max_text, max_target, partial(sharding.shard_layers, mesh=mesh))


def refuse_conflicting_settings(recipe: Recipe) -> None:
    """Raise UserError if two of the recipe's settings cannot be used together, alone or with several processes."""
    performance, adapter, teacher = recipe.performance, recipe.adapter, recipe.distillation.teacher
    if performance.cuda_graphs and teacher and recipe.distillation.visual and distributed.process_count() > 1:
        raise UserError(
            f"{recipe.title}: with several processes, performance.cuda_graphs and distillation.visual exclude each "
            "other; leave out one, or start a single process"
        )
    obstacles = {
        "performance.cuda_graphs": performance.cuda_graphs,
        "model.quantization": recipe.model.quantization != "none",
        "distillation.teacher": teacher is not None,
        f"{adapter.method} in adapter.llm": adapter.method in PEFT and bool(adapter.llm),
    }
    for obstacle, is_set in obstacles.items():
        if performance.shard_language_model and is_set:
            raise UserError(
                f"{recipe.title}: performance.shard_language_model and {obstacle} exclude each other; leave out one"
            )
