"""What selecting by importance and least-squares repair are worth before any training, on a trained miniature.

Every size is cut by every rule, plain and repaired, and judged on fresh pictures of what the original can do.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from blipfit import data as datasets
from blipfit.compression import calibration, importance, shrink
from blipfit.compression import size as shrink_size
from blipfit.compression.importance import Scores
from blipfit.data import icons
from blipfit.evaluation import benchmarks, retention
from blipfit.evaluation.benchmarks import Settings
from blipfit.evaluation.retention import Answers
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
LOTS = 3


def run(model: str = "tiny-t5", questions: int = 400) -> dict[str, Any]:
    """Accuracy, mean loss and lost variance for every size, rule and both with and without repair."""
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder) / "icons"
        icons.prepare(known, train=512, val=200, test=questions, seed=77, skills=icons.PRETRAINED)
        backbone = loading.load(ModelConfig(name=model))
        bench = _Bench(backbone, known)
        found: dict[str, Any] = {
            "model": Path(model).name,
            "chance": bench.chance,
            "original": bench.judge(backbone),
            "sizes": {},
        }
        print(f"{model}: {found['original']}")
        for name, sizes in SIZES.items():
            found["sizes"][name] = bench.size(name, sizes)
    measure.keep(f"shrink-selection-{Path(model).name}", found)
    return found


class _Bench:
    def __init__(self, backbone: Backbone, folder: Path):
        self.backbone = backbone
        self.image_features = ImageFeatures.from_backbone(backbone, "off")
        drawn = calibration.draw(datasets.load("icons", folder, "train"), 256)
        self.questions = calibration.prepare(backbone, drawn, "iconqa-v1", self.image_features)
        self.unseen = calibration.prepare(
            backbone, datasets.load("icons", folder, "val"), "iconqa-v1", self.image_features
        )
        self.task = benchmarks.read(backbone, "icons", folder)
        self.seen = self.image_features.features(self.task.encoded_split.questions)
        self.rows = {question.id: row for row, question in enumerate(self.task.encoded_split.questions)}
        self.chance = retention.told(self.answers(backbone))["chance"]

    def rules(self) -> dict[str, list[Scores]]:
        hf = self.backbone.hf
        found = {method: [importance.measure(self.backbone, method, self.questions)] for method in importance.METHODS}
        return {
            **found,
            "random": [importance.by_lot(hf, seed) for seed in range(LOTS)],
            "first": [importance.first(hf)],
        }

    def size(self, name: str, sizes: dict[str, int]) -> dict[str, Any]:
        size = shrink_size.wanted(self.backbone.hf.config, **sizes)
        before = self.backbone.hf
        after = shapes.of_config(shrink_size.configured(before.config, size))
        shares = {
            "parameters": cost.qformer_parameters(after) / cost.qformer_parameters(before),
            "flops": cost.query(after.config, 40) / cost.query(before.config, 40),
        }
        print(f"{name}: {100 * shares['parameters']:.0f} % of parameters, {100 * shares['flops']:.0f} % of FLOPs")
        rows: dict[str, Any] = {}
        for rule, scores in self.rules().items():
            for kind, mend in (("plain", None), ("repaired", self.questions)):
                each = [self.shrunk(size, one, mend, rule) for one in scores]
                rows.setdefault(rule, {})[kind] = {key: sum(e[key] for e in each) / len(each) for key in each[0]}
            told = "   ".join(f"{k} {v['accuracy']:5.1f} % loss {v['loss']:.3f}" for k, v in rows[rule].items())
            print(f"  {rule:10} {told}", flush=True)
        return {"size": sizes, "shares": shares, "rules": rows}

    def shrunk(self, size: Any, scores: Scores, mend: Any, rule: str) -> dict[str, float]:
        small, record = shrink.keep(self.backbone, size, scores, mend, rule)
        found = self.judge(shrink.backbone_of(self.backbone, small))
        return found | ({"lost": record["lost"]["after"]} if record["lost"] else {})

    @torch.no_grad()
    def judge(self, backbone: Backbone) -> dict[str, float]:
        right = self.answers(backbone).values
        losses = [(backbone.losses(backbone.query(f, b), b), len(b.labels_N)) for f, b in self.unseen]
        loss = sum(float(total) for total, _ in losses) / sum(count for _, count in losses)
        return {"accuracy": 100 * sum(right) / len(right), "loss": loss}

    def answers(self, backbone: Backbone) -> Answers:
        return retention.answer(backbone, self.task, self.features, Settings(batch_size=32))

    def features(self, questions: Any) -> torch.Tensor:
        """The tower is the same for all: it sees a picture once."""
        return self.seen[[self.rows[question.id] for question in questions]]


if __name__ == "__main__":
    import sys

    run(*sys.argv[1:2])
