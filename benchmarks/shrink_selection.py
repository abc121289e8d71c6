"""Compares rules for shrinking a miniature's Q-Former, before any training: `python -m benchmarks.shrink_selection`.

Every size is selected by every importance rule, with and without least-squares repair, and evaluated on new pictures
and the skills of pre-training.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from blipfit import data as blipfit_data
from blipfit.compression import importance
from blipfit.compression.calibration import Calibration, sample_questions
from blipfit.compression.importance import Scores
from blipfit.compression.qformer_size import Size, reduce_size, resize_config
from blipfit.compression.shrink import make_backbone, shrink_by_scores
from blipfit.data import icons
from blipfit.evaluation import retention_vs_original
from blipfit.evaluation.evaluation_task import Settings, load_task
from blipfit.evaluation.retention_vs_original import SampleScores
from blipfit.model import cost, loading, shapes
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import ModelConfig

SIZES: dict[str, dict[str, int]] = {
    "64 wide, 2 heads, 128 units": {"hidden": 64, "heads": 2, "intermediate": 128},
    "96 wide, 3 heads, 128 units": {"hidden": 96, "heads": 3, "intermediate": 128},
    "3 of 4 layers": {"layers": 3},
    "8 of 16 queries": {"queries": 8},
    "64 of 256 units": {"intermediate": 64},
    "2 of 4 heads' width": {"hidden": 96, "heads": 4},
}
RANDOM_SEEDS = 3


def run(model: str = "tiny-t5", questions: int = 400) -> dict[str, Any]:
    """Measure every size, rule and repair; writes and returns accuracy, mean loss and lost variance."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "icons"
        icons.prepare(data, train=512, val=200, test=questions, seed=77, skills=icons.PRETRAINED)
        backbone = loading.load(ModelConfig(name=model))
        comparison = _Comparison(backbone, data)
        results: dict[str, Any] = {
            "model": Path(model).name,
            "chance": comparison.chance,
            "original": comparison.evaluate(backbone),
            "sizes": {},
        }
        print(f"{model}: {results['original']}")
        for name, sizes in SIZES.items():
            results["sizes"][name] = comparison.compare_rules(name, sizes)
    measure.write_results(f"shrink-selection-{Path(model).name}", results)
    return results


class _Comparison:
    """The original model, with its calibration questions and its evaluation task."""

    def __init__(self, backbone: Backbone, folder: Path):
        self.backbone = backbone
        self.image_features = ImageFeatures.from_backbone(backbone, "off")
        samples = sample_questions(blipfit_data.load("icons", folder, "train"), 256)
        self.calibration = Calibration.from_questions(backbone, samples, "iconqa-v1", self.image_features)
        self.validation = Calibration.from_questions(
            backbone, blipfit_data.load("icons", folder, "val"), "iconqa-v1", self.image_features
        )
        self.task = load_task(backbone, "icons", folder)
        self.task_features = self.image_features.features(self.task.encoded_split.questions)
        self.rows = {question.id: row for row, question in enumerate(self.task.encoded_split.questions)}
        self.chance = retention_vs_original.summarize(self.score(backbone))["chance"]

    def scores_by_rule(self) -> dict[str, list[Scores]]:
        hf = self.backbone.hf
        measured: dict[str, list[Scores]] = {
            method: [importance.measure(self.backbone, method, self.calibration)] for method in importance.METHODS
        }
        return {
            **measured,
            "random": [importance.random_scores(hf, seed) for seed in range(RANDOM_SEEDS)],
            "first": [importance.slicing_scores(hf)],
        }

    def compare_rules(self, name: str, sizes: dict[str, int]) -> dict[str, Any]:
        size = reduce_size(self.backbone.hf.config, **sizes)
        before = self.backbone.hf
        after = shapes.from_config(resize_config(before.config, size))
        shares = {
            "parameters": cost.qformer_parameters(after) / cost.qformer_parameters(before),
            "flops": cost.query(after.config, 40) / cost.query(before.config, 40),
        }
        print(f"{name}: {100 * shares['parameters']:.0f} % of parameters, {100 * shares['flops']:.0f} % of FLOPs")
        rows: dict[str, Any] = {}
        for rule, scores in self.scores_by_rule().items():
            for kind, calibration in (("plain", None), ("repaired", self.calibration)):
                results = [self.shrink(size, unit_scores, calibration, rule) for unit_scores in scores]
                rows.setdefault(rule, {})[kind] = {
                    key: sum(result[key] for result in results) / len(results) for key in results[0]
                }
            text = "   ".join(f"{k} {v['accuracy']:5.1f} % loss {v['loss']:.3f}" for k, v in rows[rule].items())
            print(f"  {rule:10} {text}", flush=True)
        return {"size": sizes, "shares": shares, "rules": rows}

    def shrink(self, size: Size, scores: Scores, calibration: Calibration | None, rule: str) -> dict[str, float]:
        small, record = shrink_by_scores(self.backbone, size, scores, calibration, rule)
        result = self.evaluate(make_backbone(self.backbone, small))
        return result | ({"lost": record["lost"]["after"]} if record["lost"] else {})

    @torch.no_grad()
    def evaluate(self, backbone: Backbone) -> dict[str, float]:
        right = self.score(backbone).scores
        losses = [
            (backbone.losses(backbone.query(features, batch), batch), len(batch.labels_N))
            for features, batch in self.validation
        ]
        loss = sum(float(total) for total, _ in losses) / sum(count for _, count in losses)
        return {"accuracy": 100 * sum(right) / len(right), "loss": loss}

    def score(self, backbone: Backbone) -> SampleScores:
        return retention_vs_original.score_task(backbone, self.task, self.features, Settings(batch_size=32))

    def features(self, questions: Any) -> torch.Tensor:
        """Look up the image features, which are the same for all sizes because the vision tower is."""
        return self.task_features[[self.rows[question.id] for question in questions]]


if __name__ == "__main__":
    import sys

    run(sys.argv[1] if len(sys.argv) > 1 else "tiny-t5")
