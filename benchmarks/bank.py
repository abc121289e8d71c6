"""The two actions of a bank that benchmarks time: training steps and ranking."""

from collections.abc import Sequence

from blipfit.data.encoded_split import EncodedSplit
from blipfit.evaluation import ranking
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe
from blipfit.training import batch_order
from blipfit.training.step import Stepper


def train(
    backbone: Backbone,
    recipes: Sequence[Recipe],
    encoded_split: EncodedSplit,
    image_features: ImageFeatures,
    steps: int,
) -> None:
    """Train all recipes together for `steps` steps, including installing and removing the bank."""
    training = recipes[0].training
    batches = batch_order.effective_batches(encoded_split.lengths, training, 0)[:steps]
    stepper = Stepper(backbone, recipes, encoded_split.encoded)
    stepper.train_mode()
    try:
        for step, batch in enumerate(batches):
            micros = batch_order.micro_batches(batch, training)
            features = [image_features.features([encoded_split.questions[i] for i in micro]) for micro in micros]
            losses, _ = stepper.step(batch, features, 0, step)
        losses.tolist()
    finally:
        stepper.remove()
        backbone.hf.eval()


def rank(
    backbone: Backbone, recipes: Sequence[Recipe], encoded_split: EncodedSplit, image_features: ImageFeatures
) -> None:
    """Rank all questions for all recipes together, including installing and removing the bank."""
    stepper = Stepper(backbone, recipes, encoded_split.encoded)
    try:
        ranking.rank(
            backbone,
            encoded_split.encoded,
            lambda rows: image_features.features([encoded_split.questions[i] for i in rows]),
            16,
        )
    finally:
        stepper.remove()
