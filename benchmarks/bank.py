"""What a bank is timed at: steps of training, and ranking."""

from collections.abc import Sequence

from blipfit.data.encoded_split import EncodedSplit
from blipfit.evaluation import ranking
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe
from blipfit.training import plan
from blipfit.training.step import Stepper


def train(
    backbone: Backbone,
    recipes: Sequence[Recipe],
    encoded_split: EncodedSplit,
    image_features: ImageFeatures,
    steps: int,
) -> None:
    """So many steps of all recipes at once, from installing the bank to taking it out."""
    training = recipes[0].training
    batches = plan.effective_batches(encoded_split.lengths, training, 0)[:steps]
    stepper = Stepper(backbone, recipes, encoded_split.encoded)
    stepper.train_mode()
    try:
        for number, batch in enumerate(batches):
            micros = plan.micro_batches(batch, training)
            seen = [image_features.features([encoded_split.questions[i] for i in micro]) for micro in micros]
            losses, _ = stepper.step(batch, seen, 0, number)
        losses.tolist()
    finally:
        stepper.remove()
        backbone.hf.eval()


def rank(
    backbone: Backbone, recipes: Sequence[Recipe], encoded_split: EncodedSplit, image_features: ImageFeatures
) -> None:
    """All questions judged for all recipes at once."""
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
