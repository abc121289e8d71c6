"""What several banks of a sweep share: the loaded model, the encoded questions, and the image features."""

from pathlib import Path
from typing import Any

import torch

from blipfit.data import encoded_split
from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.question import SPLITS
from blipfit.model import loading
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe
from blipfit.runtime import distributed


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
        key = (recipe.model, training.precision, training.max_text_tokens, training.max_target_tokens)
        if self._backbone is None or self._backbone[0] != key:
            self._backbone = None  # frees the old model before the new one is loaded
            self._splits.clear()
            self._image_features.clear()
            loaded = loading.load(
                recipe.model, training.precision, self.device, training.max_text_tokens, training.max_target_tokens
            )
            self._backbone = (key, loaded)
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
