"""Which score of a picture finds what a text names: `python -m benchmarks.search_scores`.

Drawn pictures are ordered by several scores for every kind of icon that enough of them show; told are the precision of
the first five and the average precision, means over kinds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from blipfit.data import icons
from blipfit.data.prompts import PROMPTS, Prompted
from blipfit.inference import wordings
from blipfit.model import loading
from blipfit.model.backbone import Backbone
from blipfit.pretraining.texts import as_question
from blipfit.pretraining.tower import pixels
from blipfit.recipe import ModelConfig

PICTURES, TOP, FEWEST, BATCH = 200, 5, 5, 50
SEEDS = (11, 12)
CAPTION = PROMPTS["caption-v1"](as_question("", "")).prompt
KINDS = [f"{color} {shape}" for color in icons.COLORS for shape in icons.SHAPES]


def run() -> None:
    record: dict[str, Any] = {"pictures": PICTURES, "top": TOP}
    for name in ("tiny-t5", "tiny-vicuna"):
        backbone = loading.load(ModelConfig(name=name))
        found: dict[str, list[tuple[float, float]]] = {}
        for seed in SEEDS:
            for label, pair in _compared(backbone, seed):
                found.setdefault(label, []).append(pair)
        means = {
            label: [sum(column) / len(pairs) for column in zip(*pairs, strict=True)] for label, pairs in found.items()
        }
        record[name] = {"searches": len(found["caption, both"]), "precision_and_average_precision": means}
        for label, (precision, average) in means.items():
            print(f"{name:12} {label:28} {precision:.3f} / {average:.3f}", flush=True)
    measure.keep("search-scores", record)


def _compared(backbone: Backbone, seed: int) -> Any:
    scenes = [icons.scene(1000 + seed, index) for index in range(PICTURES)]
    shown = [{f"{icon.color} {icon.shape}" for icon in scene.icons} for scene in scenes]
    features = torch.cat([backbone.see(pixels(scenes[at : at + BATCH])) for at in range(0, PICTURES, BATCH)])

    def score(prompt: str, candidates: Sequence[str]) -> Tensor:
        return _scores(backbone, features, Prompted(prompt, candidates[0], tuple(candidates)))

    every = score(CAPTION, [f"a {kind}" for kind in KINDS])
    for at, kind in enumerate(KINDS):
        right = torch.tensor([kind in there for there in shown])
        if right.sum() < FEWEST:
            continue
        for label, values in _ways(kind, at, every, score).items():
            yield label, _worth(values, right)


def _ways(kind: str, at: int, every: Tensor, score: Callable[[str, Sequence[str]], Tensor]) -> dict[str, Tensor]:
    both = score(CAPTION, wordings(kind))
    others = torch.cat([every[:, :at], every[:, at + 1 :]], dim=1)

    def yes(question: str) -> Tensor:
        told = score(f"{question} Please answer yes or no.", ["Yes", "No"])
        return told[:, 0] - told[:, 1]

    return {
        "caption without article": both[:, 0],
        "caption with article": both[:, 1],
        "caption, both": both.logsumexp(1),
        "caption less mean of others": both[:, 1] - others.mean(1),
        "is there one: yes - no": yes(f"Is there a {kind} in the image?"),
        "does this figure show: yes - no": yes(f"Does this figure show '{kind}'?"),
    }


@torch.no_grad()
def _scores(backbone: Backbone, features: Tensor, made: Prompted) -> Tensor:
    found = []
    for part in features.split(BATCH):
        batch = backbone.text.candidates(backbone.text.encode([made]) * len(part))
        found.append(backbone.score(backbone.query(part, batch), batch).sums_KM[0].view(len(part), -1))
    return torch.cat(found)


def _worth(values: Tensor, right: Tensor) -> tuple[float, float]:
    """Precision of the first TOP, and average precision."""
    ordered = right[values.argsort(descending=True)].float()
    precisions = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1)
    return float(ordered[:TOP].mean()), float((ordered * precisions).sum() / ordered.sum())


if __name__ == "__main__":
    run()
