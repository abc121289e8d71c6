"""Training and judging a row of the grid on the miniature: blipfit's bank against both peers."""

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
JUDGED = 107
"""Questions, for 320 that are trained on: IconQA and ScienceQA train on three for one that they judge."""


def run(rounds: int = 3, experiments: int = 16) -> dict[str, Any]:
    """Both families; seconds an experiment and their ratios."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "icons"
        icons.prepare(data, train=16 * STEPS, val=JUDGED, test=16)
        for family, first in measure.LORA:
            recipes = [grid.recipe("icons", first + i, "tiny") for i in range(experiments)]
            found[family] = _family(recipes, data, Path(folder) / "store", rounds)
            _tell(family, found[family])
    measure.keep(f"grid-step-{measure.KIND}", found)
    return found


def _family(recipes: list[Recipe], data: Path, store: Path, rounds: int) -> dict[str, Any]:
    """Every side in a process of its own: a bank changes how its process keeps memory, peers are as users have them."""
    with ExitStack() as stack:
        sides: dict[str, Callable[[], float]] = {}
        for build in (_trainer, _original, _bank):
            sides |= stack.enter_context(measure.Apart(build, recipes, data, store)).actions
        taken = measure.alternately(sides, rounds, clock=lambda side: side())
    K = len(recipes)
    each = {name: [t / (K if name.startswith("bank") else 1) for t in times] for name, times in taken.items()}
    whole = [a + b for a, b in zip(each["original_training"], each["original_ranking"], strict=True)]
    ours = [a + b for a, b in zip(each["bank_training"], each["bank_ranking"], strict=True)]
    return {
        "experiments": K,
        "steps": STEPS,
        "judged": JUDGED,
        "seconds_each": each,
        "against_trainer": measure.ratio(each["trainer_peft"], each["bank_training"]),
        "against_original": measure.ratio(whole, ours),
        "ranking": measure.ratio(each["original_ranking"], each["bank_ranking"]),
    }


def _trainer(recipes: list[Recipe], data: Path, store: Path) -> dict[str, Callable[[], object]]:
    backbone, train, _ = _loaded(recipes, data)
    peer = TrainerPeer(backbone, _middle(recipes), train)
    return {"trainer_peft": lambda: peer.train(STEPS)}


def _original(recipes: list[Recipe], data: Path, store: Path) -> dict[str, Callable[[], object]]:
    backbone, train, val = _loaded(recipes, data)
    trainer, judge = (OriginalPeer(backbone, _middle(recipes), encoded_split) for encoded_split in (train, val))
    return {
        "original_training": lambda: trainer.train(STEPS),
        "original_ranking": lambda: judge.rank(range(JUDGED)),
    }


def _bank(recipes: list[Recipe], data: Path, store: Path) -> dict[str, Callable[[], object]]:
    backbone, train, val = _loaded(recipes, data)
    image_features = ImageFeatures.from_backbone(backbone, "stored", store)
    image_features.prepare([*train.questions, *val.questions])
    return {
        "bank_training": lambda: bank.train(backbone, recipes, train, image_features, STEPS),
        "bank_ranking": lambda: bank.rank(backbone, recipes, val, image_features),
    }


def _loaded(recipes: list[Recipe], data: Path) -> tuple[Backbone, EncodedSplit, EncodedSplit]:
    backbone = loading.load(recipes[0].model, device=measure.DEVICE)
    train, val = (encoded_split.load(backbone.text, recipes[0].data, data, split) for split in ("train", "val"))
    return backbone, train, val


def _middle(recipes: list[Recipe]) -> Recipe:
    """One experiment alone takes as long as another; this one has LoRA in several places."""
    return recipes[len(recipes) // 2]


def _tell(family: str, found: dict[str, Any]) -> None:
    print(f"\n{family} miniature, {found['experiments']} experiments in a bank, an experiment's share:")
    measure.tell_shares(found)
    print(f"  training against Trainer + peft:            {measure.told(found['against_trainer'])}")
    print(f"  training and judging against the original:  {measure.told(found['against_original'])}")
    print(f"  ranking against the original:               {measure.told(found['ranking'])}", flush=True)
