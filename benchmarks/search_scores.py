"""Compares scores for searching pictures by a text: `python -m benchmarks.search_scores`.

For every kind of icon that enough pictures show, generated pictures are ordered by each score. It prints and writes
the precision of the first five pictures and the average precision, both as means over the kinds.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from blipfit.data import icons
from blipfit.data.prompts import PROMPTS, PromptedQuestion
from blipfit.inference import wordings
from blipfit.model import loading
from blipfit.model.backbone import Backbone
from blipfit.pretraining.pretrain_vision_tower import render_pixels
from blipfit.pretraining.texts import build_question
from blipfit.recipe import ModelConfig

PICTURES, TOP, MIN_MATCHES, BATCH = 200, 5, 5, 50
SEEDS = (11, 12)
CAPTION_PROMPT = PROMPTS["caption-v1"](build_question("", "")).prompt
KINDS = [f"{color} {shape}" for color in icons.COLORS for shape in icons.SHAPES]


def run() -> None:
    """Compare the scores with both miniatures; prints and writes the results."""
    record: dict[str, Any] = {"pictures": PICTURES, "top": TOP}
    for name in ("tiny-t5", "tiny-vicuna"):
        backbone = loading.load(ModelConfig(name=name))
        values: dict[str, list[tuple[float, float]]] = {}
        for seed in SEEDS:
            for label, pair in _compare_scores(backbone, seed):
                values.setdefault(label, []).append(pair)
        means = {
            label: [sum(column) / len(pairs) for column in zip(*pairs, strict=True)] for label, pairs in values.items()
        }
        record[name] = {"searches": len(values["caption, both"]), "precision_and_average_precision": means}
        for label, (precision, average) in means.items():
            print(f"{name:12} {label:28} {precision:.3f} / {average:.3f}", flush=True)
    measure.write_results("search-scores", record)


def _compare_scores(backbone: Backbone, seed: int) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield the name of each score with its precision and average precision, for every kind of icon."""
    scenes = [icons.make_scene(1000 + seed, index) for index in range(PICTURES)]
    kinds_by_picture = [{f"{icon.color} {icon.shape}" for icon in scene.icons} for scene in scenes]
    features = torch.cat(
        [backbone.see(render_pixels(scenes[start : start + BATCH])) for start in range(0, PICTURES, BATCH)]
    )

    def score(prompt: str, candidates: Sequence[str]) -> Tensor:
        return _score_candidates(backbone, features, PromptedQuestion(prompt, candidates[0], tuple(candidates)))

    all_kinds = score(CAPTION_PROMPT, [f"a {kind}" for kind in KINDS])
    for index, kind in enumerate(KINDS):
        relevant = torch.tensor([kind in kinds for kinds in kinds_by_picture])
        if relevant.sum() < MIN_MATCHES:
            continue
        for label, values in _compute_scores(kind, index, all_kinds, score).items():
            yield label, _compute_precisions(values, relevant)


def _compute_scores(
    kind: str, index: int, all_kinds: Tensor, score: Callable[[str, Sequence[str]], Tensor]
) -> dict[str, Tensor]:
    captions = score(CAPTION_PROMPT, wordings(kind))
    others = torch.cat([all_kinds[:, :index], all_kinds[:, index + 1 :]], dim=1)

    def yes_minus_no(question: str) -> Tensor:
        answers = score(f"{question} Please answer yes or no.", ["Yes", "No"])
        return answers[:, 0] - answers[:, 1]

    return {
        "caption without article": captions[:, 0],
        "caption with article": captions[:, 1],
        "caption, both": captions.logsumexp(1),
        "caption less mean of others": captions[:, 1] - others.mean(1),
        "is there one: yes - no": yes_minus_no(f"Is there a {kind} in the image?"),
        "does this figure show: yes - no": yes_minus_no(f"Does this figure show '{kind}'?"),
    }


@torch.no_grad()
def _score_candidates(backbone: Backbone, features: Tensor, task: PromptedQuestion) -> Tensor:
    scores = []
    for part in features.split(BATCH):
        batch = backbone.text.candidates(backbone.text.encode([task]) * len(part))
        scores.append(backbone.score_candidates(backbone.query(part, batch), batch).sums_KM[0].view(len(part), -1))
    return torch.cat(scores)


def _compute_precisions(values: Tensor, relevant: Tensor) -> tuple[float, float]:
    """Return the precision of the first TOP pictures, and the average precision."""
    ordered = relevant[values.argsort(descending=True)].float()
    precisions = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1)
    return float(ordered[:TOP].mean()), float((ordered * precisions).sum() / ordered.sum())


if __name__ == "__main__":
    run()
