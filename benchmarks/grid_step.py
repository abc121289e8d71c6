"""Times training and ranking of sixteen experiments of the grid on the miniatures: a bank, and both peers."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import bank, measure
from benchmarks.peers import OriginalPeer, TrainerPeer
from blipfit import grid
from blipfit.data import encoded_split, icons
from blipfit.data.encoded_split import EncodedSplit
from blipfit.model import loading
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe

STEPS = 20
LORA_FIELDS = 107
"""Questions to rank for 320 of training: IconQA and ScienceQA have three training questions per validation question."""


def run(rounds: int = 3, experiments: int = 16) -> dict[str, Any]:
    """Measure both families; writes and returns seconds per experiment, and speedups."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "icons"
        icons.prepare(data, train=16 * STEPS, val=LORA_FIELDS, test=16)
        for family, first in measure.FIRST_LORA:
            recipes = [grid.recipe("icons", first + i, "tiny") for i in range(experiments)]
            results[family] = _measure_family(recipes, data, Path(folder) / "store", rounds)
            _print_family(family, results[family])
    measure.write_results(f"grid-step-{measure.MACHINE_KIND}", results)
    return results


def _measure_family(recipes: list[Recipe], data: Path, store: Path, rounds: int) -> dict[str, Any]:
    """Run every side in a process of its own: a bank changes the memory settings of its process, peers must not."""
    with ExitStack() as stack:
        sides: dict[str, Callable[[], float]] = {}
        for build in (_trainer_actions, _original_actions, _bank_actions):
            sides |= stack.enter_context(measure.ActionProcess(build, recipes, data, store)).actions
        times = measure.time_alternately(sides, rounds, timer=lambda action: action())
    K = len(recipes)
    per_experiment = {
        name: [t / (K if name.startswith("bank") else 1) for t in side_times] for name, side_times in times.items()
    }

    def total(side: str) -> list[float]:
        training, ranking = per_experiment[f"{side}_training"], per_experiment[f"{side}_ranking"]
        return [a + b for a, b in zip(training, ranking, strict=True)]

    return {
        "experiments": K,
        "steps": STEPS,
        "judged": LORA_FIELDS,
        "seconds_each": per_experiment,
        "against_trainer": measure.compute_speedup(per_experiment["trainer_peft"], per_experiment["bank_training"]),
        "against_original": measure.compute_speedup(total("original"), total("bank")),
        "ranking": measure.compute_speedup(per_experiment["original_ranking"], per_experiment["bank_ranking"]),
    }


def _trainer_actions(recipes: list[Recipe], data: Path, store: Path) -> dict[str, Callable[[], object]]:
    backbone, train, _ = _load(recipes, data)
    peer = TrainerPeer(backbone, _single_recipe(recipes), train)
    return {"trainer_peft": lambda: peer.train(STEPS)}


def _original_actions(recipes: list[Recipe], data: Path, store: Path) -> dict[str, Callable[[], object]]:
    backbone, train, val = _load(recipes, data)
    trainer, ranker = (OriginalPeer(backbone, _single_recipe(recipes), split) for split in (train, val))
    return {
        "original_training": lambda: trainer.train(STEPS),
        "original_ranking": lambda: ranker.rank(range(LORA_FIELDS)),
    }


def _bank_actions(recipes: list[Recipe], data: Path, store: Path) -> dict[str, Callable[[], object]]:
    backbone, train, val = _load(recipes, data)
    image_features = ImageFeatures.from_backbone(backbone, "stored", store)
    image_features.prepare([*train.questions, *val.questions])
    return {
        "bank_training": lambda: bank.train(backbone, recipes, train, image_features, STEPS),
        "bank_ranking": lambda: bank.rank(backbone, recipes, val, image_features),
    }


def _load(recipes: list[Recipe], data: Path) -> tuple[Backbone, EncodedSplit, EncodedSplit]:
    backbone = loading.load(recipes[0].model, device=measure.DEVICE)
    train, val = (encoded_split.load(backbone.text, recipes[0].data, data, split) for split in ("train", "val"))
    return backbone, train, val


def _single_recipe(recipes: list[Recipe]) -> Recipe:
    """Select an experiment with LoRA in several places; all take about the same time by themselves."""
    return recipes[len(recipes) // 2]


def _print_family(family: str, results: dict[str, Any]) -> None:
    print(f"\n{family} miniature, {results['experiments']} experiments in a bank, time per experiment:")
    measure.print_unit_times(results)
    print(f"  training against peft + Trainer:            {measure.format_speedup(results['against_trainer'])}")
    print(f"  training and ranking against the original:  {measure.format_speedup(results['against_original'])}")
    print(f"  ranking against the original:               {measure.format_speedup(results['ranking'])}", flush=True)
